"""Tokenizers: training a byte-level BPE, documents to ids, conversations to ids and what of them is trained.

Text that looks like a special token stays text: only the chat template's own text may become special tokens.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.errors import MissingInput, UserError
from rlhf.templates import CHAT_TEMPLATES, TEMPLATE_END, TEMPLATE_TOKENS, Piece, lay_out
from rlhf.templates import Messages as Messages

BOS, END_OF_DOCUMENT, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, END_OF_DOCUMENT, PAD, *TEMPLATE_TOKENS["rlhf"])


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
        additional_special_tokens=list(TEMPLATE_TOKENS["rlhf"]),
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


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool = False
) -> EncodedChat:
    """A conversation through the tokenizer's chat template, the contents as plain text.

    Text is tokenised from special token to special token, as a tokenizer does with the whole, but for one cut: where
    the assistant begins to write, so that a prompt's ids are what an answered conversation begins with.
    The assistant's contents with their end tokens are marked as trained; see rlhf.templates.lay_out, which raises
    UserError where the template is not to be understood, and for what it refuses.
    """
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template")
    reading = _reading(tokenizer)
    pieces = lay_out(
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        reading.special,
        messages,
        add_generation_prompt=add_generation_prompt,
    )
    runs = _runs(pieces)
    ids: list[int] = []
    trained: list[bool] = []
    for run, new in zip(runs, reading.encode(tokenizer, runs), strict=True):
        ids += new
        trained += [run.trained] * len(new)
    return EncodedChat(ids, trained)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The ids after which the assistant answers."""
    return encode_chat(tokenizer, messages, add_generation_prompt=True).ids


def last_turn_only(chat: EncodedChat) -> EncodedChat:
    """The conversation with nothing trained but the assistant's last turn."""
    end = max((place for place, trained in enumerate(chat.trained) if trained), default=-1) + 1
    start = end
    while start and chat.trained[start - 1]:
        start -= 1
    return EncodedChat(chat.ids, [start <= place < end for place in range(len(chat.ids))])


def _runs(pieces: list[Piece]) -> list[Piece]:
    """The special tokens, and the text between them in one piece as far as it is all trained or not trained at all."""
    runs: list[Piece] = []
    for piece in pieces:
        if runs and "special" not in (piece.kind, runs[-1].kind) and piece.trained == runs[-1].trained:
            runs[-1] = Piece("text", runs[-1].text + piece.text, piece.trained)
        else:
            runs.append(piece)
    return [run for run in runs if run.text]


class _Reading:
    """How a tokenizer reads the parts of a longer text.

    Some, like SentencePiece, put a blank before the first word of what they are given: of a part in the middle, that
    is one too many. `_bare` is such a tokenizer without this habit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = {number: token for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._ids = {token.content: number for number, token in added.items()}
        patterns = [
            (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
            for token in sorted(added.values(), key=lambda token: -len(token.content))
        ]
        self.special = re.compile("|".join(patterns) or "(?!)")  # (?!) is nowhere
        self._bare: Tokenizer | None = None
        self._blank_after_special = False
        core = getattr(tokenizer, "backend_tokenizer", None)
        if isinstance(core, Tokenizer) and _puts_a_blank(core):
            self._bare = _without_blank(core)
            core.encode_special_tokens = False
            after = core.encode(next(iter(self._ids), "") + "x", add_special_tokens=False).ids
            alone = core.encode("x", add_special_tokens=False).ids
            self._blank_after_special = bool(self._ids) and after[-len(alone) :] == alone

    def encode(self, tokenizer: PreTrainedTokenizerBase, runs: list[Piece]) -> list[list[int]]:
        """The ids of each of these runs, which are the whole of a text."""
        texts = iter(self._encode_texts(tokenizer, runs))
        return [[self._id(run.text)] if run.kind == "special" else next(texts) for run in runs]

    def _encode_texts(self, tokenizer: PreTrainedTokenizerBase, runs: list[Piece]) -> list[list[int]]:
        if self._bare is None:
            return encode_texts(tokenizer, [run.text for run in runs if run.kind != "special"])
        found: list[list[int]] = []
        for number, run in enumerate(runs):
            if run.kind == "special":
                continue
            if number == 0 or (self._blank_after_special and runs[number - 1].kind == "special"):
                found += encode_texts(tokenizer, [run.text])
            else:
                found.append(self._bare.encode(run.text, add_special_tokens=False).ids)
        return found

    def _id(self, token: str) -> int:
        return self._ids[token] if token in self._ids else self._ids[token.strip()]


_READINGS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[int, str | None], _Reading]] = WeakKeyDictionary()


def _reading(tokenizer: PreTrainedTokenizerBase) -> _Reading:
    """Kept for each tokenizer, as long as its special tokens stay as they are."""
    stamp = (len(tokenizer), tokenizer.eos_token)
    if tokenizer not in _READINGS or _READINGS[tokenizer][0] != stamp:
        _READINGS[tokenizer] = (stamp, _Reading(tokenizer))
    return _READINGS[tokenizer][1]


def _puts_a_blank(core: Tokenizer) -> bool:
    text = core.normalizer.normalize_str("x") if core.normalizer else "x"
    words = core.pre_tokenizer.pre_tokenize_str(text) if core.pre_tokenizer else [(text, (0, 1))]
    return [word for word, _ in words] != ["x"]


def _without_blank(core: Tokenizer) -> Tokenizer:
    """The same tokenizer, which puts no blank before what it reads, and reads all of it as text."""

    def changed(part: Any) -> Any:
        if isinstance(part, list):
            return [changed(inner) for inner in part if inner.get("type") != "Prepend"]
        if not isinstance(part, dict):
            return part
        if part.get("type") == "Prepend":
            return None
        lists = {key: changed(part[key]) for key in ("normalizers", "pretokenizers") if key in part}
        habits: dict[str, dict[str, Any]] = {
            "Metaspace": {"prepend_scheme": "never"},
            "ByteLevel": {"add_prefix_space": False},
        }
        return {**part, **lists, **habits.get(part.get("type", ""), {})}

    plan = json.loads(core.to_str())
    plan["normalizer"], plan["pre_tokenizer"] = changed(plan["normalizer"]), changed(plan["pre_tokenizer"])
    bare = Tokenizer.from_str(json.dumps(plan))
    bare.no_padding()
    bare.no_truncation()
    bare.encode_special_tokens = True
    return bare


# What chatting needs


class ChatTokens(NamedTuple):
    """What a tokenizer was given for chatting."""

    added: list[int]  # new tokens: the model's embeddings must be resized
    untrained: list[int]  # the new ones, and those of a template that the model has never seen


def prepare_for_chat(
    tokenizer: PreTrainedTokenizerBase, template: str, *, replace: bool = False, end_token: str | None = None
) -> ChatTokens:
    """Gives a tokenizer what chatting needs: a template, an end of turn as EOS, a pad that isn't EOS.

    `template` is a name of CHAT_TEMPLATES or a Jinja text; it is given if the tokenizer has none, or with `replace`.
    `end_token` is what ends the assistant's turn; without it, that of a template with a name, or the EOS that is there.
    Raises UserError where the end token is no token, or ordinary text.
    """
    if isinstance(tokenizer.chat_template, dict):  # several, by name
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    before, separator = len(tokenizer), tokenizer.eos_token
    known = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    given = replace or not tokenizer.chat_template
    if given:
        _give_template(tokenizer, template)
        end_token = end_token or TEMPLATE_END.get(template)
    if end_token:
        _make_end(tokenizer, end_token)
    elif tokenizer.eos_token is None:
        raise UserError("the tokenizer has no EOS token that could end the assistant's turns: sft.end_token names one")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        if PAD not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"pad_token": PAD})
        tokenizer.pad_token = PAD
    if tokenizer.bos_token is None and separator != tokenizer.eos_token and "bos_token" not in tokenizer.chat_template:
        tokenizer.bos_token = separator  # what begins documents stays what it was
    added = list(range(before, len(tokenizer)))
    seen = _in_template(tokenizer) - known if given else set()
    return ChatTokens(added, sorted({*added, *seen}))


def _in_template(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special tokens that the template puts around what is said."""
    chat: Messages = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    for messages in (chat, chat[1:]):
        try:
            ids = encode_chat(tokenizer, messages, add_generation_prompt=True).ids
        except UserError:  # not every template has a system turn
            continue
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        return special & set(ids)
    return set()


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _give_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokens = [token for token in TEMPLATE_TOKENS.get(template, ()) if token not in _special_tokens(tokenizer)]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    tokenizer.chat_template = CHAT_TEMPLATES.get(template, template)
    if template == "rlhf" and tokenizer.bos_token is None:
        tokenizer.chat_template = tokenizer.chat_template.replace("{{- bos_token -}}", "")


def _make_end(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Makes a token of the vocabulary the EOS, and a special one, which text can't become."""
    if token not in tokenizer.get_vocab():
        ends = [known for known in _special_tokens(tokenizer) if known in tokenizer.chat_template]
        raise UserError(
            f"the end token {token!r} is not a token of the vocabulary"
            + (f"; the chat template's special tokens are {', '.join(ends)}" if ends else "")
        )
    tokenizer.add_special_tokens({"eos_token": token})
    if tokenizer.eos_token_id in encode_texts(tokenizer, [token])[0]:
        raise UserError(f"the end token {token!r} is ordinary text to the tokenizer: any answer could hold it")


def token_info(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a model's configuration says about special tokens."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
