"""Tokenizers: training a byte-level BPE, documents to ids, conversations to ids and what of them is trained.

Text that looks like a special token stays text: only the chat template's own text may become special tokens.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf.errors import MissingInput, UserError

BOS, END_OF_DOCUMENT, PAD, END_OF_TURN = "<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"
SPECIAL_TOKENS = (BOS, END_OF_DOCUMENT, PAD, "<|system|>", "<|user|>", "<|assistant|>", END_OF_TURN)

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
_TEMPLATE_TOKENS = {
    "rlhf": ("<|system|>", "<|user|>", "<|assistant|>", END_OF_TURN),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
_TEMPLATE_END = {"rlhf": END_OF_TURN, "chatml": "<|im_end|>"}

Messages = list[dict[str, str]]


# Training


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens, where the texts have that many merges.

    Byte-level: any text can be encoded and decodes to itself. The same texts give the same merges, bit for bit.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END_OF_DOCUMENT,
        pad_token=PAD,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>", END_OF_TURN],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


LONGEST_RUN = 1000  # characters; a longer run without a break is no word
_RUNS = re.compile("|".join(rf"{kind}{{{LONGEST_RUN + 1},}}" for kind in (r"[^\W\d_]", r"\d", r"\s", r"(?:_|[^\w\s])")))


def shorten_runs(text: str) -> tuple[str, int]:
    """The text with at most 1,000 characters of each run of letters, digits, blanks or signs; how many were cut.

    For training alone: a run is one word to a BPE, and the time that a word takes grows with its length.
    """
    return _RUNS.subn(lambda run: run[0][:LONGEST_RUN], text)


def load_tokenizer(directory: str | Path, *, remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub id. Raises MissingInput where there is none.

    Code that lies beside it is run with `remote_code` only.
    """
    try:
        found = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=remote_code)
    except Exception as error:  # whatever a file that is wrong in its own way raises in the libraries
        why = (str(error).splitlines() or [""])[0]
        raise MissingInput(
            f"no tokenizer could be loaded from {directory}: {type(error).__name__}: {why[:300]}"
        ) from None
    if not encode_texts(found, ["The quick brown fox"])[0]:  # transformers makes an empty one where there is none
        raise MissingInput(
            f"{directory} holds no tokenizer (tokenizer.json): no text can be encoded with what is there"
        )
    return found


# Documents


def begin_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that begins every document and every scored text: BOS, or EOS for tokenizers without BOS."""
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise UserError("the tokenizer has neither a BOS nor an EOS token, so documents can't be told apart")
    return int(found)


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str], longest: int = 2**20) -> list[list[int]]:
    """Plain text to ids, without special tokens: whatever looks like one stays text.

    A text of more than `longest` characters is encoded in parts, between words where there are any: a tokenizer takes
    a hundred times a text's size in memory.
    """
    if not texts:
        return []
    parts = [(owner, part) for owner, text in enumerate(texts) for part in _parts(text, longest)]
    found: list[list[int]] = [[] for _ in texts]
    encoded = tokenizer([part for _, part in parts], add_special_tokens=False, split_special_tokens=True, verbose=False)
    for (owner, _), ids in zip(parts, encoded["input_ids"], strict=True):
        found[owner] = found[owner] + ids if found[owner] else ids
    return found


def _parts(text: str, longest: int) -> Iterator[str]:
    """A text in parts of at most `longest` characters, each but the first beginning with the space before a word."""
    start = 0
    while len(text) - start > longest:
        lowest, end = start + longest // 2, start + longest
        place = text.rfind(" ", lowest, end)
        while place > lowest and (text[place - 1].isspace() or text[place + 1].isspace()):
            place = text.rfind(" ", lowest, place)
        cut = place if place > lowest else end
        yield text[start:cut]
        start = cut
    yield text[start:]


def encode_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], batch: int = 1000, characters: int = 2**22
) -> Iterator[list[int]]:
    """Each text as BOS, its ids, and the document's end token; so many texts, or characters, are encoded at a time."""
    begin, end = begin_id(tokenizer), tokenizer.eos_token_id
    pending: list[str] = []
    waiting = 0

    def flush() -> Iterator[list[int]]:
        for ids in encode_texts(tokenizer, pending):
            yield [begin, *ids] if end is None or end == begin else [begin, *ids, end]
        pending.clear()

    for text in texts:
        pending.append(text)
        waiting += len(text)
        if len(pending) == batch or waiting >= characters:
            yield from flush()
            waiting = 0
    yield from flush()


# Conversations


class EncodedChat(NamedTuple):
    """A conversation as the model sees it: `trained[i]` says whether token `ids[i]` is learned (True counts)."""

    ids: list[int]
    trained: list[bool]


class _Piece(NamedTuple):
    text: str
    is_content: bool
    trained: bool


_ROLES = ("system", "user", "assistant")
_SUBSETS_OF_ROLES = [roles for n in range(4) for roles in itertools.combinations(_ROLES, n)]
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = re.compile("\ue000([0-9]+)\ue001")


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool = False
) -> EncodedChat:
    """A conversation through the tokenizer's chat template, the contents as plain text.

    The assistant's contents with their end tokens are marked as trained: what stands in the template's
    `{% generation %}` markers, or, in a template without them, each assistant content up to the EOS that follows it.
    Raises UserError where the template alters the contents, or where an assistant's end token would not be trained.
    """
    pieces = _pieces(tokenizer, messages, add_generation_prompt)
    ids: list[int] = []
    trained: list[bool] = []
    for piece in pieces:
        new = tokenizer(piece.text, add_special_tokens=False, split_special_tokens=piece.is_content, verbose=False)[
            "input_ids"
        ]
        ids += new
        trained += [piece.trained] * len(new)
    return EncodedChat(ids, trained)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The ids after which the assistant answers."""
    return encode_chat(tokenizer, messages, add_generation_prompt=True).ids


def _pieces(tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool) -> list[_Piece]:
    """The rendered conversation, cut at the borders of its contents and of what is trained."""
    template = tokenizer.chat_template
    if not template:
        raise UserError("the tokenizer has no chat template")
    marked = [{**message, "content": f"\ue000{i}\ue001"} for i, message in enumerate(messages)]
    rendered, spans = _render(tokenizer, template, marked, add_generation_prompt)
    if not _MARKERS.search(template):
        spans = _spans_by_end(rendered, messages, tokenizer.eos_token)
    elif any(tokenizer.eos_token not in rendered[start:end] for start, end in spans):
        raise UserError(
            f"the chat template's generation markers leave out the EOS token {tokenizer.eos_token!r}, "
            "so the model would never learn to stop; put it inside {% generation %}"
        )
    whole, _ = _render(tokenizer, template, messages, add_generation_prompt)
    for trimmed in _SUBSETS_OF_ROLES:  # templates trim the contents of all, none or some of the roles
        contents = [m["content"].strip() if m["role"] in trimmed else m["content"] for m in messages]
        if _MARK.sub(lambda match, c=contents: c[int(match[1])], rendered) == whole:  # type: ignore[misc]
            return _cut(rendered, spans, contents)
    raise UserError("the chat template alters the contents of messages, so what is trained can't be told exactly")


def _render(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Messages, add_generation_prompt: bool
) -> tuple[str, list[tuple[int, int]]]:
    try:
        rendered, spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=bool(_MARKERS.search(template)),
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # jinja2 raises whatever the template raises
        raise UserError(f"the chat template refuses a conversation: {error}") from None
    return rendered[0], list(spans[0]) if spans else []


def _spans_by_end(rendered: str, messages: Messages, end: str | None) -> list[tuple[int, int]]:
    """For a template without markers: each assistant content up to and with the EOS that follows it."""
    spans = []
    for match in _MARK.finditer(rendered):
        if messages[int(match[1])]["role"] != "assistant":
            continue
        after = rendered[match.end() :]
        following = _MARK.search(after)
        place = after.find(end, 0, following.start() if following else None) if end else -1
        if end is None or place < 0:
            raise UserError(
                f"the chat template does not end an assistant's turn with the EOS token {end!r}, "
                "so the model would never learn to stop; mark the turns with {% generation %} in the template"
            )
        spans.append((match.start(), match.end() + place + len(end)))
    return spans


def _cut(rendered: str, spans: list[tuple[int, int]], contents: list[str]) -> list[_Piece]:
    borders = {0, len(rendered), *(border for span in spans for border in span)}
    marks = {match.start(): match for match in _MARK.finditer(rendered)}
    for match in marks.values():
        borders |= {match.start(), match.end()}
    ordered = sorted(borders)
    pieces = []
    for start, end in itertools.pairwise(ordered):
        trained = any(a <= start and end <= b for a, b in spans)
        content = start in marks
        text = contents[int(marks[start][1])] if content else rendered[start:end]
        pieces.append(_Piece(text, content, trained))
    return pieces


def prepare_for_chat(tokenizer: PreTrainedTokenizerBase, template: str) -> int:
    """Gives a tokenizer what chatting needs: a template if it has none, an end of turn as EOS, a pad that isn't EOS.

    Returns how many tokens were added; the model's embeddings must then be resized.
    """
    before = len(tokenizer)
    if not tokenizer.chat_template:
        tokens = _TEMPLATE_TOKENS[template]
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [token for token in tokens if token not in tokenizer.get_vocab()]},
            replace_extra_special_tokens=False,
        )
        tokenizer.chat_template = CHAT_TEMPLATES[template]
        tokenizer.eos_token = _TEMPLATE_END[template]
        if template == "rlhf" and tokenizer.bos_token is None:
            tokenizer.chat_template = tokenizer.chat_template.replace("{{- bos_token -}}", "")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        if PAD not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"pad_token": PAD})
        tokenizer.pad_token = PAD
    return len(tokenizer) - before


def token_info(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a model's configuration says about special tokens."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
