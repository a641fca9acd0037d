"""Where few-shot items come from: the built-in world, and folders of TASK.test.jsonl with TASK.train.jsonl, TASK.yaml.

A row has `input` and mostly `instruction`, and either `choices` with `answer` (an index from 0), or a free answer,
`target`. The YAML file says how a prompt is written and what counts as right; without one it is as in `TaskFormat`.
"""

import glob
import re
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator

from rlhf.data import reader
from rlhf.data.overlap import Probe
from rlhf.data.prepare.incontext import Example
from rlhf.data.reader import Faults, read_rows
from rlhf.data.rows import is_text
from rlhf.errors import DataError, RecipeError, UserError
from rlhf.recipe import read_yaml
from rlhf.tinyworld import incontext
from rlhf.tinyworld.words import Draw

FIELD = re.compile(r"\{(\w+)\}")
NUMBER = re.compile(  # $1,234.50, -3, .5, 1e5; a hyphen behind a word or a number is no sign
    r"(?:(?<![\w.)\]%])[-−–])?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?"
)
HYPHENS = str.maketrans("−–", "--")
Metric = Literal["acc", "acc_norm", "acc_bytes", "acc_calibrated", "exact_match"]
CONTENT_FREE = ("N/A", "[MASK]", "")  # stands for an item that says nothing (Zhao et al. 2021, section 5)


class Question(NamedTuple):
    """One item with its demonstrations, ready to be asked. Without choices its answer is free: `target`."""

    prompt: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice; -1 where the answer is free
    demonstrated: tuple[str, ...]  # the demonstrations' answers
    target: str = ""
    item: int = 0  # its number in the task: the same in every draw of demonstrations, and at every number of them
    empty: tuple[str, ...] = ()  # the prompt with each of CONTENT_FREE in place of what the item says


class TaskFormat(BaseModel):
    """How a task's prompts are written, and what counts as right. `{name}` stands for a field of the row.

    `{answer}` is the right choice, or the target. The defaults are those of lm-evaluation-harness's custom tasks, so
    that its numbers can be compared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: int | FiniteFloat | str = Field(
        1, description="of the task; results of different versions aren't comparable"
    )
    description: str = Field("", description="what is asked, for people")
    instruction: str = Field("{instruction}\n\n", description="the beginning; left out for rows without instruction")
    demonstration: str = Field("Input: {input}\nOutput: {answer}\n\n", description="one demonstration")
    item: str = Field("Input: {input}\nOutput:", description="what is asked")
    delimiter: str = Field(" ", description="what stands before a choice")
    metric: Metric | None = Field(
        None,
        description="the task's own figure: the likeliest choice (acc), by character (acc_norm), by UTF-8 byte "
        "(acc_bytes) or over its probability where nothing is asked (acc_calibrated); free answers have exact_match",
    )
    max_tokens: int = Field(32, ge=1, description="longest free answer")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(("\n",), description="texts that end a free answer")
    extract: Literal["all", "first_line", "number", "last_number"] | None = Field(
        None,
        description="what of a free answer counts, and of the target: all of it, its first line, its first or last "
        "number, compared as numbers; default: last_number where every target is a number, else all",
    )
    normalise: tuple[Literal["case", "punctuation", "articles", "spaces"], ...] = Field(
        ("spaces",), description="what is made equal before free answers are compared"
    )

    @field_validator("stop", "normalise", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Task(Protocol):
    """What is asked: a name, and the questions at any number of demonstrations."""

    @property
    def name(self) -> str:
        """The task's name."""
        ...

    @property
    def format(self) -> TaskFormat:
        """How its answers are scored."""
        ...

    @property
    def free(self) -> bool:
        """Whether its answers are free."""
        ...

    @property
    def most_shots(self) -> int:
        """How many demonstrations there are."""
        ...

    def draws(self, shots: int, wanted: int) -> int:
        """How many different draws of so many demonstrations are of use, at most `wanted`."""
        ...

    def questions(self, shots: int, n: int, seed: int, draw: int = 0) -> list[Question]:
        """At most `n` questions with `shots` demonstrations each, the same items at every count and in every draw.

        Raises UserError where there are fewer demonstrations than that.
        """
        ...

    def probes(self, n: int, seed: int) -> list[Probe]:
        """What should not occur in training, of the first `n` items, in their order."""
        ...


class TinyworldTask(NamedTuple):
    """One of the built-in world's tasks. Each item has demonstrations of its own."""

    name: str
    format: TaskFormat = TaskFormat(description="made by the built-in world")
    free: bool = False
    most_shots: int = incontext.MAX_SHOTS

    def draws(self, shots: int, wanted: int) -> int:
        """See Task: one, since the items differ in their demonstrations already."""
        return 1

    def questions(self, shots: int, n: int, seed: int, draw: int = 0) -> list[Question]:
        """See Task. The prompts are part of no training document."""
        _check_shots(self, shots)
        return list(_tinyworld_questions(self.name, shots, n, seed))

    def probes(self, n: int, seed: int) -> list[Probe]:
        """See Task: an item and all its demonstrations together. Each alone is a fact that training may teach."""
        questions = self.questions(self.most_shots, n, seed)
        return [Probe(each.prompt, each.choices[each.answer], each.choices) for each in questions]


@lru_cache(maxsize=64)  # they take a while to make, and every model is asked the same
def _tinyworld_questions(name: str, shots: int, n: int, seed: int) -> tuple[Question, ...]:
    found = []
    for number, item in enumerate(incontext.items(name, shots, n, seed)):
        before = incontext.lines(item.instruction, list(item.demonstrations))
        found.append(
            Question(
                f"{before}\n{item.input} ->",
                item.choices,
                item.answer,
                tuple(answer for _, answer in item.demonstrations),
                item=number,
                empty=tuple(f"{before}\n{word} ->" for word in CONTENT_FREE),
            )
        )
    return tuple(found)


def tinyworld_tasks() -> list[Task]:
    """All tasks of the built-in world."""
    return [TinyworldTask(name) for name in incontext.task_names()]


class Row(NamedTuple):
    """One checked row of a task file."""

    fields: Mapping[str, str]  # what a format can name, `answer` included
    choices: tuple[str, ...]
    answer: int


class FileTask(NamedTuple):
    """A task from files."""

    name: str
    demonstrations: tuple[Row, ...]
    items: tuple[Row, ...]
    format: TaskFormat = TaskFormat()
    free: bool = False

    @property
    def most_shots(self) -> int:
        """See Task."""
        return len(self.demonstrations)

    def draws(self, shots: int, wanted: int) -> int:
        """See Task."""
        return wanted if shots else 1

    def questions(self, shots: int, n: int, seed: int, draw: int = 0) -> list[Question]:
        """See Task. All items of a draw share its demonstrations: the first of the file in draw 0, else a sample."""
        _check_shots(self, shots)
        chosen = self.demonstrations[:shots]
        if draw:
            chosen = tuple(Draw("fewshot", self.name, seed, draw, shots).sample(self.demonstrations, shots))
        shown = "".join(_filled(self.format.demonstration, row.fields) for row in chosen)
        demonstrated = tuple(row.fields["answer"] for row in chosen)
        asked = FIELD.findall(self.format.item)
        found = []
        for number, row in enumerate(self.items[:n]):
            instruction = _filled(self.format.instruction, row.fields) if row.fields.get("instruction") else ""
            empty = (_filled(self.format.item, {**row.fields, **dict.fromkeys(asked, word)}) for word in CONTENT_FREE)
            found.append(
                Question(
                    instruction + shown + _filled(self.format.item, row.fields),
                    row.choices,
                    row.answer,
                    demonstrated,
                    "" if row.choices else row.fields["answer"],
                    number,
                    tuple(instruction + shown + text for text in empty) if row.choices else (),
                )
            )
        return found

    def probes(self, n: int, seed: int) -> list[Probe]:
        """See Task: the fields of the row that the format asks about."""
        asked = [field for field in dict.fromkeys(FIELD.findall(self.format.item)) if field != "instruction"]
        return [
            Probe("\n".join(row.fields[field] for field in asked), row.fields["answer"], row.choices)
            for row in self.items[:n]
        ]


def _check_shots(task: Task, shots: int) -> None:
    if shots > task.most_shots:
        raise UserError(f"{task.name} has at most {task.most_shots} demonstrations, {shots} were asked for")


def _filled(template: str, fields: Mapping[str, str]) -> str:
    """A template with the row's fields. What stands in a field is text, braces included."""
    return FIELD.sub(lambda found: fields[found[1]], template)


def numbers_of(text: str) -> list[Decimal]:
    """The numbers in a text: `$1,234.50` is 1234.5, `18.00` is 18; `3-5` and `3 - 5` are 3 and 5."""
    return [Decimal(re.sub(r"[,$]", "", found).translate(HYPHENS)) for found in NUMBER.findall(text)]


def as_number(text: str) -> Decimal | None:
    """The number that a text is; None for what is none."""
    return numbers_of(text)[0] if NUMBER.fullmatch(text.strip()) else None


# Files


def file_tasks(folder: Path, faults: Faults, only: str = "") -> list[Task]:
    """The tasks of a folder, by name, or only the one of this name.

    Raises DataError for a malformed row or format, where no test file is found, and for a TASK.yaml without one.
    """
    files = sorted([*folder.glob("*.test.jsonl"), *folder.glob("*.test.jsonl.gz")])
    names = [path.name.removesuffix(".gz").removesuffix(".test.jsonl") for path in files]
    if "" in names:
        raise DataError(f"{folder}: {files[names.index('')].name} has no task's name before .test.jsonl")
    wanted = [only] if only else names
    if not set(wanted) <= set(names):
        raise DataError(f"no folder {folder / only}, and no file {folder / only}.test.jsonl")
    if not files:
        raise DataError(f"{folder}: no file *.test.jsonl")
    for path in sorted(folder.glob("*.yml")):
        raise DataError(f"{path}: a task's format is a file .yaml; rename it")
    for path in sorted([*folder.glob("*.test.json"), *folder.glob("*.train.json")]):
        raise DataError(f"{path}: a task's rows are a file .jsonl, one object a line; rename it")
    for path in sorted(folder.glob("*.yaml")):
        if path.stem not in names:
            raise DataError(f"{path}: there is no {path.stem}.test.jsonl beside it")
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise DataError(f"{folder}: {', '.join(sorted(twice))}: both .test.jsonl and .test.jsonl.gz")
    return [_file_task(name, path, faults) for name, path in zip(names, files, strict=True) if name in wanted]


def training_examples(folder: Path, faults: Faults, only: str = "") -> dict[str, list[Example]]:
    """What a document can be made of, by task, from the training files alone of a folder, or the one of this name.

    Raises DataError for a malformed row or format, and where no training file is found.
    """
    named = glob.escape(only) or "*"
    files = sorted([*folder.glob(f"{named}.train.jsonl"), *folder.glob(f"{named}.train.jsonl.gz")])
    wanted = {path.name.removesuffix(".gz").removesuffix(".train.jsonl"): path for path in files}
    if not wanted:
        raise DataError(f"{folder}: no file {only or '*'}.train.jsonl")
    if len(wanted) < len(files):
        raise DataError(f"{folder}: a task has both .train.jsonl and .train.jsonl.gz")
    found = {}
    for name, path in wanted.items():
        style = _format(path.with_name(f"{name}.yaml"))
        _, rows = _read_checked(path, style, faults)
        found[name] = [
            Example(
                _filled(style.instruction, row.fields) if row.fields["instruction"] else "",
                _filled(style.demonstration, row.fields),
                _filled(style.item, row.fields) + style.delimiter + row.fields["answer"],
            )
            for row in rows
        ]
    return found


def _read_checked(path: Path, style: TaskFormat, faults: Faults) -> tuple[bool, tuple[Row, ...]]:
    """Whether a task's answers are free, by the first row of this file, and the file's good rows."""
    rows = list(read_rows(path, faults))
    free = bool(rows) and "choices" not in rows[0].value and "target" in rows[0].value
    check = partial(_free_fault, style) if free else _choice_fault
    found = _checked(rows, faults, check, _needed(style))
    if not found:
        raise DataError(f"{path}: no good row among {len(rows)}")
    return free, found


def _needed(style: TaskFormat) -> set[str]:
    return {word for text in (style.instruction, style.demonstration, style.item) for word in FIELD.findall(text)}


def _file_task(name: str, path: Path, faults: Faults) -> FileTask:
    style = _format(path.with_name(f"{name}.yaml"))
    free, items = _read_checked(path, style, faults)
    train = [path.with_name(f"{name}.train.jsonl"), path.with_name(f"{name}.train.jsonl.gz")]
    if all(file.exists() for file in train):
        raise DataError(f"{path.parent}: {name}: both .train.jsonl and .train.jsonl.gz")
    found = [row for file in train if file.exists() for row in read_rows(file, faults)]
    if free and style.extract is None:
        numbers = all(as_number(row.fields["answer"]) is not None for row in items)
        style = style.model_copy(update={"extract": "last_number" if numbers else "all"})
    _check_format(style, free, path.with_name(f"{name}.yaml"))
    check = partial(_free_fault, style) if free else _choice_fault
    return FileTask(name, _checked(found, faults, check, _needed(style)), items, style, free)


def _check_format(style: TaskFormat, free: bool, path: Path) -> None:
    """Raises DataError for a format that doesn't fit to the task's kind of answers."""
    if free and style.metric not in (None, "exact_match"):
        raise DataError(f"{path}: metric {style.metric} needs choices, and the answers are free")
    if not free and style.metric == "exact_match":
        raise DataError(f"{path}: exact_match needs free answers (`target`), not choices")
    answers = {"answer", "target", "solution"} if free else {"answer"}
    if not answers.intersection(FIELD.findall(style.demonstration)):
        raise DataError(f"{path}: `demonstration` shows no answer: write {{answer}} where it stands")
    for name in ("instruction", "item"):
        told = sorted(answers.intersection(FIELD.findall(getattr(style, name))))
        if told:
            raise DataError(f"{path}: `{name}` shows {{{told[0]}}}, which gives the answer away")


def _format(path: Path) -> TaskFormat:
    """The format in a task's YAML file; the usual one where there is none."""
    if not path.exists():
        return TaskFormat()
    try:
        value = read_yaml(path, "task's format")
    except RecipeError as error:
        raise DataError(str(error)) from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: must be keys with values, such as `metric: acc_norm`")
    try:
        return TaskFormat.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        told = first["msg"]
        if first["type"] == "extra_forbidden":
            told = f"unknown key (known: {', '.join(TaskFormat.model_fields)})"
        raise DataError(f"{path}: {key + ': ' if key else ''}{told}") from None


def _checked(
    rows: Iterable[reader.Row], faults: Faults, check: Callable[[dict[str, Any]], str], needed: set[str]
) -> tuple[Row, ...]:
    good = []
    for row in rows:
        value = row.value
        fault = check(value)
        fields = {key: text for key, text in value.items() if is_text(text)}
        fields.setdefault("instruction", "")
        if not fault:
            fields["answer"] = value["choices"][value["answer"]] if "choices" in value else value["target"]
            missing = sorted(needed - fields.keys())
            fault = f"no text `{missing[0]}`, which the task's format asks for" if missing else ""
        if fault:
            faults.bad(row.path, row.line, fault)
            continue
        good.append(Row(fields, tuple(value.get("choices", ())), value.get("answer", -1)))
    return tuple(good)


def _common_fault(value: dict[str, Any]) -> str:
    if not is_text(value.get("input")):
        return "`input` must be text"
    return "" if is_text(value.get("instruction", "")) else "`instruction` must be text"


def _free_fault(style: TaskFormat, value: dict[str, Any]) -> str:
    """What is wrong with a row of a task of free answers; empty where nothing is."""
    if "choices" in value:
        return "has `choices`, but the task's first row has a free answer, `target`"
    fault = _common_fault(value)
    if fault:
        return fault
    target: Any = value.get("target")
    if not is_text(target) or not target.strip():
        return "`target` must be text, and not empty"
    without = style.extract in ("number", "last_number") and not numbers_of(target)
    return f"`target` has no number, and the task's format extracts {style.extract}" if without else ""


def _choice_fault(value: dict[str, Any]) -> str:
    """What is wrong with a row of a multiple-choice task; empty where nothing is."""
    fault = _common_fault(value)
    if fault:
        return fault
    choices, answer = value.get("choices"), value.get("answer")
    if not isinstance(choices, list) or not choices or not all(is_text(choice) for choice in choices):
        return "`choices` must be a list of at least one text"
    if not all(choices):
        return "one of the `choices` is empty"
    if len(set(choices)) < len(choices):
        return "two `choices` are equal"
    if type(answer) is not int:
        return "`answer` must be the index of a choice, a whole number"
    return "" if 0 <= answer < len(choices) else f"`answer` is {answer}, but the choices are 0 to {len(choices) - 1}"
