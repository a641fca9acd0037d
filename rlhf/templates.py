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
Span = tuple[int, int]

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
    the template's own text. What the assistant writes is trained: what follows the generation prompt, up to the EOS
    that ends the turn; of that, where the template has `{% generation %}` markers, only what stands in them. Raises
    UserError where that can't be told, where it leaves out EOS, or where the template leaves out or alters contents.
    """
    shape = tuple((message["role"], _open_or_blank(message["content"])) for message in messages)
    skeleton_of = _skeleton.__wrapped__ if "strftime_now" in template else _skeleton  # that one is another every day
    skeleton = skeleton_of(template, json.dumps(named), special, shape, add_generation_prompt)
    if skeleton.fault and not add_generation_prompt:
        raise UserError(skeleton.fault)
    whole, marked = _render(template, named, messages, add_generation_prompt)
    pieces = _filled(skeleton.pieces, whole, messages)
    if marked is not None and not add_generation_prompt:
        _check_marked(pieces, marked)
    return pieces


def marked_text(template: str, named: dict[str, Any], messages: Messages) -> str:
    """What of a rendered conversation stands in the template's own generation markers; nothing where it has none."""
    whole, marked = _render(template, named, messages, add_generation_prompt=False)
    return "".join(whole[start:end] for start, end in marked or [])


def surroundings(template: str, named: dict[str, Any]) -> str:
    """What a template writes around what is said, a system turn and the next generation prompt included."""
    said = [{"role": role, "content": "\ue000"} for role in ("system", "user", "assistant", "user")]
    for messages in (said, said[1:]):
        try:
            return _render(template, named, messages, add_generation_prompt=True)[0]
        except UserError:  # not every template has a system turn
            continue
    return ""


def _open_or_blank(content: str) -> str | None:
    """None stands for any content. A blank one is rendered as it is: templates leave out turns that say nothing."""
    return None if content.strip() else content


def _render(
    template: str, named: dict[str, Any], messages: Messages, add_generation_prompt: bool
) -> tuple[str, list[Span] | None]:
    """The text, and what of it stands in the template's generation markers; None where it has none."""
    marked = bool(_MARKERS.search(template))
    try:
        rendered, spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            **named,
        )
    except Exception as error:  # jinja2 raises whatever the template raises
        raise UserError(f"the chat template refuses a conversation: {error}") from None
    return rendered[0], list(spans[0]) if marked else None


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


def _check_marked(pieces: Sequence[Piece], marked: list[Span]) -> None:
    """Markers may come and go with what is said, which the skeleton doesn't show."""
    place = 0
    for piece in pieces:
        start, place = place, place + len(piece.text)
        if piece.trained and not _within((start, place), marked):
            raise UserError(
                "the chat template's generation markers leave out an assistant's turn because of what is said in the "
                "conversation, so it can't be learned from"
            )


def _within(span: Span, spans: list[Span]) -> Span | None:
    """The one of these spans that holds all of this one."""
    return next(((start, end) for start, end in spans if start <= span[0] and span[1] <= end), None)


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
    rendered, marked = _render(template, names, messages, add_generation_prompt)
    for number, (role, blank) in enumerate(shape):
        if blank is None and f"\ue000{number}\ue001" not in rendered:
            raise UserError(f"the chat template leaves out what stands in message {number + 1}, the {role}'s")
    try:
        spans, fault = _Turns(template, names, special, messages, rendered).spans(marked), ""
    except UserError as error:
        spans, fault = [], str(error)
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

    def spans(self, marked: list[Span] | None) -> list[Span]:
        """Where the assistant writes; `marked` are the template's markers. Raises UserError where that isn't told."""
        if marked is not None:
            self._check(marked)
        return [self._span(number, marked) for number in range(len(self._messages)) if self._of_assistant(number)]

    def _check(self, marked: list[Span]) -> None:
        """The template's own markers must hold the contents of the assistant, all of them, and nobody else's."""
        for start, end, number in self._marks:
            held = _within((start, end), marked) is not None
            if held and not self._of_assistant(number):
                role = self._messages[number]["role"]
                raise UserError(f"the chat template's generation markers hold what the {role} says")
            if self._of_assistant(number) and not held:
                raise UserError("the chat template's generation markers leave out an assistant's turn")

    def _span(self, number: int, marked: list[Span] | None) -> Span:
        """What the assistant writes of a message: its content and end token, and what else follows the prompt."""
        begins = self._beginning(number)
        mark = next(((start, end) for start, end, of in self._marks if of == number), None)
        content = mark or (None if begins is None else (begins, begins))  # a blank turn has no mark
        holder = (0, len(self._rendered)) if marked is None or content is None else _within(content, marked)
        if content is None or holder is None:
            raise UserError(
                f"message {number + 1}, the assistant's, is blank, and the chat template leaves it out or doesn't show "
                "where it stands"
            )
        end = self._end_after(content[1]) if marked is None else self._end_within(content[1], holder[1])
        if end is None and mark is None:
            raise UserError(
                f"message {number + 1}, the assistant's, is blank, and the chat template doesn't end such a turn with "
                f"the EOS token {self._end!r}"
            )
        if end is None:
            raise UserError(self._endless(content[1], marked is not None))
        return max(holder[0], content[0] if begins is None else min(begins, content[0])), end

    def _endless(self, place: int, marked: bool) -> str:
        """What is wrong where no EOS ends the turn whose content ends here."""
        never = f"the EOS token {self._end!r}, so the model would never learn to stop"
        if marked:
            never = f"the chat template's generation markers leave out {never}; put it inside {{% generation %}}"
        else:
            never = f"the chat template does not end an assistant's turn with {never}"
        return never + self._advice(place)

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
        return first.end() if first and self._is_end(first[0]) else None

    def _end_within(self, place: int, border: int) -> int | None:
        """The end of the first EOS between a turn's content and the border of the markers that hold it."""
        tokens = self._special.finditer(self._rendered, place, border)
        return next((token.end() for token in tokens if self._is_end(token[0])), None)

    def _is_end(self, token: str) -> bool:
        return self._end is not None and token.strip() == self._end.strip()

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


def _cut(rendered: str, spans: list[Span], special: re.Pattern[str]) -> Iterator[Piece]:
    """The pieces between the borders of marks, special tokens and what is trained."""
    marks = {match.start(): match for match in _MARK.finditer(rendered)}
    tokens = {match.start(): match for match in special.finditer(rendered)}
    borders = {0, len(rendered), *(border for span in spans for border in span)}
    borders |= {border for match in (*marks.values(), *tokens.values()) for border in match.span()}
    ordered = sorted(borders)
    for start, end in itertools.pairwise(ordered):
        trained = _within((start, end), spans) is not None
        if start in marks:
            yield Piece("content", marks[start][1], trained)
        else:
            yield Piece("special" if start in tokens else "text", rendered[start:end], trained)
