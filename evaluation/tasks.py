"""Where few-shot questions come from: the built-in world, and folders of TASK.train.jsonl with TASK.test.jsonl.

A row of a file has `instruction`, `input`, `choices` and `answer` (an index from 0). Free answers (`target` instead of
`choices`) are not asked yet: such tasks are named and left out.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.fewshot import Question, Task
from rlhf.data import reader
from rlhf.data.reader import Faults, read_rows
from rlhf.data.rows import is_text
from rlhf.errors import DataError, UserError
from rlhf.tinyworld import incontext
from rlhf.tinyworld.words import Draw


class TinyworldTask(NamedTuple):
    """One of the built-in world's tasks."""

    name: str

    def questions(self, shots: int, n: int, seed: int) -> list[Question]:
        """Questions whose prompts are part of no training document."""
        if shots > incontext.MAX_SHOTS:
            raise UserError(f"{self.name} has at most {incontext.MAX_SHOTS} demonstrations, {shots} were asked for")
        return [
            Question(
                f"{incontext.lines(item.instruction, list(item.demonstrations))}\n{item.input} ->",
                item.choices,
                item.answer,
                tuple(answer for _, answer in item.demonstrations),
            )
            for item in incontext.items(self.name, shots, n, seed)
        ]


def tinyworld_tasks() -> list[Task]:
    """All tasks of the built-in world."""
    return [TinyworldTask(name) for name in incontext.task_names()]


class Row(NamedTuple):
    """One checked row of a task file."""

    instruction: str
    input: str
    choices: tuple[str, ...]
    answer: int


class FileTask(NamedTuple):
    """A task from a pair of files: demonstrations from one, items from the other."""

    name: str
    demonstrations: tuple[Row, ...]
    items: tuple[Row, ...]

    def questions(self, shots: int, n: int, seed: int) -> list[Question]:
        """The first `n` items; each has demonstrations of its own, drawn without repetition."""
        if shots > len(self.demonstrations):
            raise UserError(f"{self.name} has {len(self.demonstrations)} demonstrations, {shots} were asked for")
        return [self._question(number, row, shots, seed) for number, row in enumerate(self.items[:n])]

    def _question(self, number: int, row: Row, shots: int, seed: int) -> Question:
        chosen = Draw("fewshot", self.name, seed, number, shots).sample(self.demonstrations, shots)
        blocks = [f"{row.instruction}\n"] if row.instruction else []
        blocks += [f"Input: {demo.input}\nAnswer: {demo.choices[demo.answer]}\n" for demo in chosen]
        blocks.append(f"Input: {row.input}\nAnswer:")
        return Question("\n".join(blocks), row.choices, row.answer, tuple(demo.choices[demo.answer] for demo in chosen))


def file_tasks(folder: Path, faults: Faults) -> tuple[list[Task], list[str]]:
    """The multiple-choice tasks of a folder, and the names of those left out because their answers are free.

    Raises DataError for a malformed row or where no test file is found.
    """
    found: list[Task] = []
    left_out: list[str] = []
    files = sorted([*folder.glob("*.test.jsonl"), *folder.glob("*.test.jsonl.gz")])
    if not files:
        raise DataError(f"{folder}: no file *.test.jsonl")
    for path in files:
        name = path.name.split(".test.")[0]
        rows = list(read_rows(path, faults))
        if all("choices" not in row.value and "target" in row.value for row in rows):
            left_out.append(name)
            continue
        items = _checked(rows, faults)
        if not items:
            raise DataError(f"{path}: no good row among {len(rows)}")
        train = [folder / f"{name}.train.jsonl", folder / f"{name}.train.jsonl.gz"]
        demonstrations = [row for file in train if file.exists() for row in read_rows(file, faults)]
        found.append(FileTask(name, _checked(demonstrations, faults), items))
    return found, left_out


def _checked(rows: Iterable[reader.Row], faults: Faults) -> tuple[Row, ...]:
    good = []
    for row in rows:
        fault = _fault(row.value)
        if fault:
            faults.bad(row.path, row.line, fault)
            continue
        value = row.value
        good.append(Row(value.get("instruction", ""), value["input"], tuple(value["choices"]), value["answer"]))
    return tuple(good)


def _fault(value: dict[str, Any]) -> str:
    """What is wrong with a row of a task file; empty where nothing is."""
    if not is_text(value.get("input")):
        return "`input` must be text"
    if not is_text(value.get("instruction", "")):
        return "`instruction` must be text"
    choices, answer = value.get("choices"), value.get("answer")
    if not isinstance(choices, list) or not choices or not all(is_text(choice) for choice in choices):
        return "`choices` must be a list of at least one text"
    if len(set(choices)) < len(choices):
        return "two `choices` are equal"
    if type(answer) is not int:
        return "`answer` must be the index of a choice, a whole number"
    return "" if 0 <= answer < len(choices) else f"`answer` is {answer}, but the choices are 0 to {len(choices) - 1}"
