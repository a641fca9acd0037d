"""The course of the optimisation: score and gold over the distance from the SFT model, and best-of-n as a yardstick.

Gao et al. 2022 (arXiv:2210.10760): against a learned judge the score keeps rising with KL while what it stands for
falls; best-of-n sampling shows what the judge gives without any training.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from evaluation.plots import Mark, plot_course
from rlhf.functional.best_of_n import best_of_n_kl, best_of_n_mean
from rlhf.job import Job
from rlhf.runtime import Bar
from rlhf.saver import once
from stages.ppo.episodes import Episode
from stages.ppo.keep import Point
from stages.ppo.measure import Examiner


class BestOf(NamedTuple):
    """The best of n responses by score, on validation prompts."""

    n: int
    kl: float  # nats
    score: float
    second: float | None
    gold: float | None


def best_of_n_points(job: Job, examiner: Examiner, most: int) -> list[BestOf]:
    """Best-of-n of the policy as it is now, for n = 1, 2, 4, ... up to `most`; drawn once."""
    if most < 2:
        return []

    def make(_: Any) -> dict[str, Any]:
        rounds, seconds = [], []
        with Bar(f"ppo: best of {most}", most) as bar:
            for number in range(most):
                rounds.append(examiner.draw(number))
                seconds.append(examiner.second_scores(rounds[-1]))
                bar.show(number + 1)
        found = best_of_points(list(zip(*rounds, strict=True)), list(zip(*seconds, strict=True)))
        return {"points": [list(point) for point in found]}

    return [BestOf(*values) for values in once(job, "best-of", make).facts["points"]]


def best_of_points(drawn: Sequence[Sequence[Episode]], seconds: Sequence[Sequence[float]] = ()) -> list[BestOf]:
    """From so many responses to each prompt, and what the second judge says of each, where there is one."""
    most = len(drawn[0])
    scores = [[episode.score for episode in episodes] for episodes in drawn]
    known = [episodes for episodes in drawn if episodes[0].gold is not None]  # prompts whose truth is known
    points = []
    for n in (2**power for power in range(most.bit_length()) if 2**power <= most):
        pairs = zip(scores, seconds, strict=True) if seconds else ()
        second = [best_of_n_mean(score, value, n) for score, value in pairs]
        gold = [best_of_n_mean([e.score for e in each], [e.gold or 0.0 for e in each], n) for each in known]
        points.append(
            BestOf(
                n,
                best_of_n_kl(n),
                fmean(best_of_n_mean(score, score, n) for score in scores),
                fmean(second) if second else None,
                fmean(gold) if gold else None,
            )
        )
    return points


def write_course(
    job: Job, points: Sequence[Point], yardstick: Sequence[BestOf], kept: Point, kl_budget: float | None
) -> dict[str, Any]:
    """The curve as a picture, ppo/plots/course.png; and as figures for the summary."""
    if job.team.is_main:
        folder = job.directory.path / "plots"
        folder.mkdir(exist_ok=True)
        panels: dict[str, dict[str, list[Mark]]] = {}
        for unit in ("score", "second", "gold"):
            found = {
                "PPO": _curve(points, unit, ["kept" if point == kept else "" for point in points]),
                "best of n": _curve(yardstick, unit, [str(point.n) for point in yardstick]),
            }
            if found["PPO"]:
                ways_known = {name: curve for name, curve in found.items() if curve}
                panels["second judge" if unit == "second" else unit] = ways_known
        title = f"on validation prompts; update {kept.update} is kept"
        plot_course(folder / "course.png", panels, title, kl_budget)
    return {
        "ppo": [_rounded(point._asdict()) for point in points],
        "best_of_n": [_rounded(point._asdict()) for point in yardstick],
    }


def _curve(points: Sequence[Any], unit: str, labels: Sequence[str]) -> list[Mark]:
    values = [(point.kl, getattr(point, unit), label) for point, label in zip(points, labels, strict=True)]
    return [Mark(kl, value, label) for kl, value, label in values if value is not None]


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
