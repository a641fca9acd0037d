"""Two runs beside each other: what differs in their recipes, their stages, what their models are worth."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from evaluation.report.charts import draw_lines
from evaluation.report.curves import compared_curves
from evaluation.report.document import Block, Cell, Chart, Charts, Document, Paragraph, Section, Table, text
from evaluation.report.energy import ASSUMPTIONS, energy
from evaluation.report.gather import Report
from evaluation.report.judged import UNITS, course_lines
from evaluation.report.measured import (
    ACCURACY,
    BEHAVIOUR,
    TEXTS,
    Measure,
    cell,
    counts_of,
    models_of,
    tasks_of,
)
from evaluation.report.overview import flattened, outcome
from evaluation.report.reading import group, interval, number, one_line, shortened, signed

LONGEST_VALUE = 160
NATS = Measure("nats_per_token", "nats per token", 4)
STAGE_FIGURES: dict[str, tuple[Measure, ...]] = {
    "tokenizer": (Measure("vocab_size", "vocabulary", 0), Measure("bytes_per_token", "bytes per token", 3)),
    "pretrain": (
        Measure("tokens", "tokens", 0),
        Measure("validation_nats_per_token", "nats per token", 4),
        Measure("validation_bits_per_byte", "bits per byte", 4),
    ),
    "sft": (
        Measure("tokens", "tokens", 0),
        Measure("validation_nats_per_token", "nats per token", 4),
        Measure("responses_ended", "responses that end", 3),
    ),
    "reward": (
        Measure("pairs_train", "pairs", 0),
        Measure("accuracy", "accuracy", 3),
        Measure("length_baseline_accuracy", "longer wins", 3),
        Measure("gold_accuracy", "gold accuracy", 3),
        Measure("calibration_error", "calibration error", 3),
    ),
    "ppo": (
        Measure("episodes", "episodes", 0),
        Measure("score_after", "score", 3),
        Measure("gold_before", "gold before", 3),
        Measure("gold_after", "gold after", 3),
        Measure("kl", "KL, nats", 3),
        Measure("response_tokens", "length, tokens", 1),
    ),
    "evaluate": (),
}
COSTS = (
    Measure("seconds", "seconds", 1),
    Measure("cpu_seconds", "CPU-seconds", 1),
    Measure("peak_memory_mib", "memory, MiB", 0),
    Measure("parameters", "parameters", 0),
    Measure("energy_wh", "energy, Wh (estimate)", 2),
)


def comparison(first: Report, second: Report) -> Document:
    """The document that sets run A and run B beside each other."""
    sections = [_outcomes(first, second), differs(first, second), _stages(first, second)]
    sections += [_evaluation(first, second), compared_curves(first, second), _courses(first, second)]
    subtitle = f"A: {first.directory}; B: {second.directory}; rlhf {first.version}"
    return Document(f"{first.name} (A) and {second.name} (B)", subtitle, sections)


def _outcomes(first: Report, second: Report) -> Section:
    told = [(letter, outcome(run)) for letter, run in (("A", first), ("B", second))]
    return Section(
        "outcome",
        "What came of them",
        [Paragraph(f"{letter}: {said or 'there is no result yet.'}") for letter, said in told],
    )


def recipe_differences(first: Report, second: Report) -> dict[str, tuple[Any, Any]]:
    """Every key of the recipes whose values differ; None where there is no such key."""
    a, b = flattened(first.recipe), flattened(second.recipe)
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def differs(first: Report, second: Report) -> Section:
    """What differs in the recipes."""
    found = recipe_differences(first, second)
    rows = [
        [text(one_line(key)), *(text("–" if value is None else _value(value)) for value in values)]
        for key, values in found.items()
    ]
    notes = ("A dash: the recipe doesn't have the key.",)
    blocks: list[Block] = [Table("Keys with different values", ("key", "A", "B"), rows, notes)]
    return Section("differs", "What differs in the recipes", blocks if rows else [Paragraph("Nothing.")])


def _value(value: Any) -> str:
    said = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return shortened(" ".join(said.split()), LONGEST_VALUE)


def _stages(first: Report, second: Report) -> Section:
    rows = []
    for stage, measures in STAGE_FIGURES.items():
        a, b = (with_energy(run.summary(stage)) for run in (first, second))
        known = [measure for measure in (*measures, *COSTS) if number(a, measure.key) or number(b, measure.key)]
        for place, measure in enumerate(known):
            named = Cell("" if place else stage, full=stage, number=False)
            rows.append([named, text(measure.name), *compared(a, b, measure)])
        for source in {**group(a, "validation"), **group(b, "validation")} if stage == "pretrain" else ():
            was, now = group(a, "validation", source), group(b, "validation", source)
            rows.append([text(""), text(f"nats per token, {one_line(source)}"), *compared(was, now, NATS)])
    states = [
        Paragraph(f"{letter}: {stage.name} is {stage.state}.", "warning")
        for letter, run in (("A", first), ("B", second))
        for stage in run.stages.values()
        if stage.state != "done"
    ]
    header = ("stage", "", "A", "B", "B − A", "intervals")
    blocks: list[Block] = [*states, Table("Figures of each stage", header, rows, (ASSUMPTIONS,))] if rows else [*states]
    return Section("chain", "Stages", blocks or [Paragraph("No stage of either run is done.", "missing")])


def with_energy(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary with the estimate of `energy_wh`."""
    spent = energy(summary)
    return {**summary, "energy_wh": spent.total} if spent else summary


def compared(a: dict[str, Any], b: dict[str, Any], measure: Measure) -> list[Cell]:
    """A figure of both runs, their difference, and whether their intervals overlap."""
    first, second = number(a, measure.key), number(b, measure.key)
    difference = Cell("–" if first is None or second is None else signed(second - first, measure.digits))
    return [cell(a, measure), cell(b, measure), difference, text(overlap(a, b, measure.key))]


def overlap(a: dict[str, Any], b: dict[str, Any], key: str) -> str:
    """Whether two intervals overlap, in words; empty where one isn't known."""
    first, second = interval(a, key), interval(b, key)
    if first is None or second is None:
        return ""
    return "overlap" if first[0] <= second[1] and second[0] <= first[1] else "apart"


def _evaluation(first: Report, second: Report) -> Section:
    a, b = models_of(first), models_of(second)
    tables = [
        Table(
            one_line(model),
            ("", "A", "B", "B − A", "intervals"),
            rows,
        )
        for model in {**a, **b}
        if (rows := list(_model_rows(a.get(model, {}), b.get(model, {}))))
    ]
    missing = [Paragraph("Neither run has been evaluated.", "missing")]
    notes = [Paragraph("Intervals that are apart show a difference; those that overlap may still hide one.", "note")]
    return Section("evaluation", "Evaluation", [*tables, *notes] if tables else missing)


def _model_rows(a: dict[str, Any], b: dict[str, Any]) -> Iterator[list[Cell]]:
    for measure in TEXTS:
        if number(a, measure.key) is not None or number(b, measure.key) is not None:
            yield [text(measure.name), *compared(a, b, measure)]
    both = {"A": a, "B": b}
    for task in tasks_of(both):
        for count in counts_of(both, task):
            first, second = (group(figures, "fewshot", task, count) for figures in (a, b))
            cells = compared(first, second, ACCURACY)
            if "version" in first and "version" in second and first["version"] != second["version"]:
                cells[-1] = text("other versions of the task")
            yield [text(f"{one_line(task)}, {one_line(count)} demonstrations"), *cells]
    for measure in BEHAVIOUR:
        first, second = group(a, "behaviour"), group(b, "behaviour")
        if number(first, measure.key) is not None or number(second, measure.key) is not None:
            yield [text(measure.name), *compared(first, second, measure)]


def _courses(first: Report, second: Report) -> Section:
    charts = []
    for unit, name in UNITS.items():
        lines = [
            line._replace(marks=())  # those of two runs would lie upon each other
            for letter, run in (("A", first), ("B", second))
            for line in course_lines(run.summary("ppo"), unit, f"{letter} ")
        ]
        if lines:
            draw = partial(
                draw_lines, title=name.capitalize(), labels=("√KL to the reference, nats", name), lines=lines
            )
            charts.append(Chart(draw, f"{name} over the square root of KL, on held-out prompts"))
    blocks: list[Block] = [Charts(charts)] if charts else [Paragraph("Neither run has a course of PPO.", "missing")]
    return Section("optimisation", "Over-optimisation", blocks)


def as_json(first: Report, second: Report) -> dict[str, Any]:
    """Both runs and what differs in their recipes, as plain values."""
    found = {key: {"a": a, "b": b} for key, (a, b) in recipe_differences(first, second).items()}
    return {"a": first.as_json(), "b": second.as_json(), "recipe_differences": found}
