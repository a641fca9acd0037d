"""The data card: documents, bytes and tokens in and out by source and by reason, with examples, as plain values.

Tokens of what was removed are never made: they are estimated from its bytes, by the bytes per token of what is kept of
the same source (of all, where nothing is), and stand there as `tokens_estimated`.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.data.prepare.packing import Counts
from rlhf.data.prepare.store import Store
from rlhf.data.prepare.treatment import CONTAMINATED, EXAMPLES, LONGEST_EXAMPLE

MADE = "made of few-shot tasks"
EQUAL, NEAR = "exact_duplicates", "near_duplicates"
REMOVED, DECONTAMINATED = "removed.jsonl", "decontaminated.jsonl"

Owners = Mapping[str, Sequence[tuple[str, int]]]  # run of words -> tasks and numbers of the items that have it


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, a second one of the same as `NAME (2)`."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def plain_card(sources: Sequence[str], weights: Sequence[float], counts: Mapping[int, Counts]) -> dict[str, Any]:
    """The card of texts that were packed as they are."""
    return {
        "prepared": False,
        "out": _written(sum_of(counts)),
        "sources": {
            name: {"weight": weight, "out": _written(counts.get(number, Counts()))}
            for number, (name, weight) in enumerate(zip(sources, weights, strict=True))
        },
    }


def sum_of(counts: Mapping[int, Counts]) -> Counts:
    """Everything together."""
    found = Counts()
    for one in counts.values():
        found = found.plus(one)
    return found


def _written(counts: Counts) -> dict[str, Any]:
    found: dict[str, Any] = counts._asdict()
    if counts.tokens:
        found["bytes_per_token"] = round(counts.bytes / counts.tokens, 4)
    return found


def card(
    store: Store,
    sources: Sequence[str],
    weights: Sequence[float],
    counts: Mapping[int, Counts],
    dropped: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """The card of prepared texts. `dropped` are the duplicates of each kind; `counts` what was written."""
    tally = _tally(store, dropped)
    rates = {number: one.bytes / one.tokens for number, one in counts.items() if one.tokens}
    all_rates = sum_of(counts)
    overall = all_rates.bytes / max(all_rates.tokens, 1)

    def figures(what: str, chosen: Sequence[int]) -> dict[str, Any]:
        sizes = {number: tally[what].get(number, (0, 0)) for number in chosen}
        tokens = sum(size / rates.get(number, overall) for number, (_, size) in sizes.items() if overall)
        documents, size = (sum(values) for values in zip(*sizes.values(), strict=True))
        return {"documents": documents, "bytes": size, "tokens_estimated": round(tokens)}

    everyone = range(len(sources))
    reasons = [what for what in tally if what != "read"]
    found_examples = examples(store, dropped)
    reading = store.facts("read") or {}
    return {
        "prepared": True,
        "in": figures("read", everyone),
        "out": _written(sum_of(counts)),
        "bad_rows": sum(reading.get("bad_rows", {}).values()),
        "sources": {
            name: {
                "weight": weights[number],
                "in": figures("read", [number]),
                "out": _written(counts.get(number, Counts())),
                "removed": {what: figures(what, [number])["documents"] for what in reasons if number in tally[what]},
            }
            for number, name in enumerate(sources)
        }
        | ({MADE: {"out": _written(counts[len(sources)])}} if len(sources) in counts else {}),
        "removed": {what: {**figures(what, everyone), "examples": found_examples.get(what, [])} for what in reasons},
        "cleaned": _summed(store, "cleaned"),
        "masked": _summed(store, "masked"),
        "masked_documents": _summed(store, "masked_texts"),
    }


def _tally(store: Store, dropped: Mapping[str, np.ndarray]) -> dict[str, dict[int, tuple[int, int]]]:
    """(documents, bytes) by source: `read`, and removed by each reason."""
    sums: dict[str, Counter[tuple[str, int]]] = {"read": Counter()}
    for part in store.parts:
        for what, counts in part.facts["counts"].items():
            if what != "read" and not what.startswith("removed "):
                continue
            for key, count in counts.items():
                kind, _, source = key.partition(" ")
                sums.setdefault(what.removeprefix("removed "), Counter())[kind, int(source)] += count
    for what, rows in dropped.items():
        documents = rows["document"].astype(np.int64)
        owners = store.part_of(documents) if store.parts else documents
        for owner in np.unique(owners).tolist():
            gone = store.parts[owner].rows[documents[owners == owner] - store.parts[owner].first]
            for source in np.unique(gone["source"]).tolist():
                mine = gone[gone["source"] == source]
                sums.setdefault(what, Counter()).update(
                    {("documents", source): len(mine), ("bytes", source): int(mine["size"].sum())}
                )
    return {
        what: {source: (counts["documents", source], counts["bytes", source]) for _, source in counts}
        for what, counts in sums.items()
    }


def _summed(store: Store, name: str) -> dict[str, int]:
    found: Counter[str] = Counter()
    for part in store.parts:
        found.update(part.facts["counts"].get(name, {}))
    return dict(sorted(found.items()))


# What was removed


def removed_lines(store: Store, sources: Sequence[str], dropped: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """A line for every row that isn't used: file, row, source, why; the beginning of some of them."""
    for part in store.parts:
        with (part.path / "removed.jsonl").open(encoding="utf-8") as file:
            for line in file:
                found = json.loads(line)
                yield {**found, "source": sources[found["source"]]}
    files = store.files()
    for what, rows in dropped.items():
        for row in rows:
            place, of = (_place(store, files, sources, int(row[side])) for side in ("document", "of"))
            yield {**place, "why": what, "value": round(float(row["similarity"]), 4), "of": of}


def _place(store: Store, files: Sequence[Sequence[str]], sources: Sequence[str], document: int) -> dict[str, Any]:
    part = store.parts[int(store.part_of(np.array([document]))[0])]
    row = part.rows[document - part.first]
    path, unit = files[int(row["file"])]
    return {"file": path, unit: int(row["row"]), "source": sources[int(row["source"])]}


def decontaminated_lines(lines: Iterator[dict[str, Any]], owners: Owners) -> Iterator[dict[str, Any]]:
    """Of the lines those of documents with an item's words, with the items that have them."""
    for line in lines:
        if line["why"] == CONTAMINATED:
            items = [{"task": task, "item": item} for task, item in owners.get(line["value"], ())]
            yield {**{key: value for key, value in line.items() if key not in ("why", "value")},
                   "words": line["value"], "items": items}  # fmt: skip


def examples(store: Store, dropped: Mapping[str, np.ndarray]) -> dict[str, list[dict[str, Any]]]:
    """The first few documents that each reason removed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for part in store.parts:
        with (part.path / "removed.jsonl").open(encoding="utf-8") as file:
            for line in file:
                if '"text": ' not in line:
                    continue
                one = json.loads(line)
                shown = found.setdefault(one["why"], [])
                if len(shown) < EXAMPLES and "text" in one:
                    shown.append({"text": one["text"], "value": one["value"]})
    for what, rows in dropped.items():
        for row in rows[:EXAMPLES]:
            texts = [_beginning(store, int(row[side])) for side in ("document", "of")]
            value = round(float(row["similarity"]), 4)
            found.setdefault(what, []).append({"text": texts[0], "of": texts[1], "value": value})
    return found


def _beginning(store: Store, document: int) -> str:
    part = store.parts[int(store.part_of(np.array([document]))[0])]
    ((_, text),) = part.texts(np.array([document - part.first]))
    return text[:LONGEST_EXAMPLE]


def write_lines(path: Path, lines: Iterator[dict[str, Any]]) -> int:
    """Writes JSON Lines; how many there were."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            count += 1
    return count
