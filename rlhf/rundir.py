"""The directory of a run: where each stage's model, metrics, summary and manifest are. Imports nothing heavy."""

import fcntl
import glob
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlhf.errors import MissingInput, UserError
from rlhf.recipe import STAGES, Recipe, dump_recipe

LOCK = ".lock"


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all: a temporary name, fsync, rename.

    Nothing else is left behind where that fails, and what a process that was killed has left is removed.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    for left in path.parent.glob(f".{glob.escape(path.name)}.tmp*"):
        if not _is_running(left.name.rpartition(".tmp")[2]):
            left.unlink(missing_ok=True)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _is_running(pid: str) -> bool:
    """Whether there is such a process here; what is no number is nobody's to remove."""
    return not pid.isdecimal() or Path(f"/proc/{pid}").exists() or not Path("/proc/self").exists()


def sync_folder(folder: Path) -> None:
    """Makes sure that what was created, renamed or removed in a folder is on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is none (a missing or torn file)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def digest_file(path: Path) -> str:
    """The SHA-256 of a file's bytes; read once, as long as its size and times stay the same."""
    facts = path.stat()
    return _digest_file(path, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)


@lru_cache(maxsize=4096)
def _digest_file(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_folder(folder: Path) -> str:
    """One SHA-256 for the names and bytes of all files directly in a folder (a model directory)."""
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            whole.update(f"{path.name}\0{digest_file(path)}\n".encode())
    return whole.hexdigest()


def digest_tree(folder: Path) -> str:
    """One SHA-256 for the names and bytes of all files in a folder and in those below it; hidden ones apart."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in parts):
            whole.update(f"{'/'.join(parts)}\0{digest_file(path)}\n".encode())
    return whole.hexdigest()


def model_config(directory: Path, key: str = "") -> dict[str, Any]:
    """The config.json of a Hugging Face model directory. Raises MissingInput, which says `key`, where it is none."""
    config = read_json(directory / "config.json")
    if config is not None:
        return config
    said = f"{key}: " if key else ""
    stage = StageDir(directory.absolute().parent)
    if directory.name == "model" and stage.manifest() and stage.summary() is None:
        raise MissingInput(f"{said}{directory} is not there yet: the stage {stage.name} is not complete")
    if (directory / "config.json").is_file():
        raise MissingInput(f"{said}{directory / 'config.json'} can't be read: it holds no JSON object")
    if not directory.is_dir():
        raise MissingInput(f"{said}{directory} is no directory: no config.json, so no Hugging Face model")
    meant = directory / "model"
    hint = f"; did you mean {meant}?" if (meant / "config.json").is_file() else ""
    raise MissingInput(f"{said}{directory} holds no config.json, so it is no Hugging Face model directory{hint}")


def no_room(folder: Path, free: int | None = None, needed: int | None = None) -> str:
    """What to say when the disk is full."""
    figures = f" ({free / 2**20:,.0f} MiB free, {needed / 2**20:,.0f} MiB needed)" if free and needed else ""
    return (
        f"no room on the disk for {folder}{figures}; what was finished, the last checkpoint too, is untouched: free "
        "some space and give the same command again, without --fresh, and the run goes on from there"
    )


def _pid_in(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def files_in(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file directly in a folder: what tells at a glance whether it is as it was."""
    if not folder.is_dir():
        return {}
    found = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
    return {name: [facts.st_size, facts.st_mtime_ns] for name, facts in found.items() if not name.startswith(".")}


@dataclass(frozen=True)
class StageDir:
    """The files of one stage of a run."""

    path: Path

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.path.name

    @property
    def model(self) -> Path:
        """A plain Hugging Face directory."""
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step."""
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        """Exists exactly when the stage is complete."""
        return self.path / "summary.json"

    @property
    def presence(self) -> str:
        """How far it is there."""
        return "complete" if self.summary() else "not complete" if self.path.exists() else "gone"

    @property
    def failure_file(self) -> Path:
        """Why the stage ended without finishing, the last time that it ran; not there where it didn't."""
        return self.path / "failure.txt"

    def failure(self) -> str:
        """What the failure file says; empty where there is none."""
        try:
            return self.failure_file.read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    @property
    def manifest_file(self) -> Path:
        """What went in, and the digest of what came out."""
        return self.path / "manifest.json"

    def summary(self) -> dict[str, Any] | None:
        """The stage's summary, None while it isn't complete."""
        found = read_json(self.summary_file)
        return found if found and found.get("stage") == self.name else None

    def manifest(self) -> dict[str, Any]:
        """What went in; empty where nothing was written yet."""
        found = read_json(self.manifest_file) or {}
        return found if isinstance(found.get("inputs"), dict) else {}

    def damage(self) -> str:
        """How the finished stage's model is not what it was when the stage was completed; empty where it is.

        Files of the same size and time are not read again.
        """
        manifest = self.manifest()
        was, now = manifest.get("files", {}), files_in(self.model)
        if manifest.get("output") and not now:
            return "its model is gone"
        if was == now or not was:
            return ""
        if was.keys() - now.keys():
            return f"its model has lost {', '.join(sorted(was.keys() - now.keys()))}"
        return "" if digest_folder(self.model) == manifest.get("output") else "its model was changed"

    def output_digest(self) -> str | None:
        """The digest of the finished stage's model, None while it isn't complete."""
        return self.manifest().get("output") if self.summary() is not None else None

    def move_aside(self) -> Path:
        """Renames the stage's directory to the first free STAGE.stale-N; nothing is ever deleted."""
        number = 1
        while (target := self.path.with_name(f"{self.name}.stale-{number}")).exists():
            number += 1
        self.path.rename(target)
        return target


@dataclass(frozen=True)
class RunDir:
    """The directory of a run."""

    path: Path

    @classmethod
    def of(cls, recipe: Recipe, runs_dir: Path) -> "RunDir":
        """The run's directory below `runs_dir`, which need not exist. Raises UserError if it would lie elsewhere."""
        path = runs_dir / recipe.name
        if path.is_symlink() and runs_dir.resolve() not in path.resolve().parents:
            raise UserError(f"{path} is a link that leads out of {runs_dir}")
        return cls(path)

    def create(self) -> None:
        """Makes the directory where it isn't there yet. Raises UserError if it can't be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the run's directory {self.path} can't be made: {error.strerror}") from None

    def holder(self) -> int | None:
        """The pid of the process that holds the lock, None where nobody does."""
        try:
            with (self.path / LOCK).open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _pid_in(self.path / LOCK)
        except OSError:
            return None
        return None

    def check_free(self) -> None:
        """Raises UserError, with the holder's pid, where another process has the lock now."""
        holder = self.holder()
        if holder is not None:
            raise self._in_use(holder)

    def _in_use(self, holder: int | None) -> UserError:
        return UserError(
            f"{self.path} is in use by another rlhf run (pid {holder}); wait until it ends, or give this run another "
            "name (name=...)"
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the directory's lock. Raises UserError, with the holder's pid, where another process has it.

        The system gives the lock back when its holder ends, however it ends.
        """
        try:
            file = (self.path / LOCK).open("a+", encoding="ascii")
        except OSError as error:
            raise UserError(f"the run's directory {self.path} can't be written: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._in_use(_pid_in(self.path / LOCK)) from None
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def stage(self, name: str) -> StageDir:
        """The directory of one stage (it need not exist)."""
        return StageDir(self.path / name)

    @property
    def labels(self) -> Path:
        """Where a person's comparisons are kept: preference files."""
        return self.path / "labels"

    @property
    def trackers(self) -> Path:
        """Where trackers that write files keep them."""
        return self.path / "trackers"

    def write_recipe(self, recipe: Recipe) -> None:
        """Saves the resolved recipe."""
        write_atomically(self.path / "recipe.yaml", dump_recipe(recipe))

    @property
    def summary_file(self) -> Path:
        """The summaries of all complete stages."""
        return self.path / "summary.json"

    def write_summary(self) -> None:
        """Gathers the summaries of all complete stages into one file."""
        summaries = {stage: self.stage(stage).summary() for stage in STAGES}
        found = {stage: summary for stage, summary in summaries.items() if summary}
        if read_json(self.summary_file) != found:
            write_json(self.summary_file, found)
