"""The first pass: all rows are read once and treated by the workers, a chunk at a time; what is kept goes on the disk.

The rows are read here, in one process, so that a bad one is named by file and line and stops the reading or is counted.
"""

import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf.data.prepare.store import ROW, Store
from rlhf.data.prepare.treatment import Removed, Treated, treat
from rlhf.data.prepare.workers import Workers
from rlhf.data.reader import Unit
from rlhf.data.sources import DataSet, Good
from rlhf.runtime import Bar

CHUNK_CHARACTERS, CHUNK_ROWS = 2**20, 4096  # what a worker is given at a time
PART_CHARACTERS = 2**25  # what is lost at most when a run is killed


class Place(NamedTuple):
    """Where a document comes from."""

    source: int
    path: Path
    row: int
    unit: Unit


class Chunk(NamedTuple):
    """Documents that are treated together."""

    places: list[Place]
    characters: int  # of all of them


def chunks(rows: Iterator[Good]) -> Iterator[tuple[Chunk, list[str]]]:
    """The rows in chunks of about a million characters, with their texts."""
    places: list[Place] = []
    texts: list[str] = []
    characters = 0
    for good in rows:
        texts += good.items
        places.append(Place(good.source, good.row.path, good.row.line, good.row.unit))
        characters += len(texts[-1])
        if characters >= CHUNK_CHARACTERS or len(texts) >= CHUNK_ROWS:
            yield Chunk(places, characters), texts
            places, texts, characters = [], [], 0
    if texts:
        yield Chunk(places, characters), texts


def read_all(store: Store, dataset: DataSet, workers: Workers, what: str) -> dict[str, Any]:
    """Reads and treats what isn't in the store yet; rows and bad rows in all.

    Raises DataError for a bad row that stops the reading.
    """
    found = store.facts("read")
    if found:
        return found
    done = store.rows_read
    part = _Part([file for file, _ in store.files()])
    rows = done
    megabytes = None if dataset.size is None else max(1, dataset.size // 10**6)
    started = time.monotonic()
    with Bar(f"{what}, MB" if megabytes else what, megabytes or dataset.limit) as bar:
        for chunk, treated in workers.in_order(treat, chunks(islice(dataset.once(), done, None))):
            part.take(chunk, treated)
            rows += len(chunk.places)
            rate = (rows - done) / (time.monotonic() - started)
            read = min(dataset.read // 10**6, megabytes - 1) if megabytes else rows
            bar.show(read, documents=rows, documents_a_second=rate)
            if part.characters >= PART_CHARACTERS:
                part.write(store)
                part = _Part(part.files)
        if part.facts["rows"]:
            part.write(store)
        bar.show(megabytes or rows, documents=rows)
    found = {"rows": store.rows_read, "bad_rows": dict(dataset.faults.counts), "faults": dataset.faults.report()}
    store.keep_facts("read", found)
    return found


class _Part:
    """A part of the store while it grows."""

    def __init__(self, files: list[str]) -> None:
        self.files = files  # all paths so far; a document knows its file by its place here
        self._numbers = {path: number for number, path in enumerate(files)}
        self._text: list[bytes] = []
        self._rows: list[np.ndarray] = []
        self._arrays: dict[str, list[np.ndarray]] = {"sketched": [], "keys": [], "slots": []}
        self._removed: list[dict[str, Any]] = []
        self._counts: dict[str, Counter[str]] = {}
        self._started = time.monotonic()
        self.characters = self._documents = self._bytes = 0
        self.facts: dict[str, Any] = {"rows": 0, "files": []}

    def take(self, chunk: Chunk, treated: Treated) -> None:
        """Adds a chunk."""
        rows = np.zeros(len(treated.kept), dtype=ROW)
        rows["source"] = [chunk.places[number].source for number in treated.kept.tolist()]
        rows["file"] = [self._file(chunk.places[number]) for number in treated.kept.tolist()]
        rows["row"] = [chunk.places[number].row for number in treated.kept.tolist()]
        rows["start"] = self._bytes + np.concatenate([[0], np.cumsum(treated.sizes)])[:-1]
        rows["size"], rows["words"], rows["digest"] = treated.sizes, treated.words, treated.digests
        self._arrays["sketched"].append(treated.sketched + self._documents)
        self._arrays["keys"].append(treated.keys)
        self._arrays["slots"].append(treated.slots)
        self._rows.append(rows)
        self._text.append(treated.text)
        self._removed += [self._removed_line(chunk, one) for one in treated.removed]
        self._count(chunk, treated)
        self.facts["rows"] += len(chunk.places)
        self.characters += chunk.characters
        self._documents += len(rows)
        self._bytes += len(treated.text)

    def _file(self, place: Place) -> int:
        path = str(place.path)
        if path not in self._numbers:
            self._numbers[path] = len(self.files)
            self.files.append(path)
            self.facts["files"].append([path, place.unit])
        return self._numbers[path]

    def _removed_line(self, chunk: Chunk, removed: Removed) -> dict[str, Any]:
        place = chunk.places[removed.number]
        self._file(place)
        found = {"file": str(place.path), place.unit: place.row, "source": place.source, "why": removed.why}
        return {**found, "value": removed.value, **({"text": removed.example} if removed.example else {})}

    def _count(self, chunk: Chunk, treated: Treated) -> None:
        """Documents and bytes by source: read, removed by each reason."""
        sizes = treated.bytes_before.tolist()
        for place, size in zip(chunk.places, sizes, strict=True):
            self._add("read", place.source, size)
        for removed in treated.removed:
            self._add(f"removed {removed.why}", chunk.places[removed.number].source, sizes[removed.number])
        for name, counts in (
            ("cleaned", treated.cleaned),
            ("masked", treated.masked),
            ("masked_texts", treated.masked_texts),
        ):
            self._counts.setdefault(name, Counter()).update(counts)

    def _add(self, what: str, source: int, size: int) -> None:
        counts = self._counts.setdefault(what, Counter())
        counts[f"documents {source}"] += 1
        counts[f"bytes {source}"] += size

    def write(self, store: Store) -> None:
        """Puts the part into the store."""
        arrays = {
            "rows": np.concatenate(self._rows),
            "sketched": np.concatenate(self._arrays["sketched"]),
            "keys": np.concatenate(self._arrays["keys"], axis=1),
            "slots": np.concatenate(self._arrays["slots"]),
        }
        facts = {
            **self.facts,
            "kept": len(arrays["rows"]),
            "sketched": len(arrays["sketched"]),
            "counts": self._counts,
            "seconds": time.monotonic() - self._started,
        }
        store.add(self._text, arrays, self._removed, facts)
