"""What was known before it was asked: tasks in the training documents, documents known by heart."""

from collections.abc import Iterator, Sequence
from typing import Any

from evaluation.report.document import Block, Cell, Folded, Paragraph, Section, Table, text
from evaluation.report.gather import Report
from evaluation.report.measured import counts_of, missing, models_of
from evaluation.report.reading import (
    group,
    in_brackets,
    interval,
    items,
    number,
    one_line,
    shortened,
    whole,
    words,
)
from evaluation.report.reading import with_digits as digits

MOST_MEMORISED, LONGEST_MEMORISED, MOST_EXAMPLES = 5, 300, 20


def contamination(report: Report) -> Section:
    """How much of each task stands in the training documents, beside its score; and what models know by heart."""
    found = group(report.summary("evaluate"), "contamination")
    tasks, models = group(found, "tasks"), models_of(report)
    blocks: list[Block] = []
    if tasks:
        named = [one_line(str(task)) for task in items(found, "contaminated")]
        documents, words_read = whole(number(found, "documents")), whole(number(found, "words"))
        told = f"Contaminated: {', '.join(named)}." if named else "No task is contaminated."
        blocks.append(Paragraph(f"{told} Looked for in {documents} training documents, {words_read} words.", ""))
        blocks.append(_contamination_table(tasks, models))
        blocks.extend(
            Folded(f"An example from {one_line(task)}", shortened(example, 600))
            for task in list(tasks)[:MOST_EXAMPLES]
            if (example := words(group(tasks, task), "example"))
        )
    else:
        blocks.extend(missing(report, "Contamination is not known"))
    blocks.extend(_memorisation(report, models))
    return Section("contamination", "Contamination and memorisation", blocks)


def _contamination_table(tasks: dict[str, Any], models: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for task in tasks:
        figures = group(tasks, task)
        counts = counts_of(models, task)
        last = [_at_the_most(model, task, counts) for model in models.values()]
        rows.append(
            [
                Cell(one_line(task), full=task, number=False),
                Cell(whole(number(figures, "items"))),
                Cell(whole(number(figures, "too_short"))),
                Cell(digits(number(figures, "overlap")), in_brackets(interval(figures, "overlap"))),
                text("yes" if figures.get("contaminated") is True else "no"),
                *(
                    Cell(
                        digits(number(at, "accuracy")),
                        "" if (clean := number(at, "accuracy_clean")) is None else f"{digits(clean)} clean",
                    )
                    for at in last
                ),
            ]
        )
    header = ("task", "items", "too short", "overlap", "contaminated", *(map(one_line, models) if rows else ()))
    notes = (
        "Overlap: the share of items of which a run of words stands in the training documents. Accuracy is at the most "
        "demonstrations; clean: on the items without overlap.",
    )
    return Table("Overlap with the training documents", header, rows, notes)


def _at_the_most(model: dict[str, Any], task: str, counts: Sequence[str]) -> dict[str, Any]:
    """The figures at the largest number of demonstrations of which there are any."""
    found = (group(model, "fewshot", task, count) for count in reversed(counts))
    return next((figures for figures in found if number(figures, "accuracy") is not None), {})


def _memorisation(report: Report, models: dict[str, dict[str, Any]]) -> Iterator[Block]:
    known = {name: found for name, figures in models.items() if (found := group(figures, "memorisation"))}
    if not known:
        yield from missing(report, "Memorisation is not known")
        return
    kinds = {"training": "training documents", "held_out": "held-out documents"}
    copies = dict.fromkeys(copies for found in known.values() for copies in group(found, "by_copies"))
    rows = [[text(title), *(_verbatim(group(found, key)) for found in known.values())] for key, title in kinds.items()]
    rows += [
        [
            text(f"training, {one_line(count)} {'copy' if count == '1' else 'copies'}"),
            *(_verbatim(group(found, "by_copies", count)) for found in known.values()),
        ]
        for count in copies
    ]
    notes = ("The share of documents that a model continues word for word from their beginning; 95 % intervals.",)
    yield Table("Known by heart", ("", *map(one_line, known)), rows, notes)
    for name, found in known.items():
        if why := words(found, "not_available"):
            yield Paragraph(f"{one_line(name)}: n/a, {shortened(why, 120)}.", "missing")
        texts = [entry for entry in items(found, "memorised") if isinstance(entry, dict)]
        if texts:
            yield Folded(f"What {one_line(name)} knows by heart", _by_heart(texts), True)


def _verbatim(figures: dict[str, Any]) -> Cell:
    documents = number(figures, "documents")
    of = "" if documents is None else f"of {whole(documents)}"
    return Cell(digits(number(figures, "verbatim")), f"{in_brackets(interval(figures, 'verbatim'))} {of}".strip())


def _by_heart(texts: Sequence[dict[str, Any]]) -> str:
    shown = [
        f"{whole(number(entry, 'copies'))} copies, {whole(number(entry, 'tokens'))} tokens: "
        + shortened(words(entry, "text"), LONGEST_MEMORISED)
        for entry in texts[:MOST_MEMORISED]
    ]
    more = [f"… and {len(texts) - MOST_MEMORISED} more"] if len(texts) > MOST_MEMORISED else []
    return "\n\n".join([*shown, *more])
