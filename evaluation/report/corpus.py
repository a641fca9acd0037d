"""The data card: what went into the corpus and what was removed, by source and by reason, with examples."""

from collections.abc import Iterator
from typing import Any

from evaluation.report.document import Block, Cell, Facts, Folded, Paragraph, Section, Table, text
from evaluation.report.gather import Report, again
from evaluation.report.reading import group, items, number, one_line, shortened, whole, words
from evaluation.report.reading import with_digits as digits
from rlhf.data.prepare.inputs import REPLAYED
from rlhf.runtime import format_seconds

MOST_EXAMPLES, LONGEST_EXAMPLE = 2, 300
MOST_REASONS = 40


def corpus(report: Report) -> Section:
    """Documents, bytes and tokens in and out."""
    title = "The corpus"
    if not report.corpora:
        if "pretrain" not in report.stages:
            return Section("corpus", title, [Paragraph("The recipe has no stage pretrain, so no corpus.", "missing")])
        told = f"No corpus (corpus/card.json). This makes it: {again(report.run_dir, 'pretrain')}"
        return Section("corpus", title, [Paragraph(told, "missing")])
    blocks: list[Block] = []
    for name, card in report.corpora.items():
        if name == REPLAYED:
            blocks.append(Paragraph("Replayed texts", "heading"))
        blocks.extend(_card(name, card))
    return Section("corpus", title, blocks)


def _card(name: str, card: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = [Facts(list(_facts(card))), _by_source(card)]
    if card.get("prepared") is not True:
        blocks.insert(0, Paragraph("The texts were packed as they are: the recipe has no `pretrain.prepare`."))
        return blocks
    if removed := group(card, "removed"):
        blocks.append(_by_reason(name, card, removed))
        blocks.extend(_examples(removed))
    blocks.extend(_changed(card))
    return blocks


def _facts(card: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    read, out = group(card, "in"), group(card, "out")
    for key, what, scale in (("documents", "documents written", 1.0), ("bytes", "MB written", 1e-6)):
        before, after = number(read, key), number(out, key)
        if after is None:
            continue
        shown = digits(after * scale, 0 if scale == 1 else 1)
        told = "" if before is None else f"{digits(before * scale, 0 if scale == 1 else 1)} read"
        if told and key == "documents" and (gone := sum(_documents(card).values())):
            told += f", {whole(gone)} removed"
        yield what, shown, told
    yield "tokens", whole(number(out, "tokens")), f"{digits(number(out, 'bytes_per_token'), 2)} bytes a token"
    seconds = sum(value for key in group(card, "seconds") if (value := number(group(card, "seconds"), key)))
    yield "prepared in", format_seconds(seconds), "minutes:seconds" if seconds < 3600 else "hours:minutes:seconds"


def _documents(card: dict[str, Any]) -> dict[str, float]:
    """How many documents each reason removed."""
    removed = group(card, "removed")
    return {why: number(group(removed, why), "documents") or 0.0 for why in removed}


def _by_source(card: dict[str, Any]) -> Table:
    sources = group(card, "sources")
    rows = []
    for name in sources:
        source = group(sources, name)
        read, out = group(source, "in"), group(source, "out")
        weight = number(source, "weight")
        gone = group(source, "removed")
        rows.append(
            [
                Cell(one_line(name), full=name, number=False),
                Cell("–" if weight is None else f"{weight:g}"),
                Cell(whole(number(read, "documents"))),
                Cell(_megabytes(read)),
                Cell(whole(sum(value for why in gone if (value := number(gone, why)))) if gone else "–"),
                Cell(whole(number(out, "documents"))),
                Cell(_megabytes(out)),
                Cell(whole(number(out, "tokens"))),
                Cell(digits(number(out, "bytes_per_token"), 2)),
            ]
        )
    header = ("source", "weight", "read", "MB", "removed", "written", "MB", "tokens", "bytes a token")
    notes = (
        "Read, removed, written: documents. What is written counts as often as the weight says, documents made of "
        "few-shot tasks besides.",
    )
    return Table("By source", header, rows, notes)


def _by_reason(name: str, card: dict[str, Any], removed: dict[str, Any]) -> Table:
    read = number(group(card, "in"), "documents")
    settings = group(card, "settings")
    rows = []
    for why in list(removed)[:MOST_REASONS]:
        figures = group(removed, why)
        documents = number(figures, "documents")
        limit = number(settings, f"prepare.filters.{why}")
        rows.append(
            [
                text(one_line(why)),
                Cell("–" if limit is None else f"{limit:g}"),
                Cell(whole(documents)),
                Cell("–" if not read or documents is None else f"{digits(100 * documents / read, 2)} %"),
                Cell(_megabytes(figures)),
                Cell(whole(number(figures, "tokens_estimated"))),
            ]
        )
    header = ("reason", "limit", "documents", "of all", "MB", "tokens (estimate)")
    notes = (
        f"A document is counted by the first rule that it breaks. Every one is in {name}/removed.jsonl, and those with "
        f"words of test items in {name}/decontaminated.jsonl. Tokens are estimated from bytes.",
    )
    return Table("What was removed", header, rows, notes)


def _examples(removed: dict[str, Any]) -> Iterator[Block]:
    for why in list(removed)[:MOST_REASONS]:
        shown = []
        for example in items(group(removed, why), "examples")[:MOST_EXAMPLES]:
            value = example.get("value") if isinstance(example, dict) else None
            told = f"[{value}] " if isinstance(value, int | float | str) else ""
            like = words(example, "of")
            shown.append(told + shortened(words(example, "text"), LONGEST_EXAMPLE))
            if like:
                shown.append("    like: " + shortened(like, LONGEST_EXAMPLE))
        if shown:
            yield Folded(f"Examples: {one_line(why)}", "\n\n".join(shown))


def _changed(card: dict[str, Any]) -> Iterator[Block]:
    """What was mended and masked."""
    cleaned, masked = group(card, "cleaned"), group(card, "masked")
    for what, counts in (("Documents that cleaning changed", cleaned), ("Places that were masked", masked)):
        told = ", ".join(f"{one_line(name)} {whole(number(counts, name))}" for name in counts)
        if told:
            yield Paragraph(f"{what}: {told}.")


def _megabytes(figures: dict[str, Any]) -> str:
    size = number(figures, "bytes")
    return "–" if size is None else digits(size / 1e6, 1 if size >= 1e6 else 3)
