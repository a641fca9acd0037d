"""Python functions that a recipe names: `MODULE:FUNCTION`, or `FILE.py:FUNCTION`.

A recipe is trusted, so what it names is imported and run, in the stage's own process. Whether a stage is stale is
decided by the file that the function is in; what that file imports is not looked at (`--fresh` runs the stage again).
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.errors import MissingInput, UserError


def function_file(reference: str, root: Path) -> Path | None:
    """The file that a function is in: of `FILE.py:FUNCTION`, relative to `root`, or of a module.

    None for a module without a file or that isn't found; nothing is imported.
    """
    place, _, _ = reference.rpartition(":")
    if _is_file(place):
        return root / place
    with _searched(Path.cwd(), first=False):
        spec = _find_module(place)
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def _is_file(place: str) -> bool:
    return place.endswith(".py")


def _find_module(name: str) -> ModuleSpec | None:
    """Where a module is. `find_spec` would import the packages that it lies in."""
    top, *inner = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for part in inner:
            spec = PathFinder.find_spec(part, spec.submodule_search_locations or []) if spec else None
    except (ImportError, ValueError):
        return None
    return spec


@contextmanager
def _searched(folder: Path, *, first: bool) -> Iterator[None]:
    """Within, modules are looked for in this folder too, before or after everything that is installed."""
    name = str(folder)
    if not first and name in sys.path:
        yield
        return
    sys.path.insert(0 if first else len(sys.path), name)
    try:
        yield
    finally:
        sys.path.remove(name)


def check_function(key: str, reference: str, root: Path) -> None:
    """Raises an error that names the key where a reference can't mean a function; imports nothing."""
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise UserError(f"{key}: {reference!r} is neither MODULE:FUNCTION nor FILE.py:FUNCTION")
    if _is_file(place) and not (root / place).is_file():
        raise MissingInput(f"{key}: no file {root / place} (relative paths start at data.root)")


def load_function(key: str, reference: str, root: Path) -> Callable[..., Any]:
    """The function that a recipe names. Raises UserError where it can't be had, with the reason.

    Modules are also looked for in the working folder, after everything that is installed. While a FILE.py is imported,
    its own folder comes first, as for a script; imports within its functions come too late for that.
    """
    check_function(key, reference, root)
    place, _, name = reference.rpartition(":")
    try:
        if _is_file(place):
            with _searched((root / place).resolve().parent, first=True):
                module = _import_file(root / place)
        else:
            with _searched(Path.cwd(), first=False):
                module = importlib.import_module(place)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UserError(f"{key}: {place} can't be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"{key}: {place} has no function {name}")
    return found  # type: ignore[no-any-return]


def _import_file(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_rlhf_plugin_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
