"""A stage's checkpoints while it trains: when they are due, what all ranks put in, and where the stage goes on.

All ranks decide together after every step, so that they save and stop at the same one.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from rlhf.checkpoint import (
    Cadence,
    Checkpoint,
    Checkpoints,
    load_tree,
    random_state,
    save_pieces,
    save_tree,
    set_random_state,
)
from rlhf.errors import Interrupted, StageFailed
from rlhf.job import Job
from rlhf.pieces import fingerprint, shape_of
from rlhf.runtime import MetricsLog, log


class Saver:
    """The checkpoints of one stage of one run."""

    def __init__(self, job: Job, metrics: MetricsLog) -> None:
        settings = job.recipe.checkpoints
        self._job, self._metrics, self._team = job, metrics, job.team
        self._store = Checkpoints(job.directory.path / "checkpoints", settings.keep)
        self._cadence = Cadence(settings.every_steps, settings.every_minutes)
        self._earlier, self._started = 0.0, time.monotonic()

    def resume(self) -> Checkpoint | None:
        """The checkpoint that every rank goes on from, None for a stage that begins.

        Cuts the metrics back to it, and restores the random states of this rank.
        """
        found = self._team.from_main(self._store.newest)
        if found is None:
            if any((self._job.directory.path / "checkpoints").glob("*.damaged")):
                log(f"{self._job.stage}: no whole checkpoint is left, so it begins again at its first step")
            self._metrics.cut_back(None)
            return None
        try:
            facts = found.facts
            position = {"bytes": abs(int(facts["metrics"]["bytes"])), "time": float(facts["metrics"]["time"])}
            before, self._earlier = int(facts["processes"]), float(facts["training_seconds"])
            self._job.meter.go_on(facts["spent"])
        except (KeyError, TypeError, ValueError) as error:
            raise StageFailed(
                f"the checkpoint {found.path} is not one of ours ({type(error).__name__}: {error}); remove it, and the "
                "same command goes on from the one before"
            ) from None
        self._metrics.cut_back(position, found.step)
        if before != self._team.size:
            log(
                f"{self._job.stage}: the checkpoint was written by {before} processes and is gone on from with "
                f"{self._team.size}: sums are rounded in another order, so the bits of the result may differ"
            )
        self._restore_random_state(found)
        log(f"{self._job.stage}: goes on from the checkpoint of step {found.step}")
        return found

    def back(self) -> Checkpoint:
        """The newest checkpoint, to be restored by a stage that is running; metrics and random states are as there."""
        found = self._team.from_main(self._store.newest)
        if found is None:
            raise StageFailed(f"{self._job.stage}: there is no whole checkpoint to go back to")
        self._metrics.cut_back(found.facts["metrics"], found.step)
        self._restore_random_state(found)
        return found

    def _restore_random_state(self, found: Checkpoint) -> None:
        """This rank's, where the checkpoint was written by as many."""
        if int(found.facts["processes"]) == self._team.size:
            set_random_state(load_tree(found.path, f"random-{self._team.rank}"))

    @contextmanager
    def training(self) -> Iterator["Saver"]:
        """Within, a first SIGINT or SIGTERM waits for the end of the step, and for the checkpoint after it."""
        self._started = time.monotonic()
        with self._job.interrupts.deferred():
            yield self

    def seconds(self) -> float:
        """What the training took until now, the runs before it up to their checkpoints included."""
        return self._earlier + time.monotonic() - self._started

    def after_step(self, step: int, steps: int, state: Callable[[], dict[str, Any]], weights: nn.Module) -> None:
        """Writes a checkpoint of `state()` where one is due after this step of so many; leaves where it was asked to.

        Every rank makes its `state()`; rank 0's is written, and every rank's pieces. `weights` must be the same on
        every rank, those that lie in pieces apart.
        Raises Interrupted after the checkpoint.
        """
        save, stop = self.decide(step, last=step == steps)
        if save:
            self.save(step, state, weights)
        if stop:
            raise self.interrupted(step)

    def save(self, step: int, state: Callable[[], dict[str, Any]], weights: nn.Module) -> None:
        """Writes a checkpoint of `state()` now; see `after_step`."""
        with self.writing(step, weights) as folder:
            tree = state()
            save_pieces(tree, folder, "state")
            if self._team.is_main:
                save_tree(tree, folder, "state")

    def save_going_back(self, step: int, state: Callable[[], dict[str, Any]], weights: nn.Module) -> None:
        """Writes a checkpoint of `state()` for a training that has gone back to this step; those after it go."""
        self.save(step, state, weights)
        if self._team.is_main:
            self._store.forget_after(step)

    def decide(self, step: int, *, last: bool = False) -> tuple[bool, bool]:
        """Whether a checkpoint is written after this step, and whether the stage stops then; the same on all ranks."""
        due = last or (self._team.is_main and self._cadence.due(step))
        watch = self._job.watch
        if watch:
            watch.reached(step)
        asked, wanted, most, least = self._team.largest(self._job.interrupts.asked, due, step, -step)
        if watch:
            watch.met()
        if most != -least:
            self._team.check_same("the step", step)
        return bool(asked or wanted), bool(asked)

    @contextmanager
    def writing(self, step: int, weights: nn.Module) -> Iterator[Path]:
        """A folder that is a checkpoint once what was written in it is whole, on every rank."""
        known = fingerprint(weights.parameters()) if self._team.size > 1 else 0.0
        self._team.check_same(f"the weights after step {step}", known)
        trained = (parameter for parameter in weights.parameters() if parameter.requires_grad)
        size = sum(math.prod(shape_of(parameter)) * parameter.element_size() for parameter in trained)
        folder = self._team.from_main(lambda: self._store.begin(step, expected=3 * size))  # Adam has two moments
        try:
            save_tree(random_state(), folder, f"random-{self._team.rank}")
            yield folder
            self._team.wait()
            if self._team.is_main:
                facts = {
                    "metrics": self._metrics.position(),
                    "spent": self._job.meter.spent(),
                    "training_seconds": self.seconds(),
                    "processes": self._team.size,
                }
                self._store.seal(folder, facts)
        except BaseException:
            if self._team.is_main:
                self._store.discard(folder)
            raise
        self._cadence.written()

    def interrupted(self, step: int) -> Interrupted:
        """What every rank is to raise after the checkpoint that an interrupted stage leaves, once it is whole.

        Torch's launcher ends all ranks as soon as one has left.
        """
        self._team.wait()
        return Interrupted(
            f"{self._job.stage}: interrupted; a checkpoint of step {step} is written: the same command, "
            "without --fresh, goes on there"
        )


def once(job: Job, name: str, make: Callable[[Path], dict[str, Any]]) -> Checkpoint:
    """A part of a stage's work that is done once: what an interrupted run has left of it, else made now.

    `make` is called on every rank with a folder in which rank 0 writes; it returns small facts. What it leaves is kept
    in STAGE/NAME with checksums, as a checkpoint is.
    """
    store = Checkpoints(job.directory.path / name, keep=1)
    found = job.team.from_main(store.newest)
    if found is not None:
        log(f"{job.stage}: {name}: made before the stage was interrupted, used again")
        return found
    folder = job.team.from_main(lambda: store.begin(0))
    try:
        facts = make(folder)
        return job.team.from_main(lambda: store.seal(folder, facts))
    except BaseException:
        if job.team.is_main:
            store.discard(folder)
        raise
