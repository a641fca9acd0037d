"""What is asked, and in which order: pairs of responses, the seeded queue over all prompts, and the repeats.

Which question comes next depends on the pairs, the seed and the answers so far alone, so that a session which was
killed goes on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.data.reader import Faults, Row, read_rows
from rlhf.data.rows import Malformed, to_responses
from rlhf.errors import DataError
from rlhf.tinyworld.words import text_hash

if TYPE_CHECKING:
    from rlhf.label.answers import Answer
    from rlhf.templates import Messages

REPEAT_AFTER = 5  # questions that lie at least between a pair's answer and its repeat, the repeat itself counted


class Pair(NamedTuple):
    """Two different responses to a prompt; `split` is the part of the data that the prompt belongs to."""

    id: str  # a digest of the prompt and the responses, whichever of them comes first
    prompt: Messages
    responses: tuple[str, str]
    split: str

    @classmethod
    def of(cls, prompt: Messages, responses: tuple[str, str], split: str) -> Pair:
        """The pair with its id."""
        return cls(_digest([prompt, sorted(responses)]), prompt, responses, split)


class Question(NamedTuple):
    """A pair as it is shown: `first` is the number of the response that stands above, 0 or 1."""

    pair: Pair
    first: int
    repeat: bool


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def read_pairs(files: Sequence[Path], faults: Faults) -> list[Pair]:
    """Every two different responses of each row's prompt, each pair once. Raises DataError where there is none."""
    found: dict[str, Pair] = {}
    for path in files:
        for row in read_rows(path, faults):
            try:
                pairs = _pairs_of(row)
            except Malformed as fault:
                faults.bad(row.path, row.line, str(fault), row.unit)
                continue
            for pair in pairs:
                found.setdefault(pair.id, pair)
    if not found:
        names = ", ".join(str(path) for path in files)
        raise DataError(f"{names}: no prompt with two different responses. {faults.report()}".rstrip())
    return list(found.values())


def _pairs_of(row: Row) -> list[Pair]:
    prompt, responses = to_responses(row.value)
    split = row.value.get("split") or "train"
    if split not in ("train", "test"):
        raise Malformed(f"`split` is {str(split)[:40]!r}, not train or test")
    return [Pair.of(prompt, two, split) for two in itertools.combinations(dict.fromkeys(responses), 2)]


def in_order(pairs: Sequence[Pair], seed: int) -> list[Pair]:
    """The pairs in random order, but no prompt's second pair before every prompt's first, and so on."""
    groups: dict[str, list[tuple[float, str, Pair]]] = {}
    for pair in pairs:
        place = (text_hash(str(seed), "within", pair.id), pair.id, pair)
        groups.setdefault(_digest(pair.prompt), []).append(place)
    rounds = [
        (number, text_hash(str(seed), "round", name), name, pair)
        for group in groups.values()
        for number, (_, name, pair) in enumerate(sorted(group))
    ]
    return [pair for *_, pair in sorted(rounds)]


def next_question(order: Sequence[Pair], answers: Sequence[Answer], seed: int, repeats: float) -> Question | None:
    """What to ask after these answers, the ones that were taken back left out; None when every pair is answered.

    A share of `repeats` of the questions, at random places, asks again a pair that was answered at least five
    questions before; which response then stands above is drawn anew.
    """
    times = Counter(answer.pair.id for answer in answers)
    pair = next((pair for pair in order if pair.id not in times), None)
    if pair is None:
        return None
    number = str(len(answers))
    again = _answered_before(order, answers, times) if text_hash(str(seed), "repeat", number) < repeats else []
    if again:
        pair = min(again, key=lambda pair: text_hash(str(seed), "which", number, pair.id))
    first = int(text_hash(str(seed), "first", pair.id, str(times[pair.id])) < 0.5)
    return Question(pair, first, bool(again))


def _answered_before(order: Sequence[Pair], answers: Sequence[Answer], times: Counter[str]) -> list[Pair]:
    """The pairs that may be asked again: judged once, long enough ago, and still among those that are compared."""
    known = {pair.id for pair in order}
    long_ago = answers[: max(0, len(answers) - REPEAT_AFTER + 1)]
    return [
        answer.pair
        for answer in long_ago
        if times[answer.pair.id] == 1 and answer.answer != "skip" and answer.pair.id in known
    ]
