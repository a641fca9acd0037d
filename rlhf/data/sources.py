"""Sources (files, hub data sets, the built-in world) to rows of a stage's kind, weighted and counted."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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
        self._given = [0] * len(sources)  # rows of each source so far

    def __iter__(self) -> Iterator[Any]:
        return (item for good in self.weighted() for item in good.items)

    def weighted(self) -> Iterator["Good"]:
        """Every good row, as often as its source's weight says."""
        self.faults.clear()
        found = False
        for number, source in enumerate(self._sources):
            draw = Draw("weight", self._seed, number)
            times, rest = divmod(source.weight, 1.0)
            for again in range(int(times)):
                # a further pass meets the same bad rows: they are counted once
                for row in self._rows(number, Faults("skip") if again else self.faults):
                    found = True
                    yield row
            for row in self._rows(number, Faults("skip") if times else self.faults) if rest else ():
                if draw.share(rest):
                    found = True
                    yield row
        if not found:
            raise self.nothing("nothing was left after rows and weight")

    def once(self) -> Iterator["Good"]:
        """Every good row once, whatever the weights."""
        self.faults.clear()
        for number in range(len(self._sources)):
            yield from self._rows(number, self.faults)

    def nothing(self, otherwise: str) -> DataError:
        """What to raise where no row is left; `otherwise` is why, if none was bad."""
        names = ", ".join(str(source) for source in self._sources)
        return DataError(f"no good row in {names}: {self.faults.report() or otherwise}")

    def share_read(self, limits: Sequence[int | None]) -> float | None:
        """About which share of the rows one iteration gave out, if the sources had these limits in place of their own.

        By the bytes of files, and by what a data set on the hub says of itself; None where it doesn't.
        """
        there = 0.0
        for source, given, limit in zip(self._sources, self._given, limits, strict=True):
            passes = math.ceil(source.weight)
            all_read = source.limit is None or given < source.limit * passes
            rows = given / passes if all_read else source.about(given)
            if limit is None and rows is None:
                return None
            there += passes * min(each for each in (rows, limit) if each is not None)
        return sum(self._given) / there

    @property
    def read(self) -> int:
        """How many bytes of its files have been read."""
        return sum(source.read for source in self._sources)

    @property
    def size(self) -> int | None:
        """How many bytes one pass over the rows reads; None where they are not all rows of files."""
        sizes = [source.size for source in self._sources if source.limit is None]
        return None if len(sizes) < len(self._sources) or None in sizes else sum(size or 0 for size in sizes)

    @property
    def limit(self) -> int | None:
        """How many rows there are at most; None where a source has no limit."""
        limits = [source.limit for source in self._sources]
        return None if None in limits else sum(limit or 0 for limit in limits)

    def _rows(self, number: int, faults: Faults) -> Iterator["Good"]:
        """Each row of one source with its items, at most as many rows as it may give; a bad row doesn't count."""
        for row in islice(self._good(number, faults), self._sources[number].limit):
            self._given[number] += 1
            yield row

    def _good(self, number: int, faults: Faults) -> Iterator["Good"]:
        source = self._sources[number]
        for row in source.rows(faults):
            try:
                items = to_items(row.value, source.shape, self._kind)
                made = [self._then(item) for item in items] if self._then else items
            except (Malformed, UserError) as fault:
                faults.bad(row.path, row.line, str(fault), row.unit)
                continue
            yield Good(number, row, made)


class Good(NamedTuple):
    """A good row."""

    source: int  # its place in the list of sources
    row: Row
    items: list[Any]  # what it gives


class OpenSource:
    """One source with its files found: rows, as often as asked; `limit` is how many good ones may be taken."""

    def __init__(
        self,
        name: str,
        weight: float,
        rows: Callable[[Faults], Iterator[Row]],
        limit: int | None,
        shape: Shape = "trl",
        size: int | None = None,
    ) -> None:
        """`size` is that of its files in bytes, where there are any."""
        self.name, self.weight, self.rows, self.limit, self.shape, self.size = name, weight, rows, limit, shape, size
        self.read = 0
        self.total: int | None = None  # rows, where the data set says it

    def count(self, size: int) -> None:
        """Tells that so many bytes of its files were read."""
        self.read += size

    def about(self, given: int) -> float | None:
        """How many rows one pass gives, about, if so many were given out so far; None: nobody knows."""
        if self.total is not None:
            return float(self.total)
        return given * max(1.0, self.size / self.read) if self.size and self.read else None

    def __str__(self) -> str:
        return self.name


def open_sources(
    sources: tuple[Source, ...], root: Path, kind: Kind, split: Split, seed: int, *, split_texts: bool = False
) -> list[OpenSource]:
    """What a recipe's list of sources means. `split` is the part of the built-in world that may be read.

    With `split_texts` a large plain text file is several documents; see rlhf.data.reader.
    """
    return [_opened(source, root, kind, split, seed, split_texts) for source in sources]


def _opened(source: Source, root: Path, kind: Kind, split: Split, seed: int, split_texts: bool) -> OpenSource:
    if source.builtin:
        if source.format != "trl":
            raise RecipeError(f"builtin: {source.builtin} makes rows of TRL's shape; leave out format: {source.format}")
        return from_tinyworld(kind, split, seed, source.rows, source.weight)
    taken = (source.weight, source.rows, source.format)
    if source.hub:
        return from_hub(source.hub, source.subset, source.split, source.streaming, *taken)
    return from_files(source_files(source, root), *taken, split_texts=split_texts)


def from_files(
    paths: list[Path],
    weight: float = 1.0,
    limit: int | None = None,
    shape: Shape = "trl",
    *,
    split_texts: bool = False,
) -> OpenSource:
    """All rows of these files, one file after the other."""
    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more files"

    def rows(faults: Faults) -> Iterator[Row]:
        return (row for path in paths for row in read_rows(path, faults, found.count, split_texts=split_texts))

    found = OpenSource(name, weight, rows, limit, shape, sum(path.stat().st_size for path in paths))
    return found


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
            raise UserError(
                f"the hub's data set {name} can't be loaded: {error}\n(a folder of that name where you are, or `path:` "
                "with files in its place, needs no network)"
            ) from None
        opened.total = _rows_of(found, split)
        for number, value in enumerate(found, 1):
            yield Row(Path(f"hub:{name}"), number, dict(value), "row")

    opened = OpenSource(f"hub:{name}", weight, rows, limit, shape)
    return opened


def _rows_of(found: Any, split: str) -> int | None:
    """How many rows a data set says it has: a stream does where its card tells."""
    with suppress(TypeError):
        return len(found)
    told = (found.info.splits or {}).get(split)
    return told.num_examples if told else None


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
