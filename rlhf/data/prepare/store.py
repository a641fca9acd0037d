"""What preparing a corpus keeps on the disk while it works: parts of treated documents, small facts, arrays.

    part-00000/        as many documents as 32 million characters of text have
      text.bin         theirs that are kept, one behind the other
      rows.npy         ROW, one a document
      sketched.npy     which of them have a sketch
      keys.npy         uint32 [bands, sketched]
      slots.npy        uint8 [sketched, SLOTS]
      removed.jsonl    what was removed
      facts.json       counts; how many rows were read for it

A part, and every other file, has its name once it is whole and on the disk, so a killed run goes on behind the last.
Documents are numbered in the order in which they were read, those that were removed not counted.
"""

import json
import os
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.rundir import read_json, sync_folder, write_json

ROW = np.dtype(
    [
        ("source", "<u2"),
        ("file", "<u4"),
        ("row", "<u8"),  # its line, or number, in the file
        ("start", "<u8"),  # where its text begins in text.bin
        ("size", "<u8"),  # of its text in bytes
        ("words", "<u4"),
        ("digest", "<u8", 2),
    ]
)


class Part:
    """Documents that were treated together; the first one's number in the corpus is `first`."""

    def __init__(self, path: Path, first: int, first_sketched: int) -> None:
        self.path, self.first, self.first_sketched = path, first, first_sketched
        self.facts: dict[str, Any] = read_json(path / "facts.json") or {}
        self.documents, self.sketched = int(self.facts["kept"]), int(self.facts["sketched"])

    @cached_property
    def rows(self) -> np.ndarray:
        """ROW [documents], on the disk."""
        return _mapped(self.path / "rows.npy")

    @cached_property
    def keys(self) -> np.ndarray:
        """uint32 [bands, sketched], on the disk."""
        return _mapped(self.path / "keys.npy")

    @cached_property
    def slots(self) -> np.ndarray:
        """uint8 [sketched, SLOTS], on the disk."""
        return _mapped(self.path / "slots.npy")

    def sketched_documents(self) -> np.ndarray:
        """The numbers in the corpus of the documents with a sketch, int64 [sketched]."""
        return np.asarray(np.load(self.path / "sketched.npy")) + self.first

    def texts(self, wanted: np.ndarray) -> Iterator[tuple[int, str]]:
        """The texts of documents of these numbers in the part, in this order."""
        with (self.path / "text.bin").open("rb") as file:
            for number in wanted.tolist():
                row = self.rows[number]
                file.seek(int(row["start"]))
                yield number, file.read(int(row["size"])).decode()


def _mapped(path: Path) -> np.ndarray:
    """An array that stays on the disk, unless it is as small as a page of memory."""
    found: np.ndarray = np.load(path, mmap_mode="r" if path.stat().st_size > 2**12 else None)
    return found


class Store:
    """The folder that a corpus is prepared in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.partial"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        self.parts: list[Part] = []
        while (path := self._path(len(self.parts))).is_dir():
            self._append(path)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05}"

    def _append(self, path: Path) -> None:
        last = self.parts[-1] if self.parts else None
        first = last.first + last.documents if last else 0
        first_sketched = last.first_sketched + last.sketched if last else 0
        self.parts.append(Part(path, first, first_sketched))

    @property
    def documents(self) -> int:
        """How many there are in all parts."""
        return sum(part.documents for part in self.parts)

    @property
    def rows_read(self) -> int:
        """How many rows were read for all parts."""
        return sum(int(part.facts["rows"]) for part in self.parts)

    def files(self) -> list[list[str]]:
        """[path, what its rows are counted in] of every file that rows came from, in the order of their numbers."""
        return [file for part in self.parts for file in part.facts["files"]]

    def add(
        self, text: list[bytes], arrays: dict[str, np.ndarray], removed: list[dict[str, Any]], facts: dict[str, Any]
    ) -> None:
        """Writes another part."""
        path = self._path(len(self.parts))
        partial = path.with_name(f"{path.name}.partial")
        partial.mkdir()
        with (partial / "text.bin").open("wb") as file:
            file.writelines(text)
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        with (partial / "removed.jsonl").open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in removed)
        (partial / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
        for written in partial.iterdir():
            _flush(written)
        partial.rename(path)
        sync_folder(self.folder)
        self._append(path)

    # Small facts and arrays of whole passes

    def facts(self, name: str) -> dict[str, Any] | None:
        """What a pass has left; None where it isn't done."""
        return read_json(self.folder / f"{name}.json")

    def keep_facts(self, name: str, facts: dict[str, Any]) -> None:
        """Keeps what a pass leaves."""
        write_json(self.folder / f"{name}.json", facts)

    def array(self, name: str) -> np.ndarray | None:
        """An array that a pass has left, on the disk; None where it isn't done."""
        path = self.folder / f"{name}.npy"
        return _mapped(path) if path.exists() else None

    def keep_array(self, name: str, array: np.ndarray) -> None:
        """Keeps an array that a pass leaves."""
        partial = self.folder / f"{name}.npy.partial"
        with partial.open("wb") as file:
            np.save(file, array)
        _flush(partial)
        partial.rename(self.folder / f"{name}.npy")
        sync_folder(self.folder)

    def part_of(self, numbers: np.ndarray) -> np.ndarray:
        """In which part each of these documents is."""
        return np.searchsorted([part.first for part in self.parts], numbers, side="right") - 1


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
