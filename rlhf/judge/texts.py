"""Conversations as a classifier of its own tokenizer reads them: through a chat template, or as a pair of texts.

Text that looks like a special token stays text. What is too long loses the start of the prompt.
"""

import re
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.judge.batches import Row
from rlhf.tokenizer import Messages, encode_chat, encode_texts

KEPT, PROMPT, RESPONSE = range(3)  # what a token is: always there, or cut where the conversation is too long

_EDGE = "\u205f"  # a blank that no template writes by itself, so that one shows whether it trims the contents
_MARK = re.compile(f"({_EDGE}?)\ue000([0-9]+)\ue001({_EDGE}?)")


class Reading(NamedTuple):
    """A conversation as tokens, and what each is."""

    row: Row
    kinds: list[int]


def read_through_template(tokenizer: PreTrainedTokenizerBase, prompt: Messages, response: str) -> Reading:
    """The conversation through the tokenizer's chat template, tokenised as our own models' training is.

    What can't be trained on can still be judged: a template in which no EOS ends a turn, a response on whose contents
    it acts, one that is empty. Raises UserError where the template refuses the turns, or leaves the response out.
    """
    messages = [*prompt, {"role": "assistant", "content": response}]
    try:
        ids = encode_chat(tokenizer, messages).ids
    except UserError:
        ids = _encode_by_marks(tokenizer, messages)
    begins = ids[:1] == [tokenizer.bos_token_id]  # the response stands last, so it is the last to be cut
    return Reading(Row(ids), [KEPT] * begins + [PROMPT] * (len(ids) - begins))


def _encode_by_marks(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The template is rendered with marks in the contents' places, so it can't act on them but to trim them."""
    marked = [{**message, "content": f"{_EDGE}\ue000{i}\ue001{_EDGE}"} for i, message in enumerate(messages)]
    try:
        rendered = str(tokenizer.apply_chat_template(marked, tokenize=False))
    except Exception as error:  # jinja2 raises whatever the template raises
        raise UserError(f"the chat template refuses a conversation: {error}") from None
    marks = list(_MARK.finditer(rendered))
    if not marks or int(marks[-1][2]) != len(messages) - 1:
        raise UserError("the chat template leaves out the response")
    ids: list[int] = []
    place = 0
    for mark in marks:
        content = messages[int(mark[2])]["content"]
        content = content if mark[1] else content.lstrip()
        content = content if mark[3] else content.rstrip()
        ids += _encode_structure(tokenizer, rendered[place : mark.start()])
        ids += encode_texts(tokenizer, [content])[0]
        place = mark.end()
    return ids + _encode_structure(tokenizer, rendered[place:])


def _encode_structure(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The template's own text, whose special tokens are what they look like."""
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def read_as_pair(tokenizer: PreTrainedTokenizerBase, prompt: Messages, response: str) -> Reading:
    """The prompt and the response as the two texts of a sentence pair, joined as the tokenizer joins such pairs.

    A prompt of one turn is that turn's text; one of several has a line `role: text` for each.
    """
    first = prompt[0]["content"] if len(prompt) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    found = tokenizer(first, response, split_special_tokens=True, verbose=False)
    kinds = [KEPT if part is None else (PROMPT, RESPONSE)[part] for part in found.sequence_ids(0)]
    return Reading(Row(found["input_ids"], found.get("token_type_ids")), kinds)


def shortened(reading: Reading, context: int) -> Row:
    """What of a conversation the model has room for: the first tokens of the prompt go, then those of the response."""
    ids, segments = reading.row
    over = max(0, len(ids) - context)
    order = sorted(range(len(ids)), key=lambda i: ((PROMPT, RESPONSE, KEPT).index(reading.kinds[i]), i))
    kept = sorted(order[over:])
    return Row([ids[i] for i in kept], [segments[i] for i in kept] if segments else None)
