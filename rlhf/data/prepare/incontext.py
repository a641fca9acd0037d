"""Documents made of few-shot tasks' training rows: task line, demonstrations, an item with its answer.

Document n is a function of (seed, n) alone: a task, one of its numbers of demonstrations, that many different rows, and
another row as the item. What is asked in tests is not among the rows.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rlhf.tinyworld.words import Draw


class Example(NamedTuple):
    """A training row of a task, as its format writes it."""

    instruction: str  # the beginning of the document, where this row is the item
    demonstration: str
    item: str  # what is asked, with the answer


class InContext:
    """The documents that can be made."""

    def __init__(
        self,
        tasks: Mapping[str, Sequence[Example]],
        shots: Sequence[int],
        seed: int,
        held_back: Mapping[str, int] | None = None,
    ) -> None:
        """A task takes part with the numbers of demonstrations that it has rows for, one more for the item.

        `held_back`: how many rows of a task are not among these, since they hold items of tests.
        """
        self._seed = seed
        self.held_back = dict(held_back or {})
        self._tasks = {name: rows for name, rows in tasks.items() if any(count < len(rows) for count in shots)}
        self._shots = {name: [count for count in shots if count < len(rows)] for name, rows in self._tasks.items()}
        self.left_out = {
            name: [count for count in shots if count >= len(rows)]
            for name, rows in tasks.items()
            if any(count >= len(rows) for count in shots)
        }

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks that take part."""
        return list(self._tasks)

    def document(self, number: int) -> str:
        """The text of the document of this number."""
        draw = Draw("incontext", self._seed, number)
        task = draw.pick(self.tasks)
        item, *shown = draw.sample(self._tasks[task], 1 + draw.pick(self._shots[task]))
        return item.instruction + "".join(row.demonstration for row in shown) + item.item


def made_before(documents: int, share: float) -> int:
    """How many made documents stand before the document of this number, if they are this share of all, evenly."""
    return int(documents * share / (1 - share))
