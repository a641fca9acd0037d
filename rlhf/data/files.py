"""Which files a `path:` source means. Imports nothing heavy."""

from pathlib import Path

from rlhf.errors import MissingInput
from rlhf.recipe import Source


def source_files(source: Source, root: Path) -> list[Path]:
    """The files that a `path:` source means, sorted. Raises MissingInput where there is none."""
    if source.path is None:
        return []
    pattern = Path(source.path)
    whole = pattern if pattern.is_absolute() else root / pattern
    try:
        whole.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise MissingInput(f"path {source.path[:100]!r}: {error}") from None
    if whole.is_dir():
        raise MissingInput(f"{whole} is a directory; name its files, for example {source.path}/*.jsonl")
    if whole.is_file():
        return [whole]
    anchor = Path(pattern.anchor) if pattern.is_absolute() else root
    try:
        found = sorted(p for p in anchor.glob(str(pattern.relative_to(pattern.anchor))) if p.is_file())
    except (ValueError, OSError) as error:  # such as a**b
        raise MissingInput(f"path {source.path!r}: {error}") from None
    if not found:
        raise MissingInput(f"no file {whole} (relative paths start at data.root, which is {str(root)!r})")
    return found
