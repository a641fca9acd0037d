"""Which policy is kept: the course of the optimisation on validation prompts, and a rule that never looks at gold."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from rlhf.pieces import put_in, whole
from rlhf.recipe import PpoSection
from stages.ppo.measure import Measured
from stages.ppo.roles import Actors


class Point(NamedTuple):
    """The policy after so many updates, on validation prompts."""

    update: int
    kl: float
    score: float
    second: float | None
    gold: float | None
    response_tokens: float
    net_score: float  # less what not ending costs
    ended: float  # the share of the responses that end by themselves

    @classmethod
    def of(cls, update: int, found: Measured) -> "Point":
        """The means of a measurement."""
        second, gold = found.second.mean if found.second else None, found.gold.mean if found.gold else None
        return cls(
            update,
            found.kl.mean,
            found.score.mean,
            second,
            gold,
            found.response_tokens.mean,
            found.net_score,
            found.ended.mean,
        )


def rule_of(settings: PpoSection) -> str:
    """The rule that the recipe names, or else the best judge that there is."""
    return settings.keep.rule or ("second_judge" if settings.second_judge else "score")


def choose(points: Sequence[Point], rule: str, kl_budget: float | None) -> Point:
    """The point that is kept. Of those within the budget the one with the highest figure, of equal ones the first.

    The first point, the policy as it was, has a KL of 0 and is always within the budget. Rule `last` takes the last
    one within the budget.
    """
    within = [point for point in points if kl_budget is None or point.update == 0 or point.kl <= kl_budget]
    if rule == "last":
        return within[-1]
    figures = [point.second if rule == "second_judge" else point.net_score for point in within]
    best = max(figure for figure in figures if figure is not None)
    return within[figures.index(best)]


class Keeper:
    """The points so far, and the weights of the policy that is kept if nothing better comes.

    Weights lie in ppo/kept: of the best policy so far, and of the one that was the best at each checkpoint, so that a
    run that goes on from there finds it. Others, of a course that was given up, are removed.
    """

    def __init__(self, settings: PpoSection, actors: Actors, folder: Path, checkpoints: Path, *, writes: bool) -> None:
        self._rule, self._budget = rule_of(settings), settings.keep.kl_budget
        self._actors, self._folder, self._checkpoints, self._writes = actors, folder, checkpoints, writes
        self.points: list[Point] = []

    def state(self) -> list[list[Any]]:
        """What the choice depends on."""
        return [list(point) for point in self.points]

    def load(self, state: list[list[Any]]) -> None:
        """Goes on from what `state` gave."""
        self.points = [Point(*values) for values in state]

    @property
    def kept(self) -> Point:
        """The best one so far."""
        return choose(self.points, self._rule, self._budget)

    def add(self, point: Point) -> bool:
        """Notes a measurement; whether it is the best one so far, whose weights are then written."""
        self.points.append(point)
        best = self.kept == point
        if best:
            policy = self._policy()  # on every rank: it may lie in pieces
        if best and self._writes:
            self._folder.mkdir(exist_ok=True)
            path = self._path(point.update)
            save_file(policy, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
            self._prune()
        return best

    def restore(self) -> Point:
        """Gives the policy the weights that are kept."""
        point = self.kept
        if point.update != self.points[-1].update:
            weights = load_file(self._path(point.update))
            put_in({name: self._actors.get_parameter(name) for name in weights}, weights)
        return point

    def _policy(self) -> dict[str, torch.Tensor]:
        """The policy's trained weights by name, each once."""
        wanted = {id(parameter) for parameter in self._actors.policy_parameters()}
        return {
            name: whole(parameter).detach().cpu().contiguous()
            for name, parameter in self._actors.named_parameters()
            if id(parameter) in wanted
        }

    def _path(self, update: int) -> Path:
        return self._folder / f"update-{update}.safetensors"

    def _prune(self) -> None:
        steps = [int(path.name[5:]) for path in self._checkpoints.glob("step-*") if path.name[5:].isdigit()]
        courses = [self.points, *([point for point in self.points if point.update <= step] for step in steps)]
        needed = {self._path(choose(course, self._rule, self._budget).update) for course in courses}
        for path in set(self._folder.glob("update-*.safetensors")) - needed:
            path.unlink()
