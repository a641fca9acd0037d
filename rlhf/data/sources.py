"""Sources (files, hub data sets, the built-in world) to rows of a stage's kind, weighted and counted."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from rlhf.data.files import source_files
from rlhf.data.reader import Faults, Row, read_rows
from rlhf.data.rows import Kind, Malformed
from rlhf.data.shapes import Shape, to_items
from rlhf.errors import DataError, RecipeError, UserError
from rlhf.recipe import Source
from rlhf.tinyworld import dialogues, documents
from rlhf.tinyworld.words import Draw, Split

T = TypeVar("T")


class DataSet:
    """What a list of sources gives: it can be iterated again and again, and knows what was skipped."""

    def __init__(
        self,
        sources: list["OpenSource"],
        kind: Kind,
        faults: Faults,
        seed: int,
        then: Callable[[Any], Any] | None = None,
    ) -> None:
        """`then` is what a stage makes of each item, such as its token ids, and what the data set gives in its place.

        A UserError that it raises is the fault of that row: named by file and line, stopped at or skipped as any
        other. What would be wrong with every row (a tokenizer without chat template) is to be checked before.
        """
        self._sources, self._kind, self.faults, self._seed, self._then = sources, kind, faults, seed, then

    def __iter__(self) -> Iterator[Any]:
        self.faults.clear()
        found = False
        for number, source in enumerate(self._sources):
            draw = Draw("weight", self._seed, number)
            times, rest = divmod(source.weight, 1.0)
            for again in range(int(times)):
                # a further pass meets the same bad rows: they are counted once
                for items in self._rows(source, Faults("skip") if again else self.faults):
                    found = True
                    yield from items
            for items in self._rows(source, Faults("skip") if times else self.faults) if rest else ():
                if draw.share(rest):
                    found = True
                    yield from items
        if not found:
            raise DataError(f"no good row in {', '.join(str(source) for source in self._sources)}: {self._why()}")

    def _why(self) -> str:
        return self.faults.report() or "nothing was left after rows and weight"

    def _rows(self, source: "OpenSource", faults: Faults) -> Iterator[list[Any]]:
        """The items of each row of one source, of at most as many rows as it may give; a bad row doesn't count."""
        return islice(self._good(source, faults), source.limit)

    def _good(self, source: "OpenSource", faults: Faults) -> Iterator[list[Any]]:
        for row in source.rows(faults):
            try:
                items = to_items(row.value, source.shape, self._kind)
                made = [self._then(item) for item in items] if self._then else items
            except (Malformed, UserError) as fault:
                faults.bad(row.path, row.line, str(fault), row.unit)
                continue
            yield made


class OpenSource:
    """One source with its files found: rows, as often as asked; `limit` is how many good ones may be taken."""

    def __init__(
        self,
        name: str,
        weight: float,
        rows: Callable[[Faults], Iterator[Row]],
        limit: int | None,
        shape: Shape = "trl",
    ) -> None:
        self.name, self.weight, self.rows, self.limit, self.shape = name, weight, rows, limit, shape

    def __str__(self) -> str:
        return self.name


def open_sources(sources: tuple[Source, ...], root: Path, kind: Kind, split: Split, seed: int) -> list[OpenSource]:
    """What a recipe's list of sources means. `split` is the part of the built-in world that may be read."""
    return [_opened(source, root, kind, split, seed) for source in sources]


def _opened(source: Source, root: Path, kind: Kind, split: Split, seed: int) -> OpenSource:
    if source.builtin:
        if source.format != "trl":
            raise RecipeError(f"builtin: {source.builtin} makes rows of TRL's shape; leave out format: {source.format}")
        return from_tinyworld(kind, split, seed, source.rows, source.weight)
    taken = (source.weight, source.rows, source.format)
    if source.hub:
        return from_hub(source.hub, source.subset, source.split, source.streaming, *taken)
    return from_files(source_files(source, root), *taken)


def from_files(paths: list[Path], weight: float = 1.0, limit: int | None = None, shape: Shape = "trl") -> OpenSource:
    """All rows of these files, one file after the other."""
    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more files"

    def rows(faults: Faults) -> Iterator[Row]:
        return (row for path in paths for row in read_rows(path, faults))

    return OpenSource(name, weight, rows, limit, shape)


def from_hub(
    name: str,
    subset: str | None,
    split: str,
    streaming: bool,
    weight: float = 1.0,
    limit: int | None = None,
    shape: Shape = "trl",
) -> OpenSource:
    """The rows of a data set on the hub."""

    def rows(_: Faults) -> Iterator[Row]:
        import datasets

        try:
            found = datasets.load_dataset(name, subset, split=split, streaming=streaming)
        except Exception as error:  # the library raises many kinds: offline, not found, gated, broken
            raise UserError(f"the hub's data set {name} can't be loaded: {error}") from None
        for number, value in enumerate(found, 1):
            yield Row(Path(f"hub:{name}"), number, dict(value), "row")

    return OpenSource(f"hub:{name}", weight, rows, limit, shape)


def from_tinyworld(kind: Kind, split: Split, seed: int, limit: int | None, weight: float = 1.0) -> OpenSource:
    """Rows that the built-in world makes."""

    def values() -> Iterator[dict[str, Any]]:
        if kind == "texts":
            yield from ({"text": text} for text in documents.documents(split, seed))
        elif kind == "conversations":
            for prompt, response in dialogues.dialogues(split, seed):
                yield {"prompt": prompt, "completion": response}
        elif kind == "prompts":
            yield from ({"prompt": prompt} for prompt in dialogues.shuffled_prompts(split, seed, limit))
        else:
            raise DataError("the built-in world has no comparisons in store; `reward.collect` makes them")

    def rows(_: Faults) -> Iterator[Row]:
        return (Row(Path(f"tinyworld:{kind}"), number, value, "row") for number, value in enumerate(values(), 1))

    return OpenSource(f"tinyworld:{kind}", weight, rows, limit)


def shuffled(items: list[T], *seed: object) -> list[T]:
    """The items in an order that depends on the seed alone."""
    return Draw("shuffled", *seed).sample(items, len(items))


__all__ = [
    "DataSet",
    "Kind",
    "OpenSource",
    "from_files",
    "from_hub",
    "from_tinyworld",
    "open_sources",
    "shuffled",
]
