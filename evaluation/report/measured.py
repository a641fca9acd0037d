"""What the evaluate stage found: the models beside each other, what alignment gained and cost, few-shot curves,
contamination, memorisation, win rates.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from math import hypot
from typing import Any, NamedTuple

from evaluation.report.charts import Line, draw_fewshot
from evaluation.report.document import Block, Cell, Chart, Charts, Folded, Paragraph, Section, Table, text
from evaluation.report.gather import Report
from evaluation.report.reading import (
    Interval,
    group,
    in_brackets,
    interval,
    items,
    number,
    one_line,
    shortened,
    signed,
    whole,
    words,
)
from evaluation.report.reading import with_digits as digits

MOST_NOTES, LONGEST_REASON, LONGEST_LIST = 12, 120, 400
MOST_MEMORISED, LONGEST_MEMORISED, MOST_EXAMPLES = 5, 300, 20


class Measure(NamedTuple):
    """A figure of a model."""

    key: str
    name: str
    digits: int
    better: int = 0  # 1 where more is better, -1 where less is, 0 where neither is


TEXTS = (
    Measure("perplexity", "perplexity, by token", 3, -1),
    Measure("word_perplexity", "perplexity, by word", 3, -1),
    Measure("byte_perplexity", "perplexity, by byte", 4, -1),
    Measure("nats_per_token", "nats per token", 4, -1),
    Measure("bits_per_byte", "bits per byte", 4, -1),
)
BEHAVIOUR = (
    Measure("score", "judge's score", 3, 1),
    Measure("gold", "gold reward", 3, 1),
    Measure("ended", "responses that end", 3, 1),
    Measure("tokens", "mean length, tokens", 1),
    Measure("tokens_median", "median length, tokens", 1),
    Measure("repetition", "repetition", 3, -1),
    Measure("distinct_1", "distinct words", 3),
    Measure("distinct_2", "distinct pairs of words", 3),
    Measure("distinct_3", "distinct runs of 3 words", 3),
)


def models_of(report: Report) -> dict[str, dict[str, Any]]:
    """The figures of each model, in order."""
    models = group(report.summary("evaluate"), "models")
    return {name: group(models, name) for name in models}


def missing(report: Report, what: str, stage: str = "evaluate") -> list[Block]:
    """What is said in the place of something that isn't there, and the command that makes it."""
    found = report.stages.get(stage)
    if found is None:
        return [Paragraph(f"{what}: the recipe has no stage {stage}.", "missing")]
    if found.state == "done":
        told = (
            f"{what}: the stage {stage} of this run did not measure it. With a recipe that asks for it: {found.command}"
        )
        return [Paragraph(told, "missing")]
    return [Paragraph(f"{what}: the stage {stage} is not done ({found.state}). Run: {found.command}", "missing")]


def evaluation(report: Report) -> Section:
    """The table of all models."""
    models = models_of(report)
    if not models:
        return Section("evaluation", "Evaluation", missing(report, "No evaluation"))
    blocks: list[Block] = [
        table
        for table in (
            _measures("Held-out documents", models, TEXTS, lambda figures: figures),
            _fewshot_table(models),
            _measures("How they answer", models, BEHAVIOUR, lambda figures: group(figures, "behaviour")),
            _harness(models),
        )
        if table
    ]
    return Section("evaluation", "Evaluation", blocks)


def _measures(
    caption: str,
    models: dict[str, dict[str, Any]],
    measures: Sequence[Measure],
    within: Callable[[dict[str, Any]], dict[str, Any]],
) -> Table | None:
    found = {name: within(figures) for name, figures in models.items()}
    rows = [
        [text(measure.name), *(cell(figures, measure) for figures in found.values())]
        for measure in measures
        if any(number(figures, measure.key) is not None for figures in found.values())
    ]
    return Table(caption, ("", *map(one_line, found)), rows, ("In brackets: 95 % intervals.",)) if rows else None


def cell(figures: dict[str, Any], measure: Measure) -> Cell:
    """A figure with its interval."""
    bounds = interval(figures, measure.key)
    return Cell(digits(number(figures, measure.key), measure.digits), in_brackets(bounds, measure.digits))


ACCURACY = Measure("accuracy", "accuracy", 3, 1)


def _fewshot_table(models: dict[str, dict[str, Any]]) -> Table | None:
    rows: list[list[Cell]] = []
    for task in tasks_of(models):
        for place, count in enumerate(counts_of(models, task)):
            found = [group(figures, "fewshot", task, count) for figures in models.values()]
            rows.append(
                [
                    Cell(one_line(task) if place == 0 else "", full=task, number=False),
                    Cell(one_line(count)),
                    Cell(digits(_any(found, "chance"), 3)),
                    Cell(digits(_any(found, "copy_baseline"), 3)),
                    *(_accuracy(figures) for figures in found),
                ]
            )
    if not rows:
        return None
    header = ("task", "demo.", "chance", "copying", *map(one_line, models))
    notes = [
        "By number of demonstrations (demo.), with 95 % intervals. Copying: the commonest answer that is shown.",
        *_metrics_of(models),
    ]
    return Table("Few-shot accuracy", header, rows, notes)


def _metrics_of(models: dict[str, dict[str, Any]]) -> list[str]:
    """Which tasks are counted by which metric, and why some have no accuracy."""
    found: dict[str, dict[str, None]] = {}
    for task in tasks_of(models):
        for figures in models.values():
            for count in counts_of(models, task):
                at = group(figures, "fewshot", task, count)
                if metric := words(at, "metric"):
                    found.setdefault(f"Counted by {one_line(metric)}", {})[one_line(task)] = None
                if why := words(at, "not_available"):
                    told = f"n/a at {one_line(count)}, {shortened(' '.join(why.split()), LONGEST_REASON)}"
                    found.setdefault(told, {})[one_line(task)] = None
    return [f"{told}: {shortened(', '.join(tasks), LONGEST_LIST)}." for told, tasks in list(found.items())[:MOST_NOTES]]


def _any(found: Sequence[dict[str, Any]], key: str) -> float | None:
    return next((value for figures in found if (value := number(figures, key)) is not None), None)


def _accuracy(figures: dict[str, Any]) -> Cell:
    why = words(figures, "not_available")
    return Cell("n/a", full=why) if why else cell(figures, ACCURACY)


def tasks_of(models: dict[str, dict[str, Any]]) -> list[str]:
    """Every task that a model did, in order."""
    return list(dict.fromkeys(task for figures in models.values() for task in group(figures, "fewshot")))


def counts_of(models: dict[str, dict[str, Any]], task: str) -> list[str]:
    """The numbers of demonstrations of a task, rising."""
    found = {count for figures in models.values() for count in group(figures, "fewshot", task)}
    return sorted(found, key=_rising)


def _harness(models: dict[str, dict[str, Any]]) -> Table | None:
    rows = []
    tasks = dict.fromkeys(task for figures in models.values() for task in group(figures, "harness"))
    for task in tasks:
        found = [group(figures, "harness", task) for figures in models.values()]
        for metric in dict.fromkeys(key for figures in found for key in figures if not key.endswith("_stderr")):
            cells = [_with_error(figures, metric) for figures in found]
            if any(shown.text != "–" for shown in cells):
                rows.append([text(one_line(task)), text(one_line(metric)), *cells])
    if not rows:
        return None
    notes = ("Through lm-evaluation-harness, with its standard errors.",)
    return Table("Other tasks", ("task", "metric", *map(one_line, models)), rows, notes)


def _with_error(figures: dict[str, Any], metric: str) -> Cell:
    error = number(figures, f"{metric}_stderr")
    return Cell(digits(number(figures, metric), 4), "" if error is None else f"± {digits(error, 4)}")


# What alignment gained and what it cost


def gains(report: Report) -> Section:
    """The differences from model to model, each with its interval and what that says."""
    models, ppo = models_of(report), report.summary("ppo")
    rows = [*_ppo_gains(ppo), *_text_gains(models)]
    blocks: list[Block] = []
    if rows:
        notes = (
            "Gained and cost: the 95 % interval of the difference excludes 0; unclear: it doesn't. The intervals of "
            "nats and bits treat both models as measured on different documents, which makes them wider "
            "than they are.",
        )
        header = ("", "from", "to", "difference", "verdict")
        blocks.append(Table("Reward and language", header, rows, notes))
    differences = group(report.summary("evaluate"), "differences")
    blocks.extend(table for pair in differences if (table := _accuracy_gains(pair, group(differences, pair))))
    if not blocks:
        blocks = missing(report, "Nothing to compare")
    return Section("gains", "What alignment gained and what it cost", blocks)


def verdict(bounds: Interval | None, better: int) -> str:
    """What an interval of a difference says, in a word and a sign."""
    if bounds is None or better == 0:
        return "–"
    low, high = bounds
    if low <= 0 <= high:
        return "≈ unclear"
    return "▲ gained" if (low > 0) == (better > 0) else "▼ cost"


def _ppo_gains(ppo: dict[str, Any]) -> Iterator[list[Cell]]:
    for key, name in (("gold", "gold reward"), ("score", "judge's score"), ("second_judge", "second judge's score")):
        before, after, gain = (number(ppo, f"{key}_{when}") for when in ("before", "after", "gain"))
        if before is None or after is None:
            continue
        bounds = interval(ppo, f"{key}_gain")
        yield [
            text(f"{name}, sft → ppo"),
            Cell(digits(before), in_brackets(interval(ppo, f"{key}_before"))),
            Cell(digits(after), in_brackets(interval(ppo, f"{key}_after"))),
            Cell(signed(after - before if gain is None else gain), in_brackets(bounds)),
            text(verdict(bounds, 1)),
        ]


def _text_gains(models: dict[str, dict[str, Any]]) -> Iterator[list[Cell]]:
    names = list(models)
    measures = [measure for measure in TEXTS if measure.key in ("bits_per_byte", "nats_per_token")]
    for measure in measures:
        for first, second in pairwise(names):
            before, after = number(models[first], measure.key), number(models[second], measure.key)
            if before is None or after is None:
                continue
            bounds = unpaired(models[first], models[second], measure.key)
            yield [
                text(f"{measure.name}, {one_line(first)} → {one_line(second)}"),
                Cell(digits(before, measure.digits)),
                Cell(digits(after, measure.digits)),
                Cell(signed(after - before, measure.digits), in_brackets(bounds, measure.digits)),
                text(verdict(bounds, measure.better)),
            ]


def unpaired(first: dict[str, Any], second: dict[str, Any], key: str) -> Interval | None:
    """The 95 % interval of `second - first` for two independent estimates whose own intervals are known."""
    a, b = interval(first, key), interval(second, key)
    before, after = number(first, key), number(second, key)
    if a is None or b is None or before is None or after is None:
        return None
    half = hypot((a[1] - a[0]) / 2, (b[1] - b[0]) / 2)
    return after - before - half, after - before + half


def _accuracy_gains(pair: str, tasks: dict[str, Any]) -> Table | None:
    by_task = {task: group(tasks, task) for task in tasks}
    counts = sorted({count for found in by_task.values() for count in found}, key=_rising)
    rows = [
        [text(one_line(task)), *(_gain(group(found, count)) for count in counts)] for task, found in by_task.items()
    ]
    if not rows or not counts:
        return None
    notes = ("By number of demonstrations, item by item; in brackets the 95 % interval.",)
    return Table(f"Few-shot accuracy, {one_line(pair)}", ("task", *counts), rows, notes)


def _rising(count: str) -> tuple[bool, int, str]:
    return (not count.isdecimal(), int(count) if count.isdecimal() else 0, count)


def _gain(figures: dict[str, Any]) -> Cell:
    difference, bounds = number(figures, "difference"), interval(figures, "difference")
    if difference is None:
        return Cell("–")
    told = verdict(bounds, 1)
    return Cell(signed(difference), f"{in_brackets(bounds)} {told if told[0] in '▲▼' else ''}".strip())


# Few-shot curves


def fewshot(report: Report, most: int) -> Section:
    """A small chart for each task."""
    models = models_of(report)
    tasks = tasks_of(models)
    drawn = [_fewshot_chart(task, models) for task in tasks[:most]]
    charts = [chart for chart in drawn if chart]
    if not charts:
        return Section("fewshot", "Accuracy over the number of demonstrations", missing(report, "No few-shot tasks"))
    blocks: list[Block] = [Charts(charts)]
    if len(tasks) > most:
        left_out = f"{len(tasks) - most:,} more tasks are in the table above; their charts are left out here."
        blocks.append(Paragraph(left_out, "note"))
    return Section("fewshot", "Accuracy over the number of demonstrations", blocks)


def _fewshot_chart(task: str, models: dict[str, dict[str, Any]]) -> Chart | None:
    counts = counts_of(models, task)
    lines = []
    for name, figures in models.items():
        found = [(x, group(figures, "fewshot", task, count)) for x, count in enumerate(counts)]
        known = [
            (x, value, interval(at, "accuracy")) for x, at in found if (value := number(at, "accuracy")) is not None
        ]
        if known:
            lines.append(Line(name, *map(list, zip(*known, strict=True))))
    if not lines:
        return None
    chance = _any([group(figures, "fewshot", task, count) for figures in models.values() for count in counts], "chance")
    shown = [one_line(count, 6) for count in counts]
    draw = partial(draw_fewshot, title=task, counts=shown, lines=lines, chance=chance)
    return Chart(draw, f"{one_line(task)}: accuracy by number of demonstrations, with 95 % intervals", small=True)


# Contamination and memorisation


def contamination(report: Report) -> Section:
    """How much of each task stands in the training documents, beside its score; and what models know by heart."""
    found = group(report.summary("evaluate"), "contamination")
    tasks, models = group(found, "tasks"), models_of(report)
    blocks: list[Block] = []
    if tasks:
        named = [one_line(str(task)) for task in items(found, "contaminated")]
        documents, n = whole(number(found, "documents")), whole(number(found, "words"))
        told = f"Contaminated: {', '.join(named)}." if named else "No task is contaminated."
        blocks.append(Paragraph(f"{told} Looked for in {documents} training documents, runs of {n} words.", ""))
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


# Win rates


def win_rates(report: Report) -> Section:
    """Which model's responses are preferred, with the length taken out."""
    found = group(report.summary("evaluate"), "win_rates")
    if not found:
        return Section("wins", "Win rates", missing(report, "Win rates are not known"))
    rows, notes = [], ["0.5 is as good as the other. Length-controlled: as if both answered at the same length."]
    share = Measure("", "", 3)
    for pair in found:
        figures = group(found, pair)
        tokens = [digits(number({"": value}, ""), 1) for value in items(figures, "tokens")[:2]]
        rows.append(
            [
                text(one_line(pair)),
                Cell(whole(number(figures, "prompts"))),
                cell(figures, share._replace(key="win_rate")),
                cell(figures, share._replace(key="length_controlled_win_rate")),
                cell(figures, share._replace(key="longer_preferred")),
                Cell(" / ".join(tokens) or "–"),
            ]
        )
        if told := words(figures, "verdict"):
            notes.append(f"{one_line(pair)}: {shortened(told, 300)}")
    header = ("", "prompts", "win rate", "length-controlled", "longer preferred", "tokens")
    return Section("wins", "Win rates", [Table("Whose response is preferred", header, rows, notes)])
