"""The common shapes of rows besides TRL's, each turned into TRL's: Alpaca, ShareGPT, ChatML, HH. Imports nothing heavy.

    alpaca      instruction, input (optional), output; system and history ([[user, assistant], ...]) optional;
                comparisons: instruction, input, chosen, rejected
    sharegpt    conversations: [{from: human | user | gpt | assistant | chatgpt | system, value}, ...]; system optional;
                comparisons: conversations, chosen, rejected ({from, value} or text)
    chatml      messages, conversations or conversation: [{role, content}, ...], or text with
                <|im_start|>role\\n...<|im_end|>; system optional;
                comparisons: that, and chosen, rejected ({role, content} or text)
    hh          Anthropic/hh-rlhf: chosen, rejected: whole dialogues, each a text of turns that begin with
                "\\n\\nHuman: " or "\\n\\nAssistant: "; as a conversation, the chosen one

In each, a comparison may also be a ranking (`responses`), and a prompt is what stands before the last answer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from rlhf.data.rows import CONVERTERS, Kind, Malformed, messages_at, text_at

if TYPE_CHECKING:
    from rlhf.templates import Messages

Shape = Literal["trl", "alpaca", "sharegpt", "chatml", "hh"]

_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
}
_KEPT = {
    "responses",
    "ranks",
    "ranking",
    "scores",
    "gold",
    "gold_chosen",
    "gold_rejected",
    "margin",
    "weight",
    "source",
}

_HAVE: dict[Kind, str] = {
    "texts": "texts have `text`",
    "conversations": "conversations have `messages`, or `prompt` and `completion`",
    "prompts": "prompts have `prompt`, or are those of conversations or comparisons",
    "comparisons": "comparisons have `prompt`, `chosen` and `rejected`, or `prompt`, `responses` and `ranks`",
}


def to_items(row: dict[str, Any], shape: Shape, kind: Kind) -> list[Any]:
    """What a row of this shape gives a stage: one text, conversation or prompt, or one or several comparisons.

    Raises Malformed; where a row is none of TRL's but has another shape, it says which `format` would read it, and
    where it lacks what it needs, what it has.
    """
    if shape != "trl":
        return CONVERTERS[kind](to_trl(row, shape, kind))
    try:
        return CONVERTERS[kind](row)
    except Malformed as fault:
        raise Malformed(f"{fault}{_hint(str(fault), row, kind)}") from None


def _hint(fault: str, row: dict[str, Any], kind: Kind) -> str:
    others: tuple[Shape, ...] = ("alpaca", "sharegpt", "chatml", "hh")
    for shape in others:
        try:
            CONVERTERS[kind](to_trl(row, shape, kind))
        except Malformed:
            continue
        return f"; `format: {shape}` would read it"
    if not fault.startswith("no `") or not row:
        return ""
    names = ", ".join(f"`{name[:40]}`" for name in list(row)[:10])
    return f"; the row has {names}{', ...' if len(row) > 10 else ''}, and {_HAVE[kind]}"


def to_trl(row: dict[str, Any], shape: Shape, kind: Kind) -> dict[str, Any]:
    """The row in TRL's shape, as `kind` needs it. Raises Malformed where it hasn't the shape that it should have."""
    if shape == "trl":
        return row
    if shape == "hh":
        return _hh(row, kind)
    if kind == "texts":
        kind = "comparisons" if {"chosen", "responses"} & row.keys() else "conversations"
    turns = {"alpaca": _alpaca, "sharegpt": _sharegpt, "chatml": _chatml}[shape](row)
    if kind == "comparisons":
        found: dict[str, Any] = {key: value for key, value in row.items() if key in _KEPT}
        found |= {key: _answer(row[key], shape, key) for key in ("chosen", "rejected") if key in row}
        if isinstance(found.get("responses"), list):
            found["responses"] = [_answer(response, shape, "responses") for response in found["responses"]]
        return {**found, "prompt": turns}
    if shape == "alpaca" and kind == "conversations":
        turns.append({"role": "assistant", "content": _alpaca_text(row, "output")})
    if kind == "prompts":
        return {"prompt": turns[:-1] if turns[-1]["role"] == "assistant" else turns}
    return {"messages": turns}


def _alpaca(row: dict[str, Any]) -> Messages:
    """The turns before the answer."""
    turns = _system(row)
    history = row.get("history") or []
    if not isinstance(history, list):
        raise Malformed(f"`history` must be a list of [user, assistant], not {type(history).__name__}")
    for number, exchange in enumerate(history, 1):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise Malformed(f"exchange {number} of `history` is not [user, assistant]")
        for role, text in zip(("user", "assistant"), exchange, strict=True):
            turns.append({"role": role, "content": text_at({role: text}, role, f"exchange {number} of `history`")})
    asked = [_alpaca_text(row, "instruction"), _optional(row, "input")]
    if not any(asked):
        raise Malformed("`instruction` is empty")
    return [*turns, {"role": "user", "content": "\n\n".join(filter(None, asked))}]


def _alpaca_text(row: dict[str, Any], key: str) -> str:
    if row.get(key) is None:
        raise Malformed(f"no `{key}`, which a row of `format: alpaca` has")
    return text_at(row, key, "the row")


def _sharegpt(row: dict[str, Any]) -> Messages:
    """All turns."""
    turns = _system(row)
    given = row.get("conversations")
    if given is None:
        raise Malformed("no `conversations`, which a row of `format: sharegpt` has")
    if not isinstance(given, list) or not given:
        raise Malformed("`conversations` must be a list of turns, at least one")
    return [*turns, *(_said(turn, f"turn {number} of `conversations`") for number, turn in enumerate(given, 1))]


def _said(turn: Any, where: str) -> dict[str, str]:
    """A message from {from, value}."""
    if not isinstance(turn, dict):
        raise Malformed(f"{where} is not an object")
    speaker = text_at(turn, "from", where)
    if speaker not in _SPEAKERS:
        raise Malformed(f"{where} is from the unknown {speaker[:40]!r} (known: {', '.join(_SPEAKERS)})")
    return {"role": _SPEAKERS[speaker], "content": text_at(turn, "value", where)}


def _chatml(row: dict[str, Any]) -> Messages:
    """All turns."""
    turns = _system(row)
    for key in ("messages", "conversations", "conversation"):
        if row.get(key) is not None:
            return [*turns, *messages_at(row[key], key)]
    if row.get("text") is None:
        raise Malformed("no `messages` (nor `conversations`, `conversation`, `text`), as a row of `format: chatml` has")
    return [*turns, *messages_at(_marked_up(text_at(row, "text", "the row")), "text")]


def _marked_up(text: str) -> Messages:
    """The turns of a text that holds them as <|im_start|>role, a line end, the content, <|im_end|>."""
    before, *turns = text.split("<|im_start|>")
    found = []
    for turn in turns:
        role, newline, rest = turn.partition("\n")
        content, end, after = rest.partition("<|im_end|>")
        if not newline or not end or after.strip():
            break
        found.append({"role": role.strip(), "content": content})
    if before.strip() or not turns or len(found) < len(turns):
        raise Malformed("`text` is not turns of <|im_start|>role, a line end, the content and <|im_end|>, and no more")
    return found


_HH_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _hh(row: dict[str, Any], kind: Kind) -> dict[str, Any]:
    """The row in TRL's shape; the prompt of a comparison is what both dialogues begin with."""
    if row.get("chosen") is None:
        raise Malformed("no `chosen`, which a row of `format: hh` has")
    chosen = _dialogue(row, "chosen")
    if kind == "conversations":
        return {"messages": chosen}
    if kind == "prompts":
        return {"prompt": chosen[:-1] if chosen[-1]["role"] == "assistant" else chosen}
    found: dict[str, Any] = {key: value for key, value in row.items() if key in _KEPT}
    return {**found, "chosen": chosen, "rejected": _dialogue(row, "rejected")}


def _dialogue(row: dict[str, Any], key: str) -> Messages:
    """The turns of a text in which each begins with a blank line and Human: or Assistant:."""
    before, *turns = _HH_TURN.split(text_at(row, key, "the row"))
    if before.strip() or len(turns) < 4:
        raise Malformed(f"`{key}` is not turns that begin with a blank line and Human: or Assistant:, at least two")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)]


def _answer(value: Any, shape: Shape, key: str) -> Any:
    """A response as TRL has it, text or a list of one message, from text, one message or a list of it."""
    if isinstance(value, dict):
        value = [value]
    if shape == "sharegpt" and isinstance(value, list):
        return [_said(turn, f"`{key}`") for turn in value]
    return value


def _system(row: dict[str, Any]) -> Messages:
    """The system turn of the row's `system`, where it has one."""
    text = _optional(row, "system")
    return [{"role": "system", "content": text}] if text else []


def _optional(row: dict[str, Any], key: str) -> str:
    """The text under a key, empty where it is missing or null."""
    return text_at(row, key, "the row") if row.get(key) is not None else ""
