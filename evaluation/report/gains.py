"""What alignment gained and what it cost: differences from model to model, told apart from noise."""

from collections.abc import Iterator
from itertools import pairwise
from math import hypot
from typing import Any

from evaluation.report.document import Block, Cell, Section, Table, text
from evaluation.report.gather import Report
from evaluation.report.measured import TEXTS, missing, models_of, rising
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
    told = verdict(bounds, 1)
    return Cell(signed(difference), f"{in_brackets(bounds)} {told if told[0] in '▲▼' else ''}".strip())
