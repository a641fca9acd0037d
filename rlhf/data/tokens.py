"""Documents packed into one memory-mapped file of token ids, and the order in which its rows are read."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch

from rlhf.errors import DataError


class PackStats(NamedTuple):
    """What went into a packed file."""

    documents: int
    tokens: int
    bytes: int


def pack(documents: Iterable[tuple[list[int], int]], path: Path, vocab_size: int) -> PackStats:
    """Writes the documents' ids one after the other; each comes with its size in bytes of text.

    16 bits a token where the vocabulary allows it, else 32.
    """
    kind = token_dtype(vocab_size)
    n_documents = n_tokens = n_bytes = 0
    with path.open("wb") as file:
        for ids, size in documents:
            np.asarray(ids, dtype=kind).tofile(file)
            n_documents, n_tokens, n_bytes = n_documents + 1, n_tokens + len(ids), n_bytes + size
    return PackStats(n_documents, n_tokens, n_bytes)


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest unsigned integer that holds every id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


class Rows(Protocol):
    """Rows of tokens in an endless training order, so that a run can go on at any place of it."""

    def batch(self, places: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets [len(places), length], int64, of the rows at these places of the training order."""
        ...


class PackedTokens:
    """Rows of `length` tokens of a packed file, each with the token that follows, as inputs and targets.

    The row at place i of the training order is a function of (seed, i) alone: every pass goes through all rows in a
    new random order, or, without a seed, as they stand. So a run can go on at any step, with any number of processes.
    """

    def __init__(self, path: Path, vocab_size: int, length: int, seed: int | None) -> None:
        kind = token_dtype(vocab_size)
        self._tokens = np.memmap(path, dtype=kind, mode="r") if path.stat().st_size else np.zeros(0, dtype=kind)
        self._length, self._seed = length, seed
        self.rows = (len(self._tokens) - 1) // length
        if self.rows < 1:
            raise DataError(
                f"the training texts have {len(self._tokens):,} tokens in all, less than one row of {length + 1}"
            )
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._tokens)

    def row_at(self, place: int) -> int:
        """Which row is read at this place of the endless training order."""
        epoch, index = divmod(place, self.rows)
        if self._seed is None:
            return index
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(self.rows))
        return int(self._order[1][index])

    def batch(self, places: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets [len(places), length], int64, of the rows at these places of the training order."""
        starts = [self.row_at(place) * self._length for place in places]
        rows = np.stack([self._tokens[start : start + self._length + 1] for start in starts]).astype(np.int64)
        whole = torch.from_numpy(rows)
        return whole[:, :-1], whole[:, 1:]


class ReplayedTokens:
    """New rows with old ones among them: of the first n places of the training order floor(n share) are old."""

    def __init__(self, new: PackedTokens, old: PackedTokens, share: float) -> None:
        self._new, self._old, self._share = new, old, share

    def batch(self, places: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets [len(places), length], int64, of the rows at these places of the training order."""
        found = [self._row(place) for place in places]
        return torch.cat([inputs for inputs, _ in found]), torch.cat([targets for _, targets in found])

    def _row(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        before, after = int(place * self._share), int((place + 1) * self._share)
        source, at = (self._old, before) if after > before else (self._new, place - before)
        return source.batch(range(at, at + 1))
