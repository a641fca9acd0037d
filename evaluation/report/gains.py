"""What alignment gained and what it cost: differences from model to model, told apart from noise."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from evaluation.report.document import Block, Cell, Paragraph, Section, Table, text
from evaluation.report.gather import Report
from evaluation.report.measured import missing, models_of, rising
from evaluation.report.reading import (
    Interval,
    group,
    in_brackets,
    interval,
    number,
    one_line,
    signed,
)
from evaluation.report.reading import with_digits as digits


def gains(report: Report) -> Section:
    """The differences from model to model, each with its interval and what that says."""
    models, ppo = models_of(report), report.summary("ppo")
    evaluated = report.summary("evaluate")
    rows = [*_ppo_gains(ppo), *_changes(models, group(evaluated, "changes"))]
    blocks: list[Block] = []
    if rows:
        notes = (
            "Gained and cost: the 95 % interval of the difference excludes 0; unclear: it doesn't. Models are compared "
            "on the same documents and prompts, one by one.",
        )
        header = ("", "from", "to", "difference", "verdict")
        blocks.append(Table("Reward, language and behaviour", header, rows, notes))
    differences = group(evaluated, "differences")
    blocks.extend(table for pair in differences if (table := _accuracy_gains(pair, group(differences, pair))))
    if not blocks and len(models) == 1:
        told = f"Nothing to compare: one model was measured, {one_line(next(iter(models)))}. With sft or ppo among the "
        blocks.append(Paragraph(f"{told}recipe's stages, each model stands beside the one before it.", "missing"))
    elif not blocks:
        blocks = missing(report, "Nothing to compare")
    return Section("gains", "What alignment gained and what it cost", blocks)


def verdict(bounds: Interval | None, better: int, compared: float | None = None) -> str:
    """What an interval of a difference says, in a word and a sign: nothing where a single thing was compared."""
    if bounds is None or better == 0 or compared == 1:
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


CHANGES = (  # where a figure stands, its key, its name, whether more of it is better (1), worse (-1), or neither
    ("", "bits_per_byte", "bits per byte", -1),
    ("behaviour", "gold", "gold reward of evaluate's prompts", 1),
    ("behaviour", "score", "judge's score of evaluate's prompts", 1),
    ("behaviour", "ended", "share of responses that end", 1),
    ("behaviour", "tokens", "tokens of a response", 0),
    ("behaviour", "repetition", "repetition", -1),
)


def _changes(models: dict[str, dict[str, Any]], changes: dict[str, Any]) -> Iterator[list[Cell]]:
    for place, key, name, better in CHANGES:
        for first, second in pairwise(models):
            sides = [group(models[model], place) if place else models[model] for model in (first, second)]
            before, after = (number(side, key) for side in sides)
            if before is None or after is None:
                continue
            change = group(changes, f"{second} - {first}")
            bounds, places = interval(change, key), 4 if key == "bits_per_byte" else 3
            paired = number(change, key)  # on what both have answered
            yield [
                text(f"{name}, {one_line(first)} → {one_line(second)}"),
                Cell(digits(before, places), in_brackets(interval(sides[0], key), places)),
                Cell(digits(after, places), in_brackets(interval(sides[1], key), places)),
                Cell(signed(after - before if paired is None else paired, places), in_brackets(bounds, places)),
                text(verdict(bounds, better, number(change, "prompts" if place else "documents"))),
            ]


def _accuracy_gains(pair: str, tasks: dict[str, Any]) -> Table | None:
    by_task = {task: group(tasks, task) for task in tasks}
    counts = sorted({count for found in by_task.values() for count in found}, key=rising)
    rows = [
        [text(one_line(task)), *(_gain(group(found, count)) for count in counts)] for task, found in by_task.items()
    ]
    if not rows or not counts:
        return None
    notes = ("By number of demonstrations, item by item; in brackets the 95 % interval.",)
    return Table(f"Few-shot accuracy, {one_line(pair)}", ("task", *counts), rows, notes)


def _gain(figures: dict[str, Any]) -> Cell:
    difference, bounds = number(figures, "difference"), interval(figures, "difference")
    if difference is None:
        return Cell("–")
    told = verdict(bounds, 1, number(figures, "items"))
    return Cell(signed(difference), f"{in_brackets(bounds)} {told if told[0] in '▲▼' else ''}".strip())
