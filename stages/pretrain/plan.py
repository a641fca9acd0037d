"""The arithmetic of a training, known before it starts: how many rows each step reads, and at which learning rate.

With a ramp the batch is k times `ramp.from` tokens, k = 1, 2, ... up to `tokens_per_step`: the largest such that it is
at most what an even growth over `ramp.tokens` tokens has reached. Training ends with the first step at which all
`tokens` are read, so it reads fewer than a step's more than was asked for.
"""

from bisect import bisect_right
from typing import NamedTuple

from rlhf.functional.schedules import learning_rate_share
from rlhf.recipe import PretrainSection


class Part(NamedTuple):
    """Steps that read equally many rows."""

    first: int  # step
    before: int  # rows that the steps before it read
    rows: int  # of each step


class Plan:
    """Every step of a training. Rows are `length` tokens long; steps count from 0."""

    def __init__(self, settings: PretrainSection) -> None:
        self._settings, self.length = settings, settings.sequence_length
        self.parts, self.steps, self.rows = _parts(settings)
        self._starts = [part.first for part in self.parts]
        self._warm = self._nearest_boundary(settings.warmup * self.rows)

    @property
    def tokens(self) -> int:
        """What all steps read together."""
        return self.rows * self.length

    def part_of(self, step: int) -> Part:
        """The steps like this one."""
        return self.parts[bisect_right(self._starts, step) - 1]

    def rows_before(self, step: int) -> int:
        """The rows that the steps before this one read; of the step behind the last: all."""
        part = self.part_of(step)
        return part.before + (step - part.first) * part.rows

    def learning_rate(self, step: int) -> float:
        """Of one step; where the ramp says so, times the root of its share of a whole batch."""
        s, rows = self._settings, self.part_of(step).rows
        start = self.rows_before(step)
        share = learning_rate_share(
            start, start + rows, self._warm, self.rows, s.schedule, s.final_learning_rate, s.decay
        )
        if s.ramp and s.ramp.learning_rate == "square_root":
            share *= (rows * self.length / s.tokens_per_step) ** 0.5
        return s.learning_rate * share

    def _nearest_boundary(self, rows: float) -> int:
        """The rows at the end of the step that ends nearest to so many, one step at least."""
        part = next(part for part in reversed(self.parts) if part.before <= rows)
        return max(self.parts[0].rows, part.before + round((rows - part.before) / part.rows) * part.rows)

    def describe(self) -> str:
        """In words: how many steps of how many tokens."""
        first, last = self.parts[0], self.parts[-1]
        told = f"{self.steps:,} steps of {last.rows * self.length:,} tokens"
        if first is not last:
            told = f"{self.steps:,} steps of {first.rows * self.length:,} to {last.rows * self.length:,} tokens"
        return f"{told} = {last.rows} rows of {self.length}"


def _parts(settings: PretrainSection) -> tuple[list[Part], int, int]:
    """The parts, and how many steps and rows there are in all."""
    length, ramp = settings.sequence_length, settings.ramp
    unit = (ramp.from_ if ramp else settings.tokens_per_step) // length
    sizes = settings.tokens_per_step // length // unit
    wanted = -(-settings.tokens // length)
    parts: list[Part] = []
    step = done = 0
    for size in range(1, sizes + 1):
        end = wanted
        if ramp and size < sizes:  # up to where an even growth has reached the next size
            end = min(wanted, -(-ramp.tokens * size // ((sizes - 1) * length)))
        steps = -(-(end - done) // (size * unit))
        if steps > 0:
            parts.append(Part(step, done, size * unit))
            step, done = step + steps, done + steps * size * unit
    return parts, step, done
