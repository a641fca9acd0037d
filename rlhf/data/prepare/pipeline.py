"""A corpus from a recipe's texts: read and treated, duplicates found, packed; each pass goes on where it was killed.

corpus/
  tokens.bin, documents.bin   rlhf.data.prepare.packing
  removed.jsonl               every row that isn't used, and why
  decontaminated.jsonl        those that have words of test items, with the items
  card.json                   written last: it exists exactly when the corpus is complete
  work/                       rlhf.data.prepare.store; gone when the corpus is complete
"""

import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

import rlhf
from rlhf.data.prepare.card import (
    DECONTAMINATED,
    EQUAL,
    NEAR,
    REMOVED,
    Owners,
    card,
    decontaminated_lines,
    plain_card,
    removed_lines,
    write_lines,
)
from rlhf.data.prepare.duplicates import DROPPED, equal_texts, near_duplicates
from rlhf.data.prepare.incontext import InContext
from rlhf.data.prepare.packing import Document, Packer, pack_store
from rlhf.data.prepare.reading import read_all
from rlhf.data.prepare.store import Store
from rlhf.data.prepare.treatment import Steps
from rlhf.data.prepare.workers import Workers
from rlhf.data.sources import DataSet
from rlhf.errors import DataError
from rlhf.runtime import Bar, log


class Plan(NamedTuple):
    """What is made of which texts."""

    dataset: DataSet  # texts
    sources: Sequence[str]  # their names, all different
    weights: Sequence[float]
    tokenizer: PreTrainedTokenizerBase
    seed: int  # of the weights' draws
    steps: Steps = Steps()
    equal: bool = False  # whether equal texts are dropped
    changed: float | None = None  # share of words in which near duplicates differ; None: they stay
    owners: Owners | None = None  # of the runs of words in `steps.items`
    incontext: tuple[InContext, float] | None = None
    processes: int = 1


def pack_texts(folder: Path, plan: Plan) -> dict[str, Any]:
    """Packs texts as they are, in one pass; their card."""
    started = time.monotonic()
    files: dict[str, int] = {}

    def documents() -> Iterator[Document]:
        for good in plan.dataset.weighted():
            file = files.setdefault(str(good.row.path), len(files))
            for text in good.items:
                yield Document(good.source, file, good.row.line, text)

    packer = Packer(folder, plan.tokenizer, {})
    with Bar("corpus: packing", None) as bar:
        packer.write(documents(), lambda total: bar.show(total.documents, tokens=total.tokens))
    packer.close()
    return {
        **plain_card(plan.sources, plan.weights, packer.counts),
        "bad_rows": sum(plan.dataset.faults.counts.values()),
        "files": list(files),
        "seconds": {"packing": round(time.monotonic() - started, 2)},
    }


def prepare_texts(folder: Path, plan: Plan) -> dict[str, Any]:
    """Prepares texts; their card. What a killed run has left in the folder is used.

    Raises DataError for a bad row that stops the reading, and where nothing is left.
    """
    store = _opened(folder / "work")
    with Workers(plan.processes, plan.steps) as workers:
        with _timed(store, "reading"):
            reading = read_all(store, plan.dataset, workers, "corpus: reading")
        if not reading["rows"]:
            raise plan.dataset.nothing("they are empty")
        dropped: dict[str, np.ndarray] = {}
        gone = np.zeros(store.documents, dtype=bool)
        if plan.equal:
            with _timed(store, "equal texts"):
                dropped[EQUAL] = equal_texts(store)
            gone[dropped[EQUAL]["document"]] = True
        if plan.changed is not None:
            with _timed(store, "near duplicates"):
                equal = dropped.get(EQUAL, np.zeros(0, DROPPED))
                dropped[NEAR] = near_duplicates(store, equal, plan.changed, workers)
            gone[dropped[NEAR]["document"]] = True
    if gone.all():
        reasons = ", ".join(sorted({line["why"] for line in removed_lines(store, plan.sources, dropped)}))
        told = f"all {reading['rows']:,} documents of {', '.join(plan.sources)} were removed ({reasons})"
        raise DataError("; ".join(filter(None, [told, reading["faults"]])) + ": see pretrain.prepare")
    with _timed(store, "packing"):
        counts = pack_store(
            store, folder, plan.tokenizer, gone, plan.weights, plan.seed, plan.incontext, "corpus: packing"
        )
    if not sum(count.documents for count in counts.values()):
        raise plan.dataset.nothing("nothing was left after rows and weight")
    write_lines(folder / REMOVED, removed_lines(store, plan.sources, dropped))
    listed = decontaminated_lines(removed_lines(store, plan.sources, dropped), plan.owners or {})
    write_lines(folder / DECONTAMINATED, listed)
    found = card(store, plan.sources, plan.weights, counts, dropped)
    if plan.incontext:
        made = plan.incontext[0]
        found["incontext"] = {
            "tasks": made.tasks,
            "shots_left_out": made.left_out,
            "rows_held_back": made.held_back,
        }
    found |= {"files": [path for path, _ in store.files()], "seconds": store.facts("seconds")}
    return {**found, "processes": plan.processes}


def _opened(folder: Path) -> Store:
    """The store of an interrupted run, or an empty one; what other versions have left in it can't be gone on with."""
    versions = {name: version(name) for name in ("ftfy", "numpy", "rensa")}
    versions |= {"python": platform.python_version(), "rlhf": rlhf.__version__}
    store = Store(folder)
    if store.parts and store.facts("versions") != versions:
        log("corpus: what was done before it was interrupted was done by other versions, so it begins again")
        shutil.rmtree(folder)
        store = Store(folder)
    store.keep_facts("versions", versions)
    return store


@contextmanager
def _timed(store: Store, name: str) -> Iterator[None]:
    """Adds the time to what a pass has taken; what a run took that was killed in it is not known."""
    started = time.monotonic()
    yield
    spent = store.facts("seconds") or {}
    store.keep_facts("seconds", {**spent, name: round(spent.get(name, 0.0) + time.monotonic() - started, 2)})


def finish(folder: Path) -> None:
    """Removes what only the work needed."""
    shutil.rmtree(folder / "work", ignore_errors=True)
