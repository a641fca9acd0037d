"""The last pass: documents to tokens, in files that only grow, so that a killed run goes on behind the last block.

    tokens.bin       every document's ids, one after the other, as rlhf.data.tokens packs them
    documents.bin    DOCUMENT, one a document: where it comes from and where it begins

Each source comes as often as its weight says, in the order in which it was read: what was removed is not read again,
and a weight of 2 is no duplicate.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf.data.prepare.incontext import InContext, made_before
from rlhf.data.prepare.store import Part, Store
from rlhf.data.tokens import token_dtype
from rlhf.runtime import Bar
from rlhf.tinyworld.words import Draw
from rlhf.tokenizer import encode_documents

TOKENS, DOCUMENTS = "tokens.bin", "documents.bin"
DOCUMENT = np.dtype(
    [
        ("source", "<u2"),  # its place in the list of sources; one behind the last: made of few-shot tasks
        ("file", "<u4"),  # its place in the card's `files`
        ("row", "<u8"),  # its line, or number, in the file; the number of a made one
        ("start", "<u8"),  # of its tokens in tokens.bin
        ("tokens", "<u4"),
    ]
)
NO_FILE = 2**32 - 1


class Document(NamedTuple):
    """A text on its way to tokens."""

    source: int
    file: int
    row: int
    text: str


class Counts(NamedTuple):
    """What was written."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0

    def plus(self, other: "Counts") -> "Counts":
        """The sum of both."""
        return Counts(*(mine + its for mine, its in zip(self, other, strict=True)))


class Packer:
    """Writes tokens.bin and documents.bin."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, counts: dict[int, Counts] | None = None
    ) -> None:
        """`counts` is what of each source is in the files already; what stands behind that is cut off."""
        self._tokenizer, self._kind = tokenizer, np.dtype(token_dtype(len(tokenizer)))
        self.counts: dict[int, Counts] = dict(counts or {})
        self._tokens = _opened(folder / TOKENS, self.total.tokens * self._kind.itemsize)
        self._documents = _opened(folder / DOCUMENTS, self.total.documents * DOCUMENT.itemsize)

    @property
    def total(self) -> Counts:
        """Everything that was written."""
        found = Counts()
        for counts in self.counts.values():
            found = found.plus(counts)
        return found

    def write(self, documents: Iterable[Document], show: Callable[[Counts], None] = lambda _: None) -> None:
        """Appends documents. `show` is told now and then how much is written."""
        waiting: deque[tuple[int, int, int, int]] = deque()

        def texts() -> Iterator[str]:
            for document in documents:
                waiting.append((document.source, document.file, document.row, len(document.text.encode())))
                yield document.text

        total = self.total
        for number, ids in enumerate(encode_documents(self._tokenizer, texts())):
            source, file, row, size = waiting.popleft()
            np.asarray(ids, dtype=self._kind).tofile(self._tokens)
            np.array((source, file, row, total.tokens, len(ids)), dtype=DOCUMENT).tofile(self._documents)
            one = Counts(1, size, len(ids))
            self.counts[source] = self.counts.get(source, Counts()).plus(one)
            total = total.plus(one)
            if number % 256 == 255:
                show(total)
        show(total)

    def flush(self) -> None:
        """Returns once everything is on the disk."""
        for file in (self._tokens, self._documents):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Closes the files."""
        self.flush()
        self._tokens.close()
        self._documents.close()


def _opened(path: Path, size: int) -> Any:
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


def pack_store(
    store: Store,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    gone: np.ndarray,
    weights: Sequence[float],
    seed: int,
    incontext: tuple[InContext, float] | None,
    what: str,
) -> dict[int, Counts]:
    """Packs the documents of a store that are not `gone` (bool, by number); what was written of each source.

    `incontext` are documents to be made among them, and which share of all they are.
    """
    found = store.facts("packed") or {"blocks": 0, "counts": {}}
    packer = Packer(folder, tokenizer, {int(source): Counts(*c) for source, c in found["counts"].items()})
    documents = sum(len(chosen) for _, _, chosen in _blocks(store, gone, weights, seed))
    made = made_before(documents, incontext[1]) if incontext else 0
    before = 0  # documents of the sources that stand before a block
    with Bar(what, documents + made, packer.total.documents) as bar:
        for number, (source, part, chosen) in enumerate(_blocks(store, gone, weights, seed)):
            if number >= found["blocks"]:
                block = _documents(source, part, chosen)
                if incontext:
                    block = _with_made(block, before, len(weights), *incontext)
                packer.write(block, lambda total: bar.show(total.documents, tokens=total.tokens))
                packer.flush()
                store.keep_facts("packed", {"blocks": number + 1, "counts": packer.counts})
            before += len(chosen)
    packer.close()
    return packer.counts


def _blocks(
    store: Store, gone: np.ndarray, weights: Sequence[float], seed: int
) -> Iterator[tuple[int, Part, np.ndarray]]:
    """What is written in turn: of each source, as often as its weight says, the documents of each part."""
    for source, weight in enumerate(weights):
        draw = Draw("weight", seed, source)
        times, rest = divmod(weight, 1.0)
        for again in range(int(times) + bool(rest)):
            for part in store.parts:
                mine = part.rows["source"] == source
                chosen = np.flatnonzero(mine & ~gone[part.first : part.first + part.documents])
                if again == int(times):
                    chosen = chosen[np.fromiter((draw.share(rest) for _ in chosen), dtype=bool, count=len(chosen))]
                if len(chosen):
                    yield source, part, chosen


def _documents(source: int, part: Part, chosen: np.ndarray) -> Iterator[Document]:
    for number, text in part.texts(chosen):
        row = part.rows[number]
        yield Document(source, int(row["file"]), int(row["row"]), text)


def _with_made(
    documents: Iterable[Document], before: int, source: int, incontext: InContext, share: float
) -> Iterator[Document]:
    """The documents, of which so many stand before, with made ones among them."""
    for number, document in enumerate(documents, before):
        for made in range(made_before(number, share), made_before(number + 1, share)):
            yield Document(source, NO_FILE, made, incontext.document(made))
        yield document
