"""Rows to what a stage learns from: texts, conversations, comparisons, prompts. TRL's formats, checked field by field.

A `Malformed` error inside a converter becomes the fault of that row. Imports nothing heavy.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:  # what it stands for is a list of dictionaries; the module behind it imports transformers
    from rlhf.templates import Messages

Kind = Literal["texts", "conversations", "prompts", "comparisons"]
ROLES = ("system", "user", "assistant")


class Malformed(Exception):
    """A row lacks something or has something of the wrong kind; the text says what."""


class Comparison(NamedTuple):
    """Two responses to one prompt, the better one first; gold rewards where the truth is known.

    `margin` is by how much the chosen one should win, in units of score. `weight` is what the comparison counts in the
    loss: 1 / (K choose 2) for each of those that a ranking of K gives, as in InstructGPT (arXiv:2203.02155, eq. 1).
    """

    prompt: Messages
    chosen: str
    rejected: str
    gold_chosen: float | None = None
    gold_rejected: float | None = None
    source: str = ""
    margin: float = 0.0
    weight: float = 1.0


def to_text(row: dict[str, Any]) -> str:
    """A document: `text`. Conversations and comparisons count as the text of all their messages."""
    if "text" in row:
        return text_at(row, "text", "the row")
    if "messages" in row or "completion" in row:
        return "\n".join(message["content"] for message in to_conversation(row))
    if "chosen" in row or "responses" in row:
        prompt, responses = to_responses(row)
        return "\n".join([*(message["content"] for message in prompt), *dict.fromkeys(responses)])
    raise Malformed("no `text` (nor `messages`, nor `prompt`)")


def to_conversation(row: dict[str, Any]) -> Messages:
    """A conversation that ends with the assistant: `messages`, or `prompt` and `completion`.

    Of a comparison it is the prompt with the better response.
    """
    if "messages" in row:
        messages = messages_at(row["messages"], "messages")
    elif {"chosen", "rejected"} <= row.keys() and "completion" not in row:
        row = _with_prompt_apart(row)
        messages = [*_prompt(row), {"role": "assistant", "content": _response(row, "chosen")}]
    elif "prompt" in row or "completion" in row:
        messages = [*_prompt(row), {"role": "assistant", "content": _response(row, "completion")}]
    else:
        raise Malformed("no `messages` (nor `prompt` with `completion`)")
    if not any(message["role"] == "assistant" for message in messages):
        raise Malformed("no assistant turn to learn from")
    if messages[-1]["role"] != "assistant":
        raise Malformed("the last message is not the assistant's")
    if not messages[-1]["content"].strip():
        raise Malformed("the last answer is empty")
    _check_order(messages)
    return messages


def to_comparisons(row: dict[str, Any]) -> list[Comparison]:
    """The comparisons of a row: one of `chosen` and `rejected`, or all those that a ranking of `responses` gives.

    `gold_chosen`, `gold_rejected`, `margin`, `weight` and `source` are taken where they stand there.
    """
    prompt, responses = to_responses(row)
    if "chosen" not in row:
        return _ranked(row, prompt, responses)
    chosen, rejected = responses
    if chosen == rejected:
        raise Malformed("chosen and rejected are equal")
    gold = [_known(row, key) for key in ("gold_chosen", "gold_rejected")]
    return [Comparison(prompt, chosen, rejected, gold[0], gold[1], _source(row), _margin(row), _weight(row))]


def to_responses(row: dict[str, Any]) -> tuple[Messages, list[str]]:
    """A prompt and its responses, at least two: `chosen` and `rejected`, or those of `responses`."""
    row = _with_prompt_apart(row)
    prompt = _prompt(row)
    if "chosen" in row or "responses" not in row:
        return prompt, [_response(row, "chosen"), _response(row, "rejected")]
    responses = row["responses"]
    if not isinstance(responses, list):
        raise Malformed(f"`responses` must be a list, not {type(responses).__name__}")
    if len(responses) < 2:
        raise Malformed(f"`responses` has {len(responses)}, and two are the least that can be compared")
    named = {f"responses[{number}]": response for number, response in enumerate(responses)}
    return prompt, [_response(named, key) for key in named]


def _ranked(row: dict[str, Any], prompt: Messages, responses: list[str]) -> list[Comparison]:
    """Every two responses of a ranking that differ in text and rank, weighted as InstructGPT's eq. 1 has it.

    `ranks` (lower is better), `scores` (higher is better) or `ranking` (the responses' numbers from 0, best first).
    """
    ranks = _ranks(row, len(responses))
    gold = [None] * len(responses) if row.get("gold") is None else _numbers(row, "gold", len(responses))
    weight = _weight(row) / math.comb(len(responses), 2)
    found = []
    for pair in itertools.combinations(range(len(responses)), 2):
        better, worse = sorted(pair, key=lambda i: ranks[i])
        if ranks[better] == ranks[worse] or responses[better] == responses[worse]:
            continue
        texts, golds = (responses[better], responses[worse]), (gold[better], gold[worse])
        found.append(Comparison(prompt, *texts, *golds, _source(row), _margin(row), weight))
    if not found:
        raise Malformed("no two different responses have different ranks, so there is nothing to compare")
    return found


def _ranks(row: dict[str, Any], count: int) -> list[float]:
    """A number for each response, lower is better."""
    given = [key for key in ("ranks", "ranking", "scores") if row.get(key) is not None]
    if not given:
        raise Malformed("`responses` without `ranks` (nor `ranking`, nor `scores`)")
    if len(given) > 1:
        raise Malformed(f"`{given[0]}` and `{given[1]}` both order the responses; one of them can")
    key = given[0]
    numbers = _numbers(row, key, count)
    if key == "scores":
        return [-score for score in numbers]
    if key == "ranks":
        return numbers
    if sorted(numbers) != list(range(count)):
        raise Malformed(f"`ranking` must hold each number from 0 to {count - 1} once, the best response's first")
    return [float(numbers.index(response)) for response in range(count)]


def _numbers(row: dict[str, Any], key: str, count: int) -> list[float]:
    values = row[key]
    if not isinstance(values, list) or len(values) != count:
        what = f"{len(values)} entries" if isinstance(values, list) else type(values).__name__
        raise Malformed(f"`{key}` must be a list of {count} numbers, one for each response, not {what}")
    return [_number(value, f"`{key}`") for value in values]


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise Malformed(f"{where} holds {str(value)[:40]!r}, which is no finite number")
    return float(value)


def _known(row: dict[str, Any], key: str) -> float | None:
    """The number under a key, None where there is none or null (a column of Parquet has a value in every row)."""
    return None if row.get(key) is None else _number(row[key], f"`{key}`")


def _margin(row: dict[str, Any]) -> float:
    margin = _known(row, "margin") or 0.0
    if margin < 0:
        raise Malformed(f"`margin` is {margin:g}; by how much the better one wins can't be less than 0")
    return margin


def _weight(row: dict[str, Any]) -> float:
    known = _known(row, "weight")
    weight = 1.0 if known is None else known
    if weight <= 0:
        raise Malformed(f"`weight` is {weight:g}; what a comparison counts must be more than 0")
    return weight


def _source(row: dict[str, Any]) -> str:
    return str(row.get("source") or "")


def to_prompt(row: dict[str, Any]) -> Messages:
    """`prompt` as text or messages that end with the user; of a conversation, what stands before its last answer."""
    if "prompt" not in row and "messages" in row:
        return to_conversation(row)[:-1]
    return _prompt(_with_prompt_apart(row))


def _with_prompt_apart(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose `chosen` and `rejected` are whole conversations, with their common beginning as its prompt.

    TRL calls that prompt implicit. Where the row has a `prompt` too, as text or messages, it must be that beginning, or
    the last message of it.
    """
    sides = [row.get("chosen"), row.get("rejected")]
    if not all(isinstance(side, list) and len(side) > 1 for side in sides):
        return row
    chosen, rejected = (messages_at(side, key) for side, key in zip(sides, ("chosen", "rejected"), strict=True))
    prompt = chosen[:-1]
    if prompt != rejected[:-1]:
        raise Malformed("`chosen` and `rejected` are conversations that differ before their last messages")
    given = row.get("prompt")
    if isinstance(given, str) and given != prompt[-1]["content"]:
        raise Malformed("`prompt` is not what the conversations in `chosen` and `rejected` answer")
    if isinstance(given, list) and messages_at(given, "prompt") != prompt:
        raise Malformed("`prompt` is not the beginning of the conversations in `chosen` and `rejected`")
    return {**row, "prompt": prompt, "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _prompt(row: dict[str, Any]) -> Messages:
    if "prompt" not in row:
        raise Malformed("no `prompt`")
    if isinstance(row["prompt"], str):
        messages = [{"role": "user", "content": text_at(row, "prompt", "the row")}]
    else:
        messages = messages_at(row["prompt"], "prompt")
    if messages[-1]["role"] != "user":
        raise Malformed("the prompt does not end with the user")
    if not messages[-1]["content"].strip():
        raise Malformed("the prompt is empty")
    _check_order(messages)
    return messages


def _response(row: dict[str, Any], key: str) -> str:
    """One response: text, or a list of exactly one assistant message."""
    if key not in row:
        raise Malformed(f"no `{key}`")
    if isinstance(row[key], str):
        return text_at(row, key, "the row")
    messages = messages_at(row[key], key)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise Malformed(f"`{key}` must be text or one assistant message")
    return messages[0]["content"]


def messages_at(value: Any, key: str) -> Messages:
    """A list of messages with known roles; `key` names it in faults."""
    if not isinstance(value, list):
        raise Malformed(f"`{key}` must be a list of messages, not {type(value).__name__}")
    if not value:
        raise Malformed(f"`{key}` has no message")
    messages = []
    for number, message in enumerate(value, 1):
        where = f"message {number} of `{key}`"
        if not isinstance(message, dict):
            raise Malformed(f"{where} is not an object")
        role = text_at(message, "role", where)
        if role not in ROLES:
            raise Malformed(f"{where} has the unknown role {role!r} (known: {', '.join(ROLES)})")
        messages.append({"role": role, "content": text_at(message, "content", where)})
    return messages


def _check_order(messages: Messages) -> None:
    """At most one system turn, at the beginning; then user and assistant in turn."""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for number, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise Malformed("the turns must alternate between user and assistant, after at most one system turn")


def is_text(value: Any) -> bool:
    """Whether a value is a string that can be written as UTF-8 (one with a lone surrogate can't)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def text_at(holder: dict[str, Any], key: str, where: str) -> str:
    """The text under a key; `where` names the holder in faults."""
    if key not in holder:
        raise Malformed(f"{where} has no `{key}`")
    value = holder[key]
    if not isinstance(value, str):
        raise Malformed(f"`{key}` of {where} must be text, not {type(value).__name__}")
    if not is_text(value):
        raise Malformed(f"`{key}` of {where} holds a lone surrogate, which is no text")
    return value


# What a row of each kind gives
CONVERTERS: dict[Kind, Callable[[dict[str, Any]], list[Any]]] = {
    "texts": lambda row: [to_text(row)],
    "conversations": lambda row: [to_conversation(row)],
    "prompts": lambda row: [to_prompt(row)],
    "comparisons": to_comparisons,
}
