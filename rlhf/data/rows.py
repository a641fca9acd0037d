"""Rows to what a stage learns from: texts, conversations, comparisons, prompts. TRL's formats, checked field by field.

A `Malformed` error inside a converter becomes the fault of that row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from rlhf.tokenizer import Messages

T = TypeVar("T")

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


Converter = Callable[[dict[str, Any]], T]


def to_text(row: dict[str, Any]) -> str:
    """A document: `text`. Conversations and comparisons count as the text of all their messages."""
    if "text" in row:
        return _string(row, "text", "the row")
    if "messages" in row or "completion" in row:
        return "\n".join(message["content"] for message in to_conversation(row))
    if "chosen" in row:
        comparison = to_comparison(row)
        return "\n".join([*(m["content"] for m in comparison.prompt), comparison.chosen, comparison.rejected])
    raise Malformed("no `text` (nor `messages`, nor `prompt`)")


def to_conversation(row: dict[str, Any]) -> Messages:
    """A conversation that ends with the assistant: `messages`, or `prompt` and `completion`."""
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
    elif "prompt" in row or "completion" in row:
        messages = [*_prompt(row), {"role": "assistant", "content": _response(row, "completion")}]
    else:
        raise Malformed("no `messages` (nor `prompt` with `completion`)")
    if not any(message["role"] == "assistant" for message in messages):
        raise Malformed("no assistant turn to learn from")
    if messages[-1]["role"] != "assistant":
        raise Malformed("the last message is not the assistant's")
    if not messages[-1]["content"]:
        raise Malformed("the last answer is empty")
    _check_order(messages)
    return messages


def to_comparison(row: dict[str, Any]) -> Comparison:
    """`prompt`, `chosen` and `rejected`, as text or messages. Equal responses compare nothing and are refused."""
    prompt = _prompt(row)
    chosen, rejected = _response(row, "chosen"), _response(row, "rejected")
    if chosen == rejected:
        raise Malformed("chosen and rejected are equal")
    gold = [row.get(key) for key in ("gold_chosen", "gold_rejected")]
    known = [float(value) if isinstance(value, int | float) else None for value in gold]
    return Comparison(prompt, chosen, rejected, known[0], known[1], str(row.get("source", "")))


def to_prompt(row: dict[str, Any]) -> Messages:
    """`prompt` as text or messages that end with the user."""
    return _prompt(row)


def _prompt(row: dict[str, Any]) -> Messages:
    if "prompt" not in row:
        raise Malformed("no `prompt`")
    if isinstance(row["prompt"], str):
        messages = [{"role": "user", "content": _string(row, "prompt", "the row")}]
    else:
        messages = _messages(row["prompt"], "prompt")
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
        return _string(row, key, "the row")
    messages = _messages(row[key], key)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise Malformed(f"`{key}` must be text or one assistant message")
    return messages[0]["content"]


def _messages(value: Any, key: str) -> Messages:
    if not isinstance(value, list):
        raise Malformed(f"`{key}` must be a list of messages, not {type(value).__name__}")
    if not value:
        raise Malformed(f"`{key}` has no message")
    messages = []
    for number, message in enumerate(value, 1):
        where = f"message {number} of `{key}`"
        if not isinstance(message, dict):
            raise Malformed(f"{where} is not an object")
        role = _string(message, "role", where)
        if role not in ROLES:
            raise Malformed(f"{where} has the unknown role {role!r} (known: {', '.join(ROLES)})")
        messages.append({"role": role, "content": _string(message, "content", where)})
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


def _string(holder: dict[str, Any], key: str, where: str) -> str:
    if key not in holder:
        raise Malformed(f"{where} has no `{key}`")
    value = holder[key]
    if not isinstance(value, str):
        raise Malformed(f"`{key}` of {where} must be text, not {type(value).__name__}")
    if not is_text(value):
        raise Malformed(f"`{key}` of {where} holds a lone surrogate, which is no text")
    return value
