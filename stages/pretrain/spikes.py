"""Loss spikes: found by a stated rule, and undone.

A step is a spike where its loss or the norm of its gradient is no number, or, from the 21st step on, where its loss
lies above the median of the last losses by so many deviations and so many nats (rlhf.functional.spikes). At any step it
is one where the loss is three times what guessing costs, ln(vocabulary): training has diverged then. The rule looks
at the mean loss of all processes, so that all come to the same verdict. The step is not taken; instead

- the model, the optimisers and the losses are again what they were at the last *good* state: states are kept in memory
  every `good_every` steps, and one is good once the next one is reached without a spike, since harm may be done before
  it shows;
- the rows that were read since then are skipped, and as many steps' more behind the spike as lie between two states;
- if a spike comes again before training has got past the last one, twice as many are skipped, and so on; after
  `most_in_a_row` the stage ends.

PaLM (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1) did so by hand: some 100 steps back, 200 to 500 skipped.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from rlhf.errors import StageFailed
from rlhf.functional.spikes import RECENT, usual_loss
from rlhf.recipe import SpikesSection

DIVERGED = 3.0  # times the loss of guessing


class Rollback(NamedTuple):
    """Where a training goes on after a spike."""

    state: dict[str, Any]  # the good one
    step: int  # of that state
    behind: int  # the place in the training order from which on rows are read again
    record: dict[str, Any]  # what is written down of it


class Guard:
    """What is known about a training's losses, and the states that it can go back to."""

    def __init__(self, settings: SpikesSection, guessing: float, steps: int) -> None:
        """`guessing`: the loss of a model that finds all tokens equally likely, in nats; `steps`: of the whole run."""
        self._settings, self._guessing = settings, guessing
        self._every = min(settings.good_every, steps)
        self._losses: deque[float] = deque(maxlen=settings.history)
        self._kept: list[dict[str, Any]] = []  # the last two, the newest last
        self._in_a_row, self._farthest = 0, -1  # rollbacks since training last got past a spike; that spike's step
        self.rollbacks: list[dict[str, Any]] = []

    def wants_state(self, step: int) -> bool:
        """Whether the state before this step is to be kept."""
        newest = self._kept[-1]["step"] if self._kept else -1
        return self._settings.action == "roll_back" and step % self._every == 0 and step > newest

    def keep(self, make: Callable[[], dict[str, Any]]) -> None:
        """Keeps the state that `make` gives, which nobody else changes, with its `step`; the one before it is good now.

        The one before that is forgotten first: three of a large model may be more than memory holds.
        """
        del self._kept[:-1]
        state = make()
        self._kept.append({**state, "guard_losses": list(self._losses)})
        if state["step"] > self._farthest:
            self._in_a_row = 0

    def fault(self, loss: float, norm: float) -> str:
        """What is wrong with a step of this loss, in nats, and this norm of its gradient; empty where nothing is."""
        if self._settings.action == "ignore":
            return ""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the norm of the gradient is {norm}"
        if loss > DIVERGED * self._guessing:
            return f"the loss is {loss:.3f}, more than {DIVERGED:g} times that of guessing, {self._guessing:.3f}"
        if len(self._losses) < RECENT:
            return ""
        usual = usual_loss(self._losses, self._settings.deviations, self._settings.rise)
        if loss <= usual.limit:
            return ""
        how = f"usual is {usual.median:.3f} +- {usual.deviation:.3f}, the limit {usual.limit:.3f}"
        return f"the loss is {loss:.3f}; {how}"

    def passed(self, loss: float) -> None:
        """Tells the loss of a step that was taken."""
        self._losses.append(loss)

    def back(self, step: int, cause: str, place: int, rows: int) -> Rollback:
        """Where to go on after a spike at this step, which read `rows` rows from this place of the training order.

        Raises StageFailed where there is no going back, or not once more.
        """
        s = self._settings
        if s.action == "stop" or not self._kept:
            raise StageFailed(
                f"pretrain: a spike at step {step}: {cause}. pretrain.spikes.action=stop ends the stage; roll_back "
                "goes on without the data, ignore with it; a smaller learning_rate helps against the model's own"
            )
        if self._in_a_row == s.most_in_a_row:
            raise StageFailed(
                f"pretrain: a spike at step {step}: {cause}. It comes after {self._in_a_row} rollbacks in a "
                f"row (pretrain.spikes.most_in_a_row is {s.most_in_a_row}), so it is not the data of a few steps: try "
                "a smaller learning_rate or a longer warmup, look at the data, or set pretrain.spikes.action=ignore"
            )
        state = self._kept[0]
        self._kept = [state]
        self._losses = deque(state["guard_losses"], maxlen=s.history)
        behind = place + rows + self._every * 2**self._in_a_row * rows
        self._in_a_row, self._farthest = self._in_a_row + 1, max(self._farthest, step)
        record = {
            "step": step,
            "cause": cause,
            "back_to_step": state["step"],
            "skipped_rows": [state["place"], behind],
            "in_a_row": self._in_a_row,
        }
        self.rollbacks.append(record)
        return Rollback(state, state["step"], behind, record)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "losses": list(self._losses),
            "kept": self._kept,
            "in_a_row": self._in_a_row,
            "farthest": self._farthest,
            "rollbacks": self.rollbacks,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self._losses = deque(state["losses"], maxlen=self._settings.history)
        self._kept, self.rollbacks = state["kept"], state["rollbacks"]
        self._in_a_row, self._farthest = state["in_a_row"], state["farthest"]
