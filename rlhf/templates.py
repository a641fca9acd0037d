"""Chat templates: the two that come with the package, and what of a rendered conversation is whose.

A template is rendered twice: once with a mark in place of each content, which shows where the contents stand and what
of the text the assistant writes (the *skeleton*, the same for all conversations of one shape, so it is kept), and once
with the contents. The second must be the first with the contents in place of the marks, some of them trimmed.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from transformers.utils.chat_template_utils import render_jinja_template

from rlhf.errors import UserError

Messages = list[dict[str, str]]

END_OF_TURN = "<|end|>"
CHAT_TEMPLATES = {
    "rlhf": (
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' -%}"
        "{{- '<|assistant|>' -}}{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
        "{%- else -%}{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    ),
    "chatml": (
        "{%- for message in messages -%}"
        "{{- '<|im_start|>' + message['role'] + '\n' -}}"
        "{%- if message['role'] == 'assistant' -%}"
        "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
        "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
        "{{- '\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
    ),
}
TEMPLATE_TOKENS = {
    "rlhf": ("<|system|>", "<|user|>", "<|assistant|>", END_OF_TURN),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
TEMPLATE_END = {"rlhf": END_OF_TURN, "chatml": "<|im_end|>"}


class Piece(NamedTuple):
    """A part of a rendered conversation: text, a special token of the template's own text, or a message's content."""

    kind: Literal["text", "special", "content"]
    text: str
    trained: bool  # whether the assistant writes it


class Skeleton(NamedTuple):
    """A rendered conversation whose contents are left open: the text of such a piece is the message's number."""

    pieces: tuple[Piece, ...]
    fault: str  # why the model couldn't be trained on it; empty where it can


_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = re.compile("\ue000([0-9]+)\ue001")
_TRIMS: tuple[Callable[[str], str], ...] = (
    str,
    str.strip,
    lambda text: text.strip("\n"),
    str.lstrip,
    lambda text: text.lstrip("\n"),
    str.rstrip,
    lambda text: text.rstrip("\n"),
)


def lay_out(
    template: str,
    named: dict[str, Any],
    special: re.Pattern[str],
    messages: Messages,
    *,
    add_generation_prompt: bool = False,
) -> list[Piece]:
    """The pieces of a conversation, in order.

    `named` are the special tokens as the template names them (`eos_token` ...), `special` finds the special tokens in
    the template's own text. What the assistant writes is trained: what stands in the template's `{% generation %}`
    markers; in a template without them, what follows the generation prompt, up to the EOS that ends the turn. Raises
    UserError where that can't be told, where it leaves out EOS, or where the template leaves out or alters contents.
    """
    shape = tuple((message["role"], _open_or_blank(message["content"])) for message in messages)
    skeleton_of = _skeleton.__wrapped__ if "strftime_now" in template else _skeleton  # that one is another every day
    skeleton = skeleton_of(template, json.dumps(named), special, shape, add_generation_prompt)
    if skeleton.fault and not add_generation_prompt:
        raise UserError(skeleton.fault)
    whole, _ = _render(template, named, messages, add_generation_prompt)
    return _filled(skeleton.pieces, whole, messages)


def _open_or_blank(content: str) -> str | None:
    """None stands for any content. A blank one is rendered as it is: templates leave out turns that say nothing."""
    return None if content.strip() else content


def _render(
    template: str, named: dict[str, Any], messages: Messages, add_generation_prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    try:
        rendered, spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=bool(_MARKERS.search(template)),
            add_generation_prompt=add_generation_prompt,
            **named,
        )
    except Exception as error:  # jinja2 raises whatever the template raises
        raise UserError(f"the chat template refuses a conversation: {error}") from None
    return rendered[0], list(spans[0]) if spans else []


def _filled(pieces: Sequence[Piece], whole: str, messages: Messages) -> list[Piece]:
    """The pieces with the contents, trimmed as the template trims them, which together are the rendered text."""
    found: list[Piece] = []
    place = 0
    for number, piece in enumerate(pieces):
        if piece.kind == "content":
            after = pieces[number + 1].text if number + 1 < len(pieces) and pieces[number + 1].kind != "content" else ""
            content = messages[int(piece.text)]["content"]
            variants = (trim(content) for trim in _TRIMS)
            text = next((variant for variant in variants if whole.startswith(variant + after, place)), content)
            piece = piece._replace(text=text)
        found.append(piece)
        place += len(piece.text)
    if "".join(piece.text for piece in found) != whole:
        raise UserError("the chat template alters the contents of messages, so what is trained can't be told exactly")
    return found


# Skeletons


@lru_cache(maxsize=4096)
def _skeleton(
    template: str,
    named: str,
    special: re.Pattern[str],
    shape: tuple[tuple[str, str | None], ...],
    add_generation_prompt: bool,
) -> Skeleton:
    names = json.loads(named)
    messages = [
        {"role": role, "content": f"\ue000{number}\ue001" if blank is None else blank}
        for number, (role, blank) in enumerate(shape)
    ]
    rendered, spans = _render(template, names, messages, add_generation_prompt)
    for number, (role, blank) in enumerate(shape):
        if blank is None and f"\ue000{number}\ue001" not in rendered:
            raise UserError(f"the chat template leaves out what stands in message {number + 1}, the {role}'s")
    turns = _Turns(template, names, special, messages, rendered)
    spans, fault = (spans, turns.fault_of(spans)) if _MARKERS.search(template) else turns.spans()
    return Skeleton(tuple(_cut(rendered, spans, special)), fault)


class _Turns:
    """The assistant's turns in a conversation that was rendered with marks."""

    def __init__(
        self, template: str, named: dict[str, Any], special: re.Pattern[str], messages: Messages, rendered: str
    ) -> None:
        self._template, self._named, self._special = template, named, special
        self._messages, self._rendered = messages, rendered
        self._end: str | None = named.get("eos_token")
        self._marks = [(match.start(), match.end(), int(match[1])) for match in _MARK.finditer(rendered)]

    def _of_assistant(self, number: int) -> bool:
        return self._messages[number]["role"] == "assistant"

    def fault_of(self, spans: list[tuple[int, int]]) -> str:
        """What is wrong with the template's own markers."""
        for start, end, number in self._marks:
            inside = [span for span in spans if span[0] <= start and end <= span[1]]
            if not self._of_assistant(number):
                if inside:
                    return f"the chat template's generation markers hold what the {self._messages[number]['role']} says"
            elif not inside:
                return "the chat template's generation markers leave out an assistant's turn"
            elif not self._end or self._end not in self._rendered[end : inside[0][1]]:
                return (
                    f"the chat template's generation markers leave out the EOS token {self._end!r}, so the model would "
                    "never learn to stop; put it inside {% generation %}" + self._advice(end)
                )
        return ""

    def spans(self) -> tuple[list[tuple[int, int]], str]:
        """For a template without markers: where the assistant writes, and why that can't be told where it can't."""
        found: list[tuple[int, int]] = []
        for number, message in enumerate(self._messages):
            if message["role"] != "assistant":
                continue
            begins = self._beginning(number)
            nowhere = () if begins is None else (begins, begins)  # a blank turn has no mark
            mark = next(((start, end) for start, end, marked in self._marks if marked == number), nowhere)
            if not mark:
                return found, "the chat template doesn't show where a blank turn of the assistant stands"
            content_start, content_end = mark
            end = self._end_after(content_end)
            if end is None:
                return found, (
                    f"the chat template does not end an assistant's turn with the EOS token {self._end!r}, so the "
                    "model would never learn to stop" + self._advice(content_end)
                )
            found.append((content_start if begins is None else min(begins, content_start), end))
        return found, ""

    def _beginning(self, number: int) -> int | None:
        """Where the assistant begins to write this message: after the generation prompt; None if there is none.

        A template may have no such prompt because nothing but a blank stands before the answers.
        """
        if not number:
            return None
        try:
            prompt, plain = (
                _render(self._template, self._named, self._messages[:number], add)[0] for add in (True, False)
            )
        except UserError:
            return None
        if not self._rendered.startswith(prompt):
            return None
        before = _MARK.split(self._rendered[len(prompt) :], maxsplit=1)[0]
        return len(prompt) if prompt != plain or not before.strip() else None

    def _end_after(self, place: int) -> int | None:
        """The end of the EOS that ends the turn whose content ends here: the first special token after it."""
        following = min((start for start, _, _ in self._marks if start >= place), default=len(self._rendered))
        first = self._special.search(self._rendered, place, following)
        return first.end() if first and self._end and first[0].strip() == self._end.strip() else None

    def _advice(self, place: int) -> str:
        """What can be done where the turn whose content ends here isn't ended by EOS."""
        last = max((mark[1] for mark in self._marks if self._of_assistant(mark[2])), default=place)
        likely = next((match[0] for match in self._special.finditer(self._rendered, last) if match[0] != self._end), "")
        if likely:
            return f"; its turns seem to end with {likely.strip()!r}: sft.end_token={likely.strip()!r} makes that EOS"
        return (
            "; sft.end_token names another token that ends them, sft.replace_chat_template=true gives the base the "
            "template that sft.chat_template names"
        )


def _cut(rendered: str, spans: list[tuple[int, int]], special: re.Pattern[str]) -> Iterator[Piece]:
    """The pieces between the borders of marks, special tokens and what is trained."""
    marks = {match.start(): match for match in _MARK.finditer(rendered)}
    tokens = {match.start(): match for match in special.finditer(rendered)}
    borders = {0, len(rendered), *(border for span in spans for border in span)}
    borders |= {border for match in (*marks.values(), *tokens.values()) for border in match.span()}
    ordered = sorted(borders)
    for start, end in itertools.pairwise(ordered):
        trained = any(a <= start and end <= b for a, b in spans)
        if start in marks:
            yield Piece("content", marks[start][1], trained)
        else:
            yield Piece("special" if start in tokens else "text", rendered[start:end], trained)
