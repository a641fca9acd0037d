"""Python functions that a recipe names: `MODULE:FUNCTION`, or `FILE.py:FUNCTION`.

A recipe is trusted, so what it names is imported and run, in the stage's own process.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.errors import MissingInput, UserError


def function_file(reference: str, root: Path) -> Path | None:
    """The file that `FILE.py:FUNCTION` means, relative to `root`; None for a module's function."""
    place, _, _ = reference.rpartition(":")
    return root / place if place.endswith(".py") else None


def check_function(key: str, reference: str, root: Path) -> None:
    """Raises an error that names the key where a reference can't mean a function; imports nothing."""
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise UserError(f"{key}: {reference!r} is neither MODULE:FUNCTION nor FILE.py:FUNCTION")
    file = function_file(reference, root)
    if file is not None and not file.is_file():
        raise MissingInput(f"{key}: no file {file} (relative paths start at data.root)")


def load_function(key: str, reference: str, root: Path) -> Callable[..., Any]:
    """The function that a recipe names. Raises UserError where it can't be had, with the reason.

    Modules are also looked for in the working folder, after everything that is installed.
    """
    check_function(key, reference, root)
    place, _, name = reference.rpartition(":")
    file = function_file(reference, root)
    try:
        if file is not None:
            spec = importlib.util.spec_from_file_location(f"_rlhf_plugin_{file.stem}", file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.append(str(Path.cwd()))
            try:
                module = importlib.import_module(place)
            finally:
                sys.path.pop()
    except Exception as error:  # whatever the user's module raises while it is imported
        raise UserError(f"{key}: {place} can't be imported: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"{key}: {place} has no function {name}")
    return found  # type: ignore[no-any-return]
