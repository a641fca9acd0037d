"""The reward stage: a judge of responses, trained on comparisons of two responses to a prompt, or an existing one.

Comparisons come from files, or are made here (collect, labellers). Training is Bradley-Terry on TRL's RewardTrainer
(train); then the score is given mean 0 and variance 1 on the reference's own responses (normalise), and what it is
worth is measured on held-out comparisons (measure). The *reference* is the model that the stage stands on: sft's.
"""

from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel

from rlhf.data.rows import Comparison
from rlhf.job import Job
from rlhf.model import ADAPTER_LOADS, count_parameters, model_card, save_model
from rlhf.quantisation import give_back_memory, put_where_it_fits, quantisation
from rlhf.recipe import RewardSection
from rlhf.runtime import log
from stages.common import card_facts, open_data, report_faults, starting_model
from stages.lora import learned_weights, merged, save_adapter, trained_on
from stages.reward.collect import Collected, Split, collect_comparisons
from stages.reward.measure import held_out, measure_judge
from stages.reward.normalise import normalise_score, reference_rows, reference_way
from stages.reward.reading import Judge, Pair, Reading, chat_tokenizer, check_some, open_judge
from stages.reward.train import Trained, on_the_whole_base, train_judge


def run(job: Job) -> dict[str, Any]:
    """Trains a reward model, or takes an existing judge, and saves it in reward/model."""
    settings = job.recipe.reward
    assert settings is not None
    reference_way(job.recipe)  # asked before anything is drawn or trained
    reference = starting_model(job.recipe, job.run, "reward")
    shared = chat_tokenizer(reference)
    quantised = quantisation(job.recipe, "reward")
    judge = open_judge(job, settings, reference, shared, quantised)
    reading = Reading(judge, settings)
    splits: tuple[Split, ...] = ("test",) if settings.from_ else ("train", "test")
    collected = collect_comparisons(job, settings.collect, reference, splits) if settings.collect else {}
    if judge.shares_tokens:
        _know(reading, collected)
    found = {split: _pairs(job, settings, reading, collected.get(split), split) for split in splits}
    train_pairs = found["train"].pairs if "train" in found else []
    test_pairs, seen = held_out(train_pairs, found["test"].pairs)
    rows = reference_rows(job, reference, judge, reading, collected.get("train"), train_pairs, test_pairs)

    trained = Trained(judge.model, {"pairs_train": 0})
    if not settings.from_:
        trained = train_judge(job, settings, judge, train_pairs, test_pairs)
    if quantised and isinstance(trained.model, PeftModel):
        learned, figures = learned_weights(trained.model), trained.figures
        del judge, trained
        give_back_memory()  # before the whole base comes
        judge = open_judge(job, settings, reference, shared, put=put_where_it_fits)
        trained = Trained(on_the_whole_base(job, settings, judge, learned), figures)
    normalised = normalise_score(job.team, trained.model, rows)
    model = _merged(job, judge, trained.model)
    summary: dict[str, Any] = {"parameters": count_parameters(model)}
    for split in splits:
        summary |= found[split].figures
    summary |= seen | trained.figures | normalised.figures
    summary |= measure_judge(job, model, train_pairs, test_pairs, settings.gold_margin, 1 / normalised.deviation)
    _say(summary)
    if job.team.is_main:
        save_model(model, judge.tokenizer, job.directory.model, _card(job, summary))
    return summary


class Pairs(NamedTuple):
    """The comparisons of a split, and what the summary says of how they came about."""

    pairs: list[Pair]
    figures: dict[str, Any]


def _know(reading: Reading, collected: dict[Split, Collected]) -> None:
    """Has what the reference drew read as the ids that it drew."""
    for found in collected.values():
        for response in found.responses:
            if response.ids is not None:
                reading.know(response.prompt, response.text, response.ids)


def _pairs(job: Job, settings: RewardSection, reading: Reading, collected: Collected | None, split: Split) -> Pairs:
    """The comparisons to learn from or to measure on, those that were collected first.

    Raises DataError where there is none, unless an existing judge is taken and none were asked for.
    """
    figures = dict(collected.figures) if collected else {}
    made = [reading.drawn_pair(comparison) for comparison in collected.comparisons] if collected else []
    for source in settings.train if split == "train" else settings.test:

        def named(comparison: Comparison, name: str = str(source)) -> Pair | None:
            return reading.pair(comparison._replace(source=comparison.source or name))

        dataset = open_data(job.recipe, "reward", (source,), "comparisons", "train", then=named)
        made += list(dataset)
        report_faults(dataset)
    pairs = [pair for pair in made if pair is not None]
    figures |= _left_out(reading, split, len(made))
    if made or not settings.from_:
        check_some(pairs, split, reading)
    return Pairs(pairs, figures)


def _left_out(reading: Reading, split: Split, found: int) -> dict[str, Any]:
    """What was done about comparisons that can't be read as they are; the user is told too."""
    dropped, truncated, blank = (reading.counts[what] for what in ("dropped", "truncated", "blank"))
    reading.counts.clear()
    if dropped or truncated:
        log(
            f"reward: {split}: of {found} comparisons {dropped} are longer than {reading.longest} tokens and left out, "
            f"and of {truncated} the beginning of the prompt is cut off"
        )
    if blank:
        log(
            f"reward: {split}: of {found} comparisons {blank} are left out, since a response that was drawn is blank, "
            "and the judge's chat template doesn't show such a turn"
        )
    return {
        f"pairs_{split}_too_long": dropped,
        f"pairs_{split}_truncated": truncated,
        f"pairs_{split}_blank": blank,
    }


def _merged(job: Job, judge: Judge, model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The plain model; low-rank adapters are saved in reward/adapter before they are merged into it."""
    if not isinstance(model, PeftModel):
        return model
    if job.team.is_main:
        card = model_card(
            f"{job.recipe.name}: reward model (adapter)",
            "Low-rank adapters and the score head. Subtract `score_mean` of ../model/config.json from the output."
            + trained_on(job.recipe.reward.lora if job.recipe.reward else None),
            {},
            ADAPTER_LOADS,
        )
        save_adapter(model, judge.tokenizer, job.directory.path / "adapter", card)
    return merged(model)


def _say(summary: dict[str, Any]) -> None:
    if not summary["pairs_test"]:
        log("reward: the judge is taken as it is; without comparisons (`reward.test`) its accuracy is not known")
        return
    gold, error = summary.get("gold_accuracy"), summary["calibration_error"]
    kind = "held-out pairs" if summary["pairs_test_unseen"] else "pairs with prompts that it was trained on"
    log(
        f"reward: accuracy {summary['accuracy']:.3f} on {summary['pairs_test']:,} {kind}; 'longer wins' has "
        f"{summary['length_baseline_accuracy']:.3f}"
        + (f"; gold accuracy {gold:.3f}" if gold is not None else "")
        + (f"; calibration error {error:.3f} with its temperature" if error is not None else "")
    )
    for source, values in summary["accuracy_by_source"].items() if len(summary["accuracy_by_source"]) > 1 else ():
        low, high = values["accuracy_ci95"]
        log(
            f"  {source}: {values['accuracy']:.3f} ({low:.3f} to {high:.3f}) on {values['pairs']:,} pairs; 'longer "
            f"wins' {values['length_baseline_accuracy']:.3f}"
        )


def _card(job: Job, summary: dict[str, Any]) -> str:
    lora = job.recipe.reward.lora if job.recipe.reward and not job.recipe.reward.from_ else None
    figures = ("accuracy", "length_baseline_accuracy", "gold_accuracy", "calibration_error", "temperature")
    return model_card(
        f"{job.recipe.name}: reward model",
        "Scores a conversation at its last token. Subtract `score_mean` of config.json from the output (of an "
        "ensemble: each head's from its own output; the score is the mean). sigmoid(difference of two scores / "
        "temperature) is the probability that the first response is the better one." + trained_on(lora),
        card_facts(summary, "parameters", "pairs_train", *figures),
    )
