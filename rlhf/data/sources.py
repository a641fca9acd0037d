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
        self.faults.clear()
        found = False
        for number, source in enumerate(self._sources):
            draw = Draw("weight", self._seed, number)
            times, rest = divmod(source.weight, 1.0)
            for again in range(int(times)):
                # a further pass meets the same bad rows: they are counted once
                for item in self._rows(source, Faults("skip") if again else self.faults):
                    found = True
                    yield item
            for item in self._rows(source, Faults("skip") if times else self.faults) if rest else ():
                if draw.share(rest):
                    found = True
                    yield item
        if not found:
            raise DataError(f"no good row in {', '.join(str(source) for source in self._sources)}: {self._why()}")

    def _why(self) -> str:
        return self.faults.report() or "nothing was left after rows and weight"

    def _rows(self, source: "OpenSource", faults: Faults) -> Iterator[Any]:
        """The items of one source, at most as many as it may give; a bad row does not count towards that."""
        return islice(self._good(source, faults), source.limit)

    def _good(self, source: "OpenSource", faults: Faults) -> Iterator[Any]:
        for row in source.rows(faults):
            try:
                item = self._convert(row.value)
            except Malformed as fault:
                faults.bad(row.path, row.line, str(fault))
                continue
            yield item


class OpenSource:
    """One source with its files found: rows, as often as asked; `limit` is how many good ones may be taken."""

    def __init__(self, name: str, weight: float, rows: Callable[[Faults], Iterator[Row]], limit: int | None) -> None:
        self.name, self.weight, self.rows, self.limit = name, weight, rows, limit

    def __str__(self) -> str:
        return self.name


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
    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more files"
    return OpenSource(name, weight, lambda faults: (row for path in paths for row in read_rows(path, faults)), limit)


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

    return OpenSource(f"hub:{name}", weight, rows, limit)


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
        return (Row(Path(f"tinyworld:{kind}"), number, value) for number, value in enumerate(values(), 1))

    return OpenSource(f"tinyworld:{kind}", weight, rows, limit)


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
