"""Checkpoints: what resuming needs, written so that a crash at any moment leaves the last good one whole.

    checkpoints/
      step-200/
        checkpoint.json      written last: the step, small facts, size and SHA-256 of every other file
        NAME.json            the shape of a tree of state; its tensors are in
        NAME.safetensors     tensors alone, no code
        NAME.R-of-N.safetensors  of tensors that N processes hold in pieces, those of process R
      step-400.partial/      being written, or left by a crash: never read, removed by the next one

A checkpoint is written under a temporary name; its files are flushed to the disk, their checksums added, and the
folder renamed, which is atomic. A checkpoint that doesn't match its checksums is reported and passed over.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.errors import StageFailed
from rlhf.rundir import digest_file, no_room, sync_folder
from rlhf.runtime import log

SEAL = "checkpoint.json"
SPARE_BYTES = 64 * 2**20  # left free beside a checkpoint, for the metrics and the model that come after it


class Checkpoint(NamedTuple):
    """A checkpoint that matches its checksums."""

    path: Path
    step: int
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one stage, in one folder."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; damaged ones are reported and passed over."""
        for path in self._sealed():
            fault, found = _read(path)
            if found:
                return found
            log(f"the checkpoint {path} is damaged ({fault}) and passed over")
            aside = path.with_name(f"{path.name}.damaged")
            _remove(aside)
            path.rename(aside)
        return None

    def begin(self, step: int, expected: int = 0) -> Path:
        """An empty folder for a checkpoint of this step, of about so many bytes.

        Raises StageFailed where the disk has no room for it.
        """
        for left in self._folder.glob("*.partial"):
            _remove(left)
        self._check_room(expected)
        path = self._folder / f"step-{step}.partial"
        path.mkdir(parents=True)
        return path

    def seal(self, path: Path, facts: dict[str, Any]) -> Checkpoint:
        """Makes a folder that `begin` gave, and that has been filled since, a checkpoint; removes the oldest ones."""
        step = int(path.name.removesuffix(".partial").removeprefix("step-"))
        files = sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            _flush(file)
        sums = {str(file.relative_to(path)): [file.stat().st_size, digest_file(file)] for file in files}
        seal = path / SEAL
        body = {"step": step, "facts": facts, "files": sums}
        seal.write_text(json.dumps({**body, "sha256": _digest(body)}), encoding="utf-8")
        _flush(seal)
        sync_folder(path)
        target = path.with_name(f"step-{step}")
        _remove(target)  # only something damaged can be here: a whole one would have been gone on from
        path.rename(target)
        sync_folder(self._folder)
        self._prune(target)
        return Checkpoint(target, step, facts)

    def forget_after(self, step: int) -> None:
        """Removes the checkpoints of later steps: they are of a course that was given up."""
        for path in self._sealed():
            if int(path.name.removeprefix("step-")) > step:
                _remove(path)

    def discard(self, path: Path) -> None:
        """Removes what has been written of a checkpoint that can't be finished."""
        shutil.rmtree(path, ignore_errors=True)

    def _sealed(self) -> list[Path]:
        """The folders that were sealed once, the newest first."""
        if not self._folder.is_dir():
            return []
        found = [path for path in self._folder.iterdir() if re.fullmatch("step-[0-9]+", path.name) and path.is_dir()]
        return sorted(found, key=lambda path: -int(path.name.removeprefix("step-")))

    def _prune(self, newest: Path) -> None:
        """Keeps the newest ones. The one just sealed is whole, so what is removed is never the last good one."""
        for path in [path for path in self._sealed() if path != newest][self._keep - 1 :]:
            _remove(path)

    def _check_room(self, expected: int) -> None:
        """The new checkpoint will be as large as expected, or as the last one."""
        for path in self._sealed()[:1]:
            expected = max(expected, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if expected and free < expected + SPARE_BYTES:
            raise StageFailed(no_room(self._folder, free, expected + SPARE_BYTES))


def _remove(path: Path) -> None:
    """Removes a folder, a file or a link (not what it leads to), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(path: Path) -> tuple[str, Checkpoint | None]:
    """The checkpoint in a folder, or what is wrong with it."""
    try:
        body = json.loads((path / SEAL).read_text(encoding="utf-8"))
        if body.pop("sha256") != _digest(body):
            return f"{SEAL} doesn't match its own checksum", None
        step, facts, files = int(body["step"]), dict(body["facts"]), dict(body["files"])
        for name, (size, digest) in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing", None
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} bytes, not {size:,}", None
            if digest_file(file) != digest:
                return f"{name} doesn't match its checksum", None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{SEAL}: {type(error).__name__}: {error}", None
    return "", Checkpoint(path, step, facts)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


# Trees of state: dictionaries and lists of tensors and plain values, as state_dict() gives


@dataclass(frozen=True)
class Piece:
    """What one process holds of a tensor that all of them hold together, cut along its first dimension.

    Each has as many rows, but for the last ones, which have what is left: `rows_of` says which.
    """

    local: Tensor
    shape: tuple[int, ...]  # of the whole tensor
    rank: int
    size: int  # processes


def rows_of(rows: int, rank: int, size: int) -> range:
    """Which of so many rows a process holds; the same as torch.chunk."""
    each = -(-rows // size)
    return range(min(rank * each, rows), min((rank + 1) * each, rows))


def save_pieces(tree: Any, folder: Path, name: str) -> None:
    """Writes this process's pieces of a tree; every process does, beside the first one's `save_tree`."""
    pieces = list(_pieces_in(tree))
    if pieces:
        alone = _owning()
        tensors = {str(number): alone(piece.local.detach()) for number, piece in enumerate(pieces)}
        save_file(tensors, folder / _pieces_file(name, pieces[0].rank, pieces[0].size))


def _pieces_file(name: str, rank: int, size: int) -> str:
    return f"{name}.{rank}-of-{size}.safetensors"


def _pieces_in(tree: Any) -> Iterator[Piece]:
    if isinstance(tree, Piece):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for inner in tree.values() if isinstance(tree, dict) else tree:
            yield from _pieces_in(inner)


def _owning() -> Callable[[Tensor], Tensor]:
    """Makes each tensor the one owner of its memory, as safetensors wants it; copies only what shares that.

    Weights that were read from a file are parts of the file's memory, and are written from there.
    """
    storages: set[int] = set()
    parts: list[tuple[int, int]] = []  # of larger memories, from where to where

    def alone(whole: Tensor) -> Tensor:
        found = whole.cpu().contiguous()
        storage = found.untyped_storage()
        if storage.nbytes() == found.numel() * found.element_size() and storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            return found
        first = found.data_ptr()
        if found.numel() and not any(start < first + found.nbytes and first < end for start, end in parts):
            parts.append((first, first + found.nbytes))
            bytes_ = torch.from_numpy(found.flatten().view(torch.uint8).numpy())
            return bytes_.view(found.dtype).view(found.shape)
        return found.clone()

    return alone


def save_tree(tree: Any, folder: Path, name: str) -> None:
    """Writes a tree as NAME.safetensors and NAME.json. Tensors that share their memory are written once.

    Of pieces it notes their places alone; see `save_pieces`.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[tuple[Any, ...], str] = {}
    alone = _owning()
    pieces = itertools.count()

    def packed(value: Any) -> Any:
        if isinstance(value, Piece):
            return {"piece": [str(next(pieces)), list(value.shape), value.size]}
        if isinstance(value, Tensor):
            whole = value.detach()
            identity = _identity(whole)
            if whole.numel() == 0 or identity not in places:
                places[identity] = str(len(tensors))
                tensors[places[identity]] = alone(whole)
            return {"tensor": places[identity]}
        if isinstance(value, dict):
            return {"map": [[packed(key), packed(inner)] for key, inner in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [packed(inner) for inner in value]}
        if isinstance(value, list):
            return {"list": [packed(inner) for inner in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise TypeError(f"a checkpoint can't hold a {type(value).__name__}")

    shape = packed(tree)
    save_file(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps(shape), encoding="utf-8")


def load_tree(folder: Path, name: str, share: tuple[int, int] = (0, 1)) -> Any:
    """The tree that `save_tree` wrote, its tensors on the CPU.

    Pieces are put together anew, by however many processes they were written: as those of process `share[0]` of
    `share[1]`, and whole where there is one.
    """
    tensors = load_file(folder / f"{name}.safetensors")
    rank, size = share

    def piece(key: str, shape: list[int], writers: int) -> Piece | Tensor:
        local = _rows(folder, name, key, writers, shape[0], rows_of(shape[0], rank, size))
        return local if size == 1 else Piece(local, tuple(shape), rank, size)

    def unpacked(node: dict[str, Any]) -> Any:
        ((kind, value),) = node.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "piece":
            return piece(*value)
        if kind == "map":
            return {unpacked(key): unpacked(inner) for key, inner in value}
        if kind == "tuple":
            return tuple(unpacked(inner) for inner in value)
        if kind == "list":
            return [unpacked(inner) for inner in value]
        return value

    return unpacked(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def _rows(folder: Path, name: str, key: str, writers: int, rows: int, wanted: range) -> Tensor:
    """These rows of a tensor of so many that lies in pieces, read from the files that hold some of them."""
    found = []
    for writer in range(writers):
        theirs = rows_of(rows, writer, writers)
        start, stop = max(theirs.start, wanted.start), min(theirs.stop, wanted.stop)
        if start < stop or (writer == 0 and not wanted):  # of no rows as well: its dtype, and the other dimensions
            with safe_open(folder / _pieces_file(name, writer, writers), "pt") as file:
                found.append(file.get_slice(key)[start - theirs.start : max(start, stop) - theirs.start])
    return torch.cat(found)


def copy_tree(tree: Any) -> Any:
    """The same tree with tensors of its own, on the CPU; what was one tensor twice, as tied weights are, stays one."""
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Piece):
            return dataclasses.replace(value, local=copied(value.local))
        if isinstance(value, Tensor):
            identity = _identity(value)
            if value.numel() == 0 or identity not in copies:
                copies[identity] = value.detach().to("cpu", copy=True)
            return copies[identity]
        if isinstance(value, dict):
            return {key: copied(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(copied, value))
        return value

    return copied(tree)


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Two tensors with the same are the same numbers in the same memory."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


# Random states of a process


def random_state() -> dict[str, Any]:
    """The states of all generators that libraries draw from in this process."""
    kind, keys, place, has_gauss, gauss = np.random.get_state()  # the one that libraries use
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(place), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what `random_state` gave."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


class Cadence:
    """When a checkpoint is due: every so many steps, and when so many minutes have gone since the last one."""

    def __init__(self, steps: int | None, minutes: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._seconds, self._clock = steps, minutes * 60, clock
        self._last = clock()

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be written after this step."""
        by_steps = self._steps is not None and step % self._steps == 0
        return by_steps or self._clock() - self._last >= self._seconds

    def written(self) -> None:
        """Tells that one has just been written."""
        self._last = self._clock()
