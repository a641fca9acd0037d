"""Sources (files, hub data sets, the built-in world) to rows of a stage's kind, weighted and counted."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

from rlhf.data.files import source_files
from rlhf.data.reader import Faults, Row, read_rows
from rlhf.data.rows import Malformed, to_comparison, to_conversation, to_prompt, to_text
from rlhf.errors import DataError, UserError
from rlhf.recipe import Source
from rlhf.tinyworld import dialogues, documents
from rlhf.tinyworld.words import Draw, Split

T = TypeVar("T")
Kind = Literal["texts", "conversations", "prompts", "comparisons"]


class DataSet:
    """What a list of sources gives: it can be iterated again and again, and knows what was skipped."""

    def __init__(
        self,
        sources: list["OpenSource"],
        convert: Callable[[dict[str, Any]], T],
        faults: Faults,
        seed: int,
    ) -> None:
        self._sources, self._convert, self.faults, self._seed = sources, convert, faults, seed

    def __iter__(self) -> Iterator[Any]:
        self.faults.counts.clear()
        for number, source in enumerate(self._sources):
            draw = Draw("weight", self._seed, number)
            times, rest = divmod(source.weight, 1.0)
            for _ in range(int(times)):
                yield from self._rows(source)
            if rest:
                yield from (item for item in self._rows(source) if draw.share(rest))

    def _rows(self, source: "OpenSource") -> Iterator[Any]:
        for row in source.rows(self.faults):
            try:
                item = self._convert(row.value)
            except Malformed as fault:
                self.faults.bad(row.path, row.line, str(fault))
                continue
            yield item


class OpenSource:
    """One source with its files found: rows, as often as asked."""

    def __init__(self, weight: float, rows: Callable[[Faults], Iterator[Row]], limit: int | None) -> None:
        self.weight, self._rows, self._limit = weight, rows, limit

    def rows(self, faults: Faults) -> Iterator[Row]:
        """The source's rows, at most as many as the recipe says."""
        return islice(self._rows(faults), self._limit)


def open_sources(sources: tuple[Source, ...], root: Path, kind: Kind, split: Split, seed: int) -> list[OpenSource]:
    """What a recipe's list of sources means. `split` is the part of the built-in world that may be read."""
    opened = []
    for source in sources:
        if source.builtin:
            opened.append(from_tinyworld(kind, split, seed, source.rows, source.weight))
        elif source.hub:
            opened.append(
                from_hub(source.hub, source.subset, source.split, source.streaming, source.weight, source.rows)
            )
        else:
            opened.append(from_files(source_files(source, root), source.weight, source.rows))
    return opened


def from_files(paths: list[Path], weight: float = 1.0, limit: int | None = None) -> OpenSource:
    """All rows of these files, one file after the other."""
    return OpenSource(weight, lambda faults: (row for path in paths for row in read_rows(path, faults)), limit)


def from_hub(
    name: str, subset: str | None, split: str, streaming: bool, weight: float = 1.0, limit: int | None = None
) -> OpenSource:
    """The rows of a data set on the hub."""

    def rows(_: Faults) -> Iterator[Row]:
        import datasets

        try:
            found = datasets.load_dataset(name, subset, split=split, streaming=streaming)
        except Exception as error:  # the library raises many kinds: offline, not found, gated, broken
            raise UserError(f"the hub's data set {name} can't be loaded: {error}") from None
        for number, value in enumerate(found, 1):
            yield Row(Path(f"hub:{name}"), number, dict(value))

    return OpenSource(weight, rows, limit)


def from_tinyworld(kind: Kind, split: Split, seed: int, limit: int | None, weight: float = 1.0) -> OpenSource:
    """Rows that the built-in world makes."""

    def values() -> Iterator[dict[str, Any]]:
        if kind == "texts":
            yield from ({"text": text} for text in documents.documents(split, seed))
        elif kind == "conversations":
            for prompt, response in dialogues.dialogues(split, seed, limit or 0):
                yield {"prompt": prompt, "completion": response}
        elif kind == "prompts":
            yield from ({"prompt": prompt} for prompt in dialogues.shuffled_prompts(split, seed, limit))
        else:
            raise DataError("the built-in world has no comparisons in store; `reward.collect` makes them")

    def rows(_: Faults) -> Iterator[Row]:
        return (Row(Path(f"tinyworld:{kind}"), number, value) for number, value in enumerate(values(), 1))

    return OpenSource(weight, rows, limit)


def texts(sources: list[OpenSource], faults: Faults, seed: int) -> DataSet:
    """Documents."""
    return DataSet(sources, to_text, faults, seed)


def conversations(sources: list[OpenSource], faults: Faults, seed: int) -> DataSet:
    """Conversations that end with the assistant."""
    return DataSet(sources, to_conversation, faults, seed)


def prompts(sources: list[OpenSource], faults: Faults, seed: int) -> DataSet:
    """Prompts that end with the user."""
    return DataSet(sources, to_prompt, faults, seed)


def comparisons(sources: list[OpenSource], faults: Faults, seed: int) -> DataSet:
    """Comparisons of two responses to one prompt."""
    return DataSet(sources, to_comparison, faults, seed)


def shuffled(items: list[T], *seed: object) -> list[T]:
    """The items in an order that depends on the seed alone."""
    return Draw("shuffled", *seed).sample(items, len(items))


__all__ = [
    "DataSet",
    "OpenSource",
    "comparisons",
    "conversations",
    "from_files",
    "from_hub",
    "from_tinyworld",
    "open_sources",
    "prompts",
    "shuffled",
    "texts",
]
