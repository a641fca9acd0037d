"""What a person has answered: a log that only grows, each line on the disk before the next question, and what follows
from it: the preference file that the reward stage reads, and how often the person agrees with earlier answers.

    RUN/labels/answers/NAME.jsonl   the log, one line an answer; `undo` takes the last one back
    RUN/labels/NAME.jsonl           prompt, chosen, rejected, split, labeller, source; made from the log
"""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rlhf.data.rows import Malformed, messages_at
from rlhf.errors import DataError, RlhfError, UserError
from rlhf.functional.intervals import Estimate, proportion_estimate
from rlhf.label.pairs import Pair, Question
from rlhf.rundir import sync_folder, write_atomically

ANSWERS = ("1", "2", "tie", "bad", "skip")


class Answer(NamedTuple):
    """What was said of a question: `1` or `2` for the response above or below, `tie`, `bad` (both are) or `skip`."""

    pair: Pair
    first: int  # the number of the response that stood above
    answer: str
    repeat: bool

    @property
    def better(self) -> int | None:
        """The number of the preferred response in the pair; None where neither is."""
        return {"1": self.first, "2": 1 - self.first}.get(self.answer)

    @property
    def verdict(self) -> tuple[str, str]:
        """What was said, with the preferred response, whichever stood above."""
        return (self.answer, "") if self.better is None else ("better", self.pair.responses[self.better])


class AnswerLog:
    """One person's answers. Open it with `with`: nobody else can write them meanwhile."""

    def __init__(self, labels: Path, name: str) -> None:
        """`labels` is the run's folder for them. Raises UserError where another process has this person's log."""
        self.name, self.torn = name, 0
        self.path, self.preferences_file = labels / "answers" / f"{name}.jsonl", labels / f"{name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            self._lock()
            self.answers = self._read()
            self._write_preferences()
        except BaseException:
            os.close(self._file)
            raise
        sync_folder(self.path.parent)

    def __enter__(self) -> "AnswerLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def record(self, question: Question, answer: str, seconds: float) -> None:
        """Adds an answer; it is on the disk, and so is the preference, when this returns."""
        given = Answer(question.pair, question.first, answer, question.repeat)
        self._append(
            {
                "pair": given.pair.id,
                "prompt": given.pair.prompt,
                "responses": given.pair.responses,
                "split": given.pair.split,
                "first": given.first,
                "answer": answer,
                "repeat": given.repeat,
                "seconds": round(seconds, 1),
            }
        )
        self.answers.append(given)
        self._write_preferences()

    def undo(self) -> bool:
        """Takes the last answer back; False where there is none."""
        if not self.answers:
            return False
        self._append({"pair": self.answers[-1].pair.id, "answer": "undo"})
        self.answers.pop()
        self._write_preferences()
        return True

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.name} is labelling already, in another process; end that one, or give another --name"
            ) from None

    def _append(self, line: dict[str, Any]) -> None:
        line["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        size = os.fstat(self._file).st_size
        left = json.dumps(line, ensure_ascii=False).encode() + b"\n"
        try:
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError:  # the disk is full: no half line stays behind
            os.ftruncate(self._file, size)
            raise

    def _read(self) -> list[Answer]:
        """The answers that hold. A last line that was cut short (the process was killed) is taken off the file."""
        with self.path.open("rb") as file:
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self.torn = len(data) - whole
        if self.torn:
            os.ftruncate(self._file, whole)
            os.fsync(self._file)
        found: list[Answer] = []
        for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
            try:
                answer = _parsed(line)
            except (ValueError, RecursionError, KeyError, TypeError, Malformed) as fault:
                raise DataError(
                    f"{self.path}, line {number}: not an answer of `rlhf label` ({fault}); mend or remove the line"
                ) from None
            if answer:
                found.append(answer)
            elif found:
                found.pop()
        return found

    def _write_preferences(self) -> None:
        """The preferences of all first answers. Written anew as a whole, so that no reader finds half a line.

        Raises RlhfError, saying that no answer is lost, where there is no room for them.
        """
        source = f"person:{self.name}"
        lines = [
            json.dumps({**row, "labeller": self.name, "source": source}, ensure_ascii=False) + "\n"
            for row in preferences(self.answers)
        ]
        try:
            if lines:
                write_atomically(self.preferences_file, "".join(lines))
            else:
                self.preferences_file.unlink(missing_ok=True)
        except OSError as error:
            raise RlhfError(
                f"{self.preferences_file} can't be written: {error.strerror}. Every answer, the last one too, is kept "
                f"in {self.path}: free some space and give the same command again, which makes the file from it"
            ) from None


def _parsed(line: bytes) -> Answer | None:
    """The answer in a line of the log; None for an undo."""
    value = json.loads(line)
    if value["answer"] == "undo":
        return None
    one, two = value["responses"]
    pair = Pair.of(messages_at(value["prompt"], "prompt"), (one, two), value["split"])
    answer = Answer(pair, value["first"], value["answer"], value["repeat"])
    if not isinstance(one, str) or not isinstance(two, str):
        raise Malformed("`responses` are not two texts")
    if answer.answer not in ANSWERS or answer.first not in (0, 1):
        raise Malformed("an unknown `answer` or `first`")
    return answer


def preferences(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """A row of TRL's shape for each pair whose first answer prefers one of its responses."""
    seen: set[str] = set()
    rows = []
    for answer in answers:
        new = answer.pair.id not in seen
        seen.add(answer.pair.id)
        if new and answer.better is not None:
            chosen, rejected = answer.pair.responses[answer.better], answer.pair.responses[1 - answer.better]
            rows.append(
                {"prompt": answer.pair.prompt, "chosen": chosen, "rejected": rejected, "split": answer.pair.split}
            )
    return rows


class Tally(NamedTuple):
    """How often each thing was said of a pair at first, and how often a repeat was answered as the pair had been."""

    preferences: int
    ties: int
    both_bad: int
    skipped: int
    repeats: int
    agreeing: int

    @property
    def agreement(self) -> Estimate | None:
        """The share of repeats that agree, with its 95 % interval; None before the first one."""
        return proportion_estimate(self.agreeing, self.repeats) if self.repeats else None


def tally(answers: Sequence[Answer]) -> Tally:
    """The figures of a person's answers. A repeat that was skipped is no trial of agreement."""
    first: dict[str, Answer] = {}
    trials = []
    for answer in answers:
        earlier = first.setdefault(answer.pair.id, answer)
        if earlier is not answer and "skip" not in (earlier.answer, answer.answer):
            trials.append(earlier.verdict == answer.verdict)
    counts = Counter("preferred" if answer.better is not None else answer.answer for answer in first.values())
    return Tally(
        counts["preferred"], counts["tie"], counts["bad"], counts["skip"], repeats=len(trials), agreeing=sum(trials)
    )
