"""What the evaluate stage found: the models beside each other, few-shot curves, win rates."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from evaluation.report.charts import Line, draw_fewshot
from evaluation.report.document import Block, Cell, Chart, Charts, Paragraph, Section, Table, text
from evaluation.report.gather import Report
from evaluation.report.reading import (
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
    Measure("responses", "responses", 0),
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


def missing(report: Report, what: str, stage: str = "evaluate", asks: str = "") -> list[Block]:
    """What is said in the place of something that isn't there, and the command that makes it.

    `asks`: what a recipe that has it says.
    """
    found = report.stages.get(stage)
    if found is None:
        return [Paragraph(f"{what}: the recipe has no stage {stage}.", "missing")]
    if found.state == "done":
        asking = f"asks for it ({asks})" if asks else "asks for it"
        told = f"{what}: the stage {stage} of this run did not measure it. With a recipe that {asking}: {found.command}"
        return [Paragraph(told, "missing")]
    return [Paragraph(f"{what}: the stage {stage} is not done ({found.state}). Run: {found.command}", "missing")]


def evaluation(report: Report) -> Section:
    """The table of all models."""
    models, pretrained = models_of(report), _validation(report.summary("pretrain"))
    validation: list[Block] = [pretrained] if pretrained else []
    if not models:
        return Section("evaluation", "Evaluation", [*validation, *missing(report, "No evaluation")])
    blocks: list[Block] = [
        table
        for table in (
            pretrained,
            _measures("Held-out documents", models, TEXTS, lambda figures: figures),
            _fewshot_table(models),
            _measures("How they answer", models, BEHAVIOUR, lambda figures: group(figures, "behaviour")),
            _harness(models),
        )
        if table
    ]
    return Section("evaluation", "Evaluation", blocks)


def _validation(pretrain: dict[str, Any]) -> Table | None:
    """The validation texts of pretrain by source, beside what the base was on them: where it has forgotten."""
    sources, before = group(pretrain, "validation"), group(pretrain, "before")
    if not sources and not before:
        return None
    told = ("nats_per_token", "bits_per_byte")
    rows = [_validated("all texts", pretrain, before, [f"validation_{key}" for key in told])]
    rows += [_validated(name, group(sources, name), group(before, "validation", name), told) for name in sources]
    header = ["", "nats per token", "bits per byte"]
    notes = ["In brackets: 95 % intervals."]
    if before:
        header += ["nats per token, the base", "change"]
        notes.append("The base is as it was before the first step; a change above 0 is what was forgotten.")
    rows = [row[: len(header)] for row in rows]
    return Table("Validation texts of pretraining, by source", header, rows, notes)


def _validated(name: str, now: dict[str, Any], then: dict[str, Any], keys: Sequence[str]) -> list[Cell]:
    nats, bits = (Measure(key, "", 4) for key in keys)
    before, after = number(then, nats.key), number(now, nats.key)
    change = "–" if before is None or after is None else signed(after - before, 4)
    named = Cell(one_line(name), full=name, number=False)
    return [named, cell(now, nats), cell(now, bits), cell(then, nats), Cell(change)]


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
        "By number of demonstrations (demo.), with 95 % intervals. Copying: the commonest answer that is shown. "
        "± where demonstrations were drawn several times: the standard deviation over draws.",
        *fewshot_notes(models),
    ]
    return Table("Few-shot accuracy", header, rows, notes)


def fewshot_notes(models: dict[str, dict[str, Any]]) -> list[str]:
    """Which tasks are counted by which metric, why some have no accuracy, and which were not asked in full."""
    found: dict[str, dict[str, None]] = {}
    for task in tasks_of(models):
        for name, figures in models.items():
            for count in counts_of(models, task):
                at = group(figures, "fewshot", task, count)
                if metric := words(at, "metric"):
                    found.setdefault(f"Counted by {one_line(metric)}", {})[one_line(task)] = None
                if why := words(at, "not_available"):
                    told = f"n/a at {one_line(count)}, {shortened(' '.join(why.split()), LONGEST_REASON)}"
                    found.setdefault(told, {})[one_line(task)] = None
                if left_out := number(at, "too_long"):
                    told = f"Questions that don't fit the context of {one_line(name)} and don't count"
                    found.setdefault(told, {})[f"{whole(left_out)} of {one_line(task)} at {one_line(count)}"] = None
    return [f"{told}: {shortened(', '.join(tasks), LONGEST_LIST)}." for told, tasks in list(found.items())[:MOST_NOTES]]


def _any(found: Sequence[dict[str, Any]], key: str) -> float | None:
    return next((value for figures in found if (value := number(figures, key)) is not None), None)


def _accuracy(figures: dict[str, Any]) -> Cell:
    why, spread = words(figures, "not_available"), number(figures, "spread")
    if why:
        return Cell("n/a", full=why)
    found = cell(figures, ACCURACY)
    return found if spread is None else found._replace(note=f"{found.note} ± {digits(spread)}".strip())


def tasks_of(models: dict[str, dict[str, Any]]) -> list[str]:
    """Every task that a model did, in order."""
    return list(dict.fromkeys(task for figures in models.values() for task in group(figures, "fewshot")))


def counts_of(models: dict[str, dict[str, Any]], task: str) -> list[str]:
    """The numbers of demonstrations of a task, rising."""
    found = {count for figures in models.values() for count in group(figures, "fewshot", task)}
    return sorted(found, key=rising)


def rising(count: str) -> tuple[bool, int, str]:
    """The order of numbers of demonstrations, which are texts."""
    return (not count.isdecimal(), int(count) if count.isdecimal() else 0, count)


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


# Few-shot curves


def fewshot(report: Report, most: int) -> Section:
    """A small chart for each task."""
    models = models_of(report)
    tasks = tasks_of(models)
    drawn = [_fewshot_chart(task, models) for task in tasks[:most]]
    charts = [chart for chart in drawn if chart]
    if not charts:
        nothing = missing(report, "No few-shot tasks", asks="evaluate.fewshot.tasks")
        return Section("fewshot", "Accuracy over the number of demonstrations", nothing)
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


# Win rates


def win_rates(report: Report) -> Section:
    """Which model's responses are preferred, with the length taken out."""
    found = group(report.summary("evaluate"), "win_rates")
    if not found:
        asks = "evaluate.prompts, a judge, and two models or more"
        return Section("wins", "Win rates", missing(report, "Win rates are not known", asks=asks))
    rows, notes = [], ["0.5 is as good as the other. Length-controlled: as if both answered at the same length."]
    share = Measure("", "", 3)
    for pair in found:
        figures = group(found, pair)
        sizes = [digits(number({"": value}, ""), 1) for value in items(figures, "characters")[:2]]
        rows.append(
            [
                text(one_line(pair)),
                Cell(whole(number(figures, "prompts"))),
                cell(figures, share._replace(key="win_rate")),
                cell(figures, share._replace(key="length_controlled_win_rate")),
                cell(figures, share._replace(key="longer_preferred")),
                Cell(" / ".join(sizes) or "–"),
            ]
        )
        if told := words(figures, "verdict"):
            notes.append(f"{one_line(pair)}: {shortened(told, 300)}")
    header = ("", "prompts", "win rate", "length-controlled", "longer preferred", "characters")
    return Section("wins", "Win rates", [Table("Whose response is preferred", header, rows, notes)])
