"""The reward model, and what optimising against it did."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from evaluation.report.charts import Line, draw_lines, draw_points, draw_reliability
from evaluation.report.document import Block, Cell, Chart, Charts, Paragraph, Picture, Section, Table, text
from evaluation.report.gains import verdict
from evaluation.report.gather import Report
from evaluation.report.measured import Measure, cell, missing
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

MOST_SOURCES, MOST_POINTS = 30, 500
ACCURACIES = {
    "accuracy": "held-out comparisons",
    "accuracy_longer_chosen": "those where the longer response is the better one",
    "accuracy_shorter_chosen": "those where the shorter one is",
    "gold_accuracy": "those whose gold differs",
    "labellers_agree_with_gold": "the labellers themselves, against gold",
    "length_baseline_accuracy": "preferring the longer response",
}
AFTER_ONLY = (
    Measure("kl", "KL, nats", 3),
    Measure("response_tokens", "length, tokens", 1),
    Measure("responses_ended", "responses that end", 3),
)
UNITS = {"score": "judge's score", "second": "second judge's score", "gold": "gold reward"}


def reward(report: Report) -> Section:
    """What the reward model is worth, and what it knows about itself."""
    summary = report.summary("reward")
    if not summary:
        blocks = missing(report, "No reward model", "reward")
        return Section("reward", "Reward model", [*blocks, *_judges(report)])
    blocks = [table for table in (_accuracies(summary), _sources(summary), _features(summary)) if table]
    if number(summary, "accuracy") is None:
        blocks = [Paragraph("There were no held-out comparisons to measure it on.", "missing")]
    told = _calibration(summary)
    if told:
        blocks.append(Paragraph(told))
    pictures: list[Chart | Picture] = [*_charts(report.calibration)]
    pictures = pictures or [Picture(uri, what) for what, uri in report.pictures.items()]
    if pictures:
        blocks.append(Charts(pictures))
    return Section("reward", "Reward model", [*blocks, *_judges(report)])


def _accuracies(summary: dict[str, Any]) -> Table | None:
    rows = [
        [text(name), cell(summary, Measure(key, "", 3))]
        for key, name in ACCURACIES.items()
        if number(summary, key) is not None
    ]
    pairs = whole(number(summary, "pairs_test"))
    return Table("How often it is right", (f"on {pairs} comparisons", "share"), rows) if rows else None


def _sources(summary: dict[str, Any]) -> Table | None:
    found = group(summary, "accuracy_by_source")
    if len(found) < 2:
        return None
    ordered = sorted(found, key=lambda source: -(number(group(found, source), "pairs") or 0.0))
    rows = [
        [
            text(one_line(source)),
            Cell(whole(number(group(found, source), "pairs"))),
            cell(group(found, source), Measure("accuracy", "", 3)),
            cell(group(found, source), Measure("length_baseline_accuracy", "", 3)),
        ]
        for source in ordered[:MOST_SOURCES]
    ]
    more = (f"and {len(found) - MOST_SOURCES} smaller sources",) if len(found) > MOST_SOURCES else ()
    return Table("By source", ("source", "comparisons", "right", "longer wins"), rows, more)


def _features(summary: dict[str, Any]) -> Table | None:
    found = group(summary, "surface_features")
    rows = [
        [
            text(one_line(name.replace("_", " "))),
            text(words(group(found, name), "preferred") or "–"),
            cell(group(found, name), Measure("accuracy", "", 3)),
        ]
        for name in found
    ]
    notes = ["What one would be right on who looked at nothing else."]
    pearson, spearman = number(summary, "score_length_pearson"), number(summary, "score_length_spearman")
    if pearson is not None or spearman is not None:
        notes.append(f"Score and length correlate by {digits(pearson, 2)} (Pearson), {digits(spearman, 2)} (Spearman).")
    return Table("Length and other surfaces", ("feature", "preferred", "share right"), rows, notes) if rows else None


def _calibration(summary: dict[str, Any]) -> str:
    error = number(summary, "calibration_error")
    if error is None:
        return ""
    before, temperature = number(summary, "calibration_error_before"), number(summary, "temperature")
    return (
        f"Its confidence is off by {digits(before)} on average as trained, by {digits(error)} with a temperature of "
        f"{digits(temperature, 2)} (expected calibration error)."
    )


def _charts(calibration: dict[str, Any]) -> Iterator[Chart]:
    kinds = (("bins_before", "as trained"), ("bins_after", "with temperature"))
    lines = [line for key, name in kinds if (line := _bins(calibration, key, name)).x]
    if lines:
        draw = partial(draw_reliability, title="Reliability", judges=lines)
        yield Chart(draw, "How often the judge is right, by how sure it is; on the diagonal it knows itself")
    points = [
        (number({"": point[0]}, ""), number({"": point[1]}, ""))
        for point in items(calibration, "points")
        if isinstance(point, list) and len(point) == 2
    ]
    known = [(tokens, score) for tokens, score in points if tokens is not None and score is not None]
    if known:
        labels = ("tokens of the response", "score")
        x, y = map(list, zip(*known[:MOST_POINTS], strict=True))
        draw = partial(draw_points, title="Score and length", labels=labels, x=x, y=y)
        drawn, all_ = len(x), number(calibration, "responses") or len(known)
        yield Chart(draw, f"The scores of {drawn:,} of {all_:,.0f} held-out responses over their length")


def _bins(calibration: dict[str, Any], key: str, name: str) -> Line:
    bins = [(number(found, "confidence"), number(found, "accuracy")) for found in items(calibration, key)]
    known = [(sure, right) for sure, right in bins if sure is not None and right is not None]
    return Line(name, [sure for sure, _ in known], [right for _, right in known])


def _judges(report: Report) -> list[Block]:
    """The judges that the evaluate stage measured on comparisons, where it did."""
    found = group(report.summary("evaluate"), "judges")
    rows = [
        [
            text(one_line(title)),
            Cell(whole(number(group(found, title), "pairs_test"))),
            cell(group(found, title), Measure("accuracy", "", 3)),
            cell(group(found, title), Measure("length_baseline_accuracy", "", 3)),
        ]
        for title in found
    ]
    header = ("judge", "comparisons", "right", "longer wins")
    return [Table("Judges on held-out comparisons", header, rows)] if rows else []


# Over-optimisation


def optimisation(report: Report) -> Section:
    """Score, second judge and gold over the distance from the reference, best-of-n beside them; what PPO changed."""
    summary = report.summary("ppo")
    title = "Over-optimisation"
    if not summary:
        return Section("optimisation", title, missing(report, "No PPO", "ppo"))
    blocks: list[Block] = [_before_and_after(summary)]
    charts = list(_course(report, summary))
    if charts:
        blocks.append(Charts(charts))
        kept = number(summary, "kept_update")
        said = "" if kept is None else f"Update {whole(kept)} is kept, by {words(summary, 'kept_by') or 'its rule'}. "
        blocks.append(
            Paragraph(
                f"{said}Against a learned judge the score keeps rising with KL while what it stands for may fall (Gao "
                "et al. 2022); the best of n responses of the SFT model shows what the judge gives without training."
            )
        )
    blocks.extend(_doctor(summary))
    return Section("optimisation", title, blocks)


def _before_and_after(summary: dict[str, Any]) -> Table:
    rows = []
    for key, name in (("gold", "gold reward"), ("score", "judge's score"), ("second_judge", "second judge's score")):
        before, after = number(summary, f"{key}_before"), number(summary, f"{key}_after")
        if before is None and after is None:
            continue
        gain, bounds = number(summary, f"{key}_gain"), interval(summary, f"{key}_gain")
        rows.append(
            [
                text(name),
                cell(summary, Measure(f"{key}_before", "", 3)),
                cell(summary, Measure(f"{key}_after", "", 3)),
                Cell("–" if gain is None else signed(gain), in_brackets(bounds)),
                text(verdict(bounds, 1)),
            ]
        )
    rows += [
        [text(measure.name), Cell(""), cell(summary, measure), Cell(""), text("")]
        for measure in AFTER_ONLY
        if number(summary, measure.key) is not None
    ]
    return Table("On test prompts, before and after PPO", ("", "before", "after", "difference", "verdict"), rows)


def _course(report: Report, summary: dict[str, Any]) -> Iterator[Chart]:
    budget = number(group(report.recipe, "ppo", "keep"), "kl_budget")
    at = None if budget is None or budget < 0 else (budget**0.5, "KL budget")
    for unit, name in UNITS.items():
        lines = course_lines(summary, unit)
        if lines:
            furthest = max(x for line in lines for x in line.x)
            shown = at if at and at[0] <= 1.6 * furthest else None  # one far away would press the curves together
            draw = partial(
                draw_lines, title=name.capitalize(), labels=("√KL to the reference, nats", name), lines=lines, at=shown
            )
            yield Chart(draw, f"{name} over the square root of KL, on held-out prompts")


def course_lines(summary: dict[str, Any], unit: str, prefix: str = "") -> list[Line]:
    """The course of one unit: PPO's with the kept update marked, and best-of-n's with n at its points."""
    kept, course = number(summary, "kept_update"), group(summary, "course")
    ppo = _points(items(course, "ppo"), unit)
    best = _points(items(course, "best_of_n"), unit)
    marks = ["kept" if kept is not None and number(point, "update") == kept else "" for *_, point in ppo]
    found = {"PPO": (ppo, marks), "best of n": (best, [whole(number(point, "n")) for *_, point in best])}
    return [
        Line(f"{prefix}{name}", [x for x, *_ in points], [y for _, y, _ in points], marks=marks)
        for name, (points, marks) in found.items()
        if points
    ]


def _points(points: Sequence[Any], unit: str) -> list[tuple[float, float, Any]]:
    """Root of KL, value, and the point itself."""
    found = [(number(point, "kl"), number(point, unit), point) for point in points]
    return [(max(kl, 0.0) ** 0.5, value, point) for kl, value, point in found if kl is not None and value is not None]


def _doctor(summary: dict[str, Any]) -> Iterator[Block]:
    """What the doctor named, and what was done about it."""
    findings = group(summary, "findings")
    for name, updates in findings.items():
        made = [str(update) for update in updates] if isinstance(updates, list) else []
        where = f"{len(made)} updates: {shortened(', '.join(made), 80)}" if len(made) != 1 else f"update {made[0]}"
        yield Paragraph(f"The doctor named {one_line(name)} (in {where}).", "warning")
    for record in items(summary, "back_offs"):
        if isinstance(record, dict):
            told = f"update {whole(number(record, 'update'))}, {one_line(words(record, 'finding'))}"
            yield Paragraph(f"Backed off at {told}: back to update {whole(number(record, 'back_to'))}.", "warning")
    if not findings and "findings" in summary:
        yield Paragraph("The doctor found nothing wrong.", "")
