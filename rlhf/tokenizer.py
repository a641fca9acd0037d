"""Tokenizers: training a byte-level BPE, documents to ids, conversations to ids and what of them is trained.

Text that looks like a control token stays text: only the chat template's own text may become one. Control tokens are
the special ones, and those that a template puts around what is said though the tokenizer doesn't call them special.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.errors import MissingInput, UserError
from rlhf.templates import CHAT_TEMPLATES, TEMPLATE_END, TEMPLATE_TOKENS, Piece, lay_out, marked_text, surroundings
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


LONGEST_NAME = 200  # characters of a control token's name
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


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], longest: int = 2**20, *, control: bool = False
) -> list[list[int]]:
    """Plain text to ids, without control tokens: whatever looks like one stays text.

    With `control` it is one, as the tokenizer reads texts by itself. A text of more than `longest` characters is
    encoded in parts, between words where there are any: a tokenizer takes a hundred times a text's size in memory.
    Raises UserError for a text that can't be read without a control token.
    """
    if not texts:
        return []
    reading = _reading(tokenizer)
    read = reading.as_it_does if control else reading.as_text
    parts = [list(_parts(text, longest, reading.names if control else None)) for text in texts]
    found = read(tokenizer, [first for first, *_ in parts])
    for ids, (_, *others) in zip(found, parts, strict=True):
        if others:
            ids += chain.from_iterable(read(tokenizer, others, inside=True))
    return found


def _parts(text: str, longest: int, whole: re.Pattern[str] | None = None) -> Iterator[str]:
    """A text in parts of at most `longest` characters, each but the first beginning with the space before a word.

    What `whole` finds is not cut, nor cut off from the spaces beside it, where there is another place.
    """
    start = 0
    while len(text) - start > longest:
        lowest, end = start + longest // 2, start + longest
        names = [found.span() for found in whole.finditer(text, start, end + LONGEST_NAME)] if whole else []
        beside = {place for first, last in names for place in range(first - 1, last + 1)}
        place = text.rfind(" ", lowest, end)
        while place > lowest and (text[place - 1].isspace() or text[place + 1].isspace() or place in beside):
            place = text.rfind(" ", lowest, place)
        cut = place if place > lowest else next((first for first, last in names if start < first < end < last), end)
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
    runs = _runs(_pieces(tokenizer, messages, add_generation_prompt))
    ids: list[int] = []
    trained: list[bool] = []
    for run, new in zip(runs, _reading(tokenizer).encode(tokenizer, runs), strict=True):
        ids += new
        trained += [run.trained] * len(new)
    return EncodedChat(ids, trained)


def _pieces(tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False) -> list[Piece]:
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template")
    return lay_out(
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        _reading(tokenizer).special,
        messages,
        add_generation_prompt=add_generation_prompt,
    )


def marked_and_trained(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[str, str]:
    """What of a conversation stands in the chat template's own generation markers, and what of it is trained."""
    trained = "".join(piece.text for piece in _pieces(tokenizer, messages) if piece.trained)
    return marked_text(tokenizer.chat_template, tokenizer.special_tokens_map, messages), trained


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
    """How a tokenizer reads texts in which nothing is a control token, and the parts of a longer text.

    `_copy` is a tokenizer to which all control tokens are special, where some of its own aren't: no text becomes them.
    Some tokenizers, like SentencePiece, put a blank before the first word of what they are given: of a part in the
    middle, that is one too many. `_bare` is such a tokenizer without this habit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added = _control_tokens(tokenizer)
        self._ids = {token.content: number for number, token in added.items()}
        tokens = sorted(added.values(), key=lambda token: -len(token.content))
        patterns = [
            (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
            for token in tokens
        ]
        named = sorted({*self._ids, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self.names = re.compile("|".join(map(re.escape, named)) or "(?!)")
        self.special = re.compile("|".join(patterns) or "(?!)")  # (?!) is nowhere
        ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self.control = frozenset(set(added) - ({tokenizer.unk_token_id} - ends))  # any text may be unknown
        names = [token.content for token in tokens if len(token.content) > 1]
        cuts = [rf"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names]
        self._inside_names = re.compile("|".join(cuts) or "(?!)")
        ordinary = [token.content for token in tokens if not token.special]
        self._copy = _with_special(tokenizer, ordinary) if ordinary else None
        self._bare: Tokenizer | None = None
        self._blank_after_special = False
        core = getattr(self._copy or tokenizer, "backend_tokenizer", None)
        if isinstance(core, Tokenizer) and _puts_a_blank(core):
            self._bare = _without_blank(core)
            core.encode_special_tokens = False
            after = core.encode(next(iter(self._ids), "") + "x", add_special_tokens=False).ids
            alone = core.encode("x", add_special_tokens=False).ids
            self._blank_after_special = bool(self._ids) and after[-len(alone) :] == alone

    def as_text(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], *, inside: bool = False) -> list[list[int]]:
        """The ids of texts, none of them a control token's; those `inside` a longer text get no blank before them."""
        found = self.read(tokenizer, texts, inside)
        return [
            ids if self.control.isdisjoint(ids) else self._spelled(tokenizer, text, inside)
            for text, ids in zip(texts, found, strict=True)
        ]

    def as_it_does(
        self, tokenizer: PreTrainedTokenizerBase, texts: list[str], *, inside: bool = False
    ) -> list[list[int]]:
        """The ids of texts as the tokenizer reads them by itself: names of control tokens are these, if it says so.

        Those `inside` a longer text lose the blank before them where the tokenizer puts one there.
        """
        if inside and self._bare is not None:
            texts = [text.removeprefix(" ") for text in texts]
        return _ids(tokenizer, texts, split=tokenizer.split_special_tokens)

    def read(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], inside: bool = False) -> list[list[int]]:
        """The ids of texts as the vocabulary has them: it may know the name of a control token."""
        if inside and self._bare is not None:
            return [encoding.ids for encoding in self._bare.encode_batch(texts, add_special_tokens=False)]
        return _ids(self._copy or tokenizer, texts, split=True)

    def _spelled(self, tokenizer: PreTrainedTokenizerBase, text: str, inside: bool) -> list[int]:
        """The ids of a text in which the vocabulary finds names of control tokens: cut after their first characters."""
        ids: list[int] = []
        for number, part in enumerate(self._inside_names.split(text)):
            ids += self.read(tokenizer, [part], inside or number > 0)[0]
        if not self.control.isdisjoint(ids):
            names = " ".join(tokenizer.convert_ids_to_tokens(sorted(self.control & set(ids))))
            raise UserError(f"a text holds what the tokenizer can read as nothing but a control token: {names}")
        return ids

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
                found += self.as_text(tokenizer, [run.text], inside=True)
        return found

    def _id(self, token: str) -> int:
        return self._ids[token] if token in self._ids else self._ids[token.strip()]


_READINGS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[Any, ...], _Reading]] = WeakKeyDictionary()


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, split: bool) -> list[list[int]]:
    """The ids of texts alone; `split`: names of special tokens are read as text."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(core, Tokenizer) and type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus:
        # what the call below does, without offsets and masks, which take a third of its time
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = split
        return [encoding.ids for encoding in core.encode_batch_fast(texts, add_special_tokens=False)]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=split, verbose=False)
    found: list[list[int]] = encoded["input_ids"]
    return found


def _reading(tokenizer: PreTrainedTokenizerBase) -> _Reading:
    """Kept for each tokenizer, as long as its special tokens and its template stay as they are."""
    stamp = (len(tokenizer), tokenizer.all_special_tokens, tokenizer.chat_template)
    if tokenizer not in _READINGS or _READINGS[tokenizer][0] != stamp:
        _READINGS[tokenizer] = (stamp, _Reading(tokenizer))
    return _READINGS[tokenizer][1]


_NAME = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.DOTALL)  # between signs, as <|im_start|>; no word, no blanks


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, AddedToken]:
    """The special tokens, and the other added ones that the template puts around what is said.

    What it only puts into an answer, such as <think>, an answer may hold as well: where that isn't special, it is none.
    """
    template = tokenizer.chat_template
    around = surroundings(template, tokenizer.special_tokens_map) if isinstance(template, str) else ""
    return {
        number: token
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or (token.content in around and _NAME.fullmatch(token.content))
    }


def _with_special(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> PreTrainedTokenizerBase:
    """A copy to which these tokens are special."""
    found = copy.deepcopy(tokenizer)
    found.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
    return found


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
    """The control tokens that the template puts around what is said."""
    chat: Messages = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    for messages in (chat, chat[1:]):
        try:
            ids = encode_chat(tokenizer, messages, add_generation_prompt=True).ids
        except UserError:  # not every template has a system turn
            continue
        return set(_reading(tokenizer).control & set(ids))
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
    ordinary = token not in _special_tokens(tokenizer)
    tokenizer.add_special_tokens({"eos_token": token})
    if ordinary and tokenizer.eos_token_id in _reading(tokenizer).read(tokenizer, [token])[0]:
        raise UserError(f"the end token {token!r} is ordinary text to the tokenizer: any answer could hold it")


def token_info(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a model's configuration says about special tokens."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
