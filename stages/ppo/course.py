"""The course of the optimisation: score and gold over the distance from the SFT model, and best-of-n as a yardstick.

Gao et al. 2022 (arXiv:2210.10760): against a learned judge the score keeps rising with KL while what it stands for
falls; best-of-n sampling shows what the judge gives without any training.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

from evaluation.plots import plot_course
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
    gold: float | None


def best_of_n_points(job: Job, examiner: Examiner, most: int) -> list[BestOf]:
    """Best-of-n of the policy as it is now, for n = 1, 2, 4, ... up to `most`; drawn once."""
    if most < 2:
        return []

    def make(_: Any) -> dict[str, Any]:
        rounds = []
        with Bar(f"ppo: best of {most}", most) as bar:
            for number in range(most):
                rounds.append(examiner.draw(1 + number))
                bar.show(number + 1)
        return {"points": [list(point) for point in best_of_points(list(zip(*rounds, strict=True)))]}

    return [BestOf(*values) for values in once(job, "best-of", make).facts["points"]]


def best_of_points(drawn: Sequence[Sequence[Episode]]) -> list[BestOf]:
    """From so many responses to each prompt."""
    most = len(drawn[0])
    points = []
    for n in (2**power for power in range(most.bit_length()) if 2**power <= most):
        scores, golds = [], []
        for episodes in drawn:
            found = [episode.score for episode in episodes]
            gold = [episode.gold for episode in episodes if episode.gold is not None]
            scores.append(best_of_n_mean(found, found, n))
            if len(gold) == most:
                golds.append(best_of_n_mean(found, gold, n))
        points.append(BestOf(n, best_of_n_kl(n), fmean(scores), fmean(golds) if golds else None))
    return points


def write_course(job: Job, points: Sequence[Point], yardstick: Sequence[BestOf], kept: Point) -> dict[str, Any]:
    """The curve as a picture, ppo/plots/course.png; and as figures for the summary."""
    if job.team.is_main:
        folder = job.directory.path / "plots"
        folder.mkdir(exist_ok=True)
        panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for unit in ("score", "second", "gold"):
            ways = {"PPO": points, "best of n": yardstick}
            found = {name: _curve(way, unit) for name, way in ways.items()}
            if found["PPO"]:
                ways_known = {name: curve for name, curve in found.items() if curve}
                panels["second judge" if unit == "second" else unit] = ways_known
        plot_course(folder / "course.png", panels, f"on validation prompts; update {kept.update} is kept")
    return {
        "ppo": [_rounded(point._asdict()) for point in points],
        "best_of_n": [_rounded(point._asdict()) for point in yardstick],
    }


def _curve(points: Sequence[Any], unit: str) -> list[tuple[float, float]]:
    values = [(point.kl, getattr(point, unit, None)) for point in points]
    return [(kl, value) for kl, value in values if value is not None]


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
