"""What a judge knows about itself: it reads the held-out comparisons; evaluation.preference counts and draws."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evaluation import plots, preference
from evaluation.preference import Answer, Calibration, Outcome
from rlhf.functional.intervals import Estimate, mean_estimate
from rlhf.job import Job
from rlhf.judge import score_means
from rlhf.rundir import write_json
from rlhf.runtime import log
from rlhf.team import Team
from stages.reward.normalise import score_rows
from stages.reward.reading import Ids, Pair, evenly

FEATURE_PAIRS = 2000  # of training: enough to tell whether more or less of something is preferred
CALIBRATION = "calibration.json"
MOST_POINTS = 500  # of the responses, in that file
MOST_SOURCES = 20  # in the picture; the summary has them all

NOT_MEASURED: dict[str, Any] = {
    "pairs_test": 0,
    "accuracy": None,
    "accuracy_ci95": None,
    "length_baseline_accuracy": None,
    "length_baseline_accuracy_ci95": None,
}


class HeldOut(NamedTuple):
    """The test comparisons to measure on, and what the summary says of them."""

    pairs: list[Pair]
    figures: dict[str, int]


def held_out(train: Sequence[Pair], test: Sequence[Pair]) -> HeldOut:
    """The test comparisons whose prompts no training comparison has.

    All of them where every prompt was trained on: then `pairs_test_unseen` is 0, and `reward.require` is not met.
    """
    prompts = {json.dumps(pair.comparison.prompt) for pair in train}
    trained = {_compared(pair) for pair in train}
    unseen = [pair for pair in test if json.dumps(pair.comparison.prompt) not in prompts]
    figures = {
        "pairs_test_unseen": len(unseen),
        "pairs_test_seen": sum(_compared(pair) in trained for pair in test),
        "prompts_test_seen": len(prompts & {json.dumps(pair.comparison.prompt) for pair in test}),
    }
    if len(unseen) < len(test):
        log(
            f"reward: warning: {figures['prompts_test_seen']} of the test prompts are trained on as well, with "
            f"{len(test) - len(unseen)} of the {len(test)} test comparisons ({figures['pairs_test_seen']} are training "
            "comparisons themselves); "
            + ("these are not measured on" if unseen else "with no others, what is measured is too good")
        )
    return HeldOut(unseen or list(test), figures)


def _compared(pair: Pair) -> str:
    """What a comparison is of, whichever response is the better one."""
    comparison = pair.comparison
    return json.dumps([comparison.prompt, sorted((comparison.chosen, comparison.rejected))])


def measure_judge(
    job: Job, model: Any, train: Sequence[Pair], test: Sequence[Pair], gold_margin: float, trained_temperature: float
) -> dict[str, Any]:
    """The summary's figures on held-out comparisons, and the pictures in reward/plots.

    `trained_temperature` is what the scores are to be divided by to be the log-odds that training made them.
    """
    if not test:
        return NOT_MEASURED
    outcomes = outcomes_of(job.team, model, test)
    calibrated = preference.calibration(outcomes, trained_temperature)
    learned_from = [_outcome(pair, (), ()) for pair in evenly(train, FEATURE_PAIRS)]
    scores = [answer.score for outcome in outcomes for answer in (outcome.chosen, outcome.rejected)]
    figures = {
        **preference.accuracies(outcomes),
        **preference.gold_figures(outcomes, gold_margin),
        **_calibration_figures(calibrated, trained_temperature),
        **preference.length_correlation(outcomes),
        **({"surface_features": preference.surface_features(learned_from, outcomes)} if train else {}),
        **(preference.head_agreement(outcomes) if len(outcomes[0].chosen.scores) > 1 else {}),
        **mean_estimate(scores).as_keys("score", 4),
    }
    if job.team.is_main:
        draw(job.directory.path / "plots", outcomes, figures, calibrated)
        write_json(job.directory.path / CALIBRATION, calibration_points(outcomes, calibrated))
    return figures


def calibration_points(outcomes: Sequence[Outcome], calibrated: Calibration | None) -> dict[str, Any]:
    """What the pictures of calibration and length show, for others to draw: `bins_before` and `bins_after` a
    temperature, and evenly chosen `points` [tokens, score] of the held-out `responses`.
    """
    answers = preference.distinct_answers(outcomes)
    return {
        "bins_before": [found._asdict() for found in calibrated.before] if calibrated else [],
        "bins_after": [found._asdict() for found in calibrated.after] if calibrated else [],
        "points": [[answer.tokens, round(answer.score, 4)] for answer in evenly(answers, MOST_POINTS)],
        "responses": len(answers),
    }


def outcomes_of(team: Team, model: Any, pairs: Sequence[Pair]) -> list[Outcome]:
    """The comparisons with the scores of every head, its mean taken off."""
    rows: list[Ids] = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    means = score_means(model)
    scores = [
        tuple(value - mean for value, mean in zip(values, means, strict=True))
        for values in score_rows(team, model, rows)
    ]
    return [
        _outcome(pair, *both) for pair, both in zip(pairs, zip(scores[::2], scores[1::2], strict=True), strict=True)
    ]


def _outcome(pair: Pair, chosen: tuple[float, ...], rejected: tuple[float, ...]) -> Outcome:
    comparison = pair.comparison
    return Outcome(
        "\n".join(message["content"] for message in comparison.prompt),
        comparison.source,
        Answer(comparison.chosen, len(pair.chosen) - pair.prompt_tokens, chosen, comparison.gold_chosen),
        Answer(comparison.rejected, len(pair.rejected) - pair.prompt_tokens, rejected, comparison.gold_rejected),
    )


def _calibration_figures(found: Calibration | None, trained_temperature: float) -> dict[str, Any]:
    if found is None:
        return {"calibration_error": None}
    return {
        "calibration_error": round(found.error, 4),
        "calibration_error_before": round(found.error_before, 4),
        "temperature": round(found.temperature, 4),
        "temperature_trained": round(trained_temperature, 4),
    }


# Pictures


def draw(folder: Path, outcomes: Sequence[Outcome], figures: dict[str, Any], calibrated: Calibration | None) -> None:
    """Writes the pictures anew."""
    folder.mkdir(exist_ok=True)
    answers = preference.distinct_answers(outcomes)
    plots.plot_shares(folder / "accuracy.png", _shares(figures), f"accuracy on {len(outcomes):,} held-out comparisons")
    plots.plot_scores_by_length(
        folder / "length.png",
        [answer.tokens for answer in answers],
        [answer.score for answer in answers],
        f"score and length: Pearson {figures['score_length_pearson']}, Spearman {figures['score_length_spearman']}",
    )
    plots.plot_differences(folder / "differences.png", [o.difference for o in outcomes], "held-out comparisons")
    if calibrated:
        titles = (
            f"as trained: calibration error {calibrated.error_before:.3f}",
            f"with a temperature of {calibrated.temperature:.3f}: {calibrated.error:.3f}",
        )
        plots.plot_reliability(folder / "reliability.png", calibrated.before, calibrated.after, titles)
    if "unanimous" in figures:
        names = ("unanimous", "pairwise_agreement", "accuracy_where_unanimous", "accuracy_where_not_unanimous")
        title = f"{figures['heads']} heads; spread of the scores {figures['spread']}"
        plots.plot_shares(folder / "heads.png", _known({name: _estimate(figures, name) for name in names}), title)


def _shares(figures: dict[str, Any]) -> dict[str, Estimate]:
    """What is shown beside the accuracy: its parts, and what the surface alone would give."""
    found = {
        "judge": _estimate(figures, "accuracy"),
        "judge, gold": _estimate(figures, "gold_accuracy"),
        "labellers, gold": _estimate(figures, "labellers_agree_with_gold"),
        "judge, longer chosen": _estimate(figures, "accuracy_longer_chosen"),
        "judge, shorter chosen": _estimate(figures, "accuracy_shorter_chosen"),
    }
    by_source = sorted(figures["accuracy_by_source"].items(), key=lambda item: -item[1]["pairs"])[:MOST_SOURCES]
    if len(by_source) > 1:
        found |= {f"judge, {source}": _estimate(values, "accuracy") for source, values in by_source}
    found["longer wins"] = _estimate(figures, "length_baseline_accuracy")
    for name, values in figures.get("surface_features", {}).items():
        found[f"{name.replace('_', ' ')}: {values['preferred']}"] = _estimate(values, "accuracy")
    return _known(found)


def _known(found: dict[str, Estimate | None]) -> dict[str, Estimate]:
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def _estimate(figures: dict[str, Any], name: str) -> Estimate | None:
    """A figure with its interval, None where it is unknown."""
    value = figures.get(name)
    return None if value is None else Estimate(value, *figures[f"{name}_ci95"])
