"""What was measured, on the terminal: models side by side."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evaluation.harness import harness_table
from evaluation.report.measured import fewshot_notes
from rlhf.runtime import visible

FEWSHOT = "few-shot accuracy by number of demonstrations"


def show(summary: dict[str, Any], shots: Sequence[int]) -> None:
    """Prints a table for each measure that there is."""
    console = Console(highlight=False, soft_wrap=True)
    results = summary["models"]
    for table in (
        _documents(results),
        _fewshot(results, shots),
        _harness(results),
        _behaviour(results),
        _memorisation(results),
        _win_rates(summary.get("win_rates", {})),
        _judges(summary.get("judges", {})),
        _contamination(summary.get("contamination", {})),
    ):
        if table.row_count:
            console.print(table)
        if table.title == FEWSHOT:
            for note in fewshot_notes(results):
                console.print(_said(note))


def _documents(results: dict[str, Any]) -> Table:
    table = _table("held-out documents", "model", "perplexity", "bits per byte")
    for name, result in results.items():
        if "perplexity" in result:
            table.add_row(_said(name), f"{result['perplexity']:.3f}", _share(result, "bits_per_byte", 4))
    return table


def _fewshot(results: dict[str, Any], shots: Sequence[int]) -> Table:
    """Below each task, chance and what copying the most frequent demonstrated answer gives."""
    table = Table(title=FEWSHOT, title_justify="left")
    table.add_column("task")
    table.add_column("model", overflow="fold")
    for count in shots:
        table.add_column(str(count), justify="right")
    tasks = next(iter(results.values()))["fewshot"] if results else {}
    for task in tasks:
        by_model = {name: [result["fewshot"][task][str(count)] for count in shots] for name, result in results.items()}
        for number, (name, found) in enumerate(by_model.items()):
            table.add_row("" if number else _said(task), _said(name), *map(_accuracy, found))
        for label, key in (("(chance)", "chance"), ("(copy)", "copy_baseline")):
            cells = (_first(column, key) for column in zip(*by_model.values(), strict=True))
            table.add_row("", label, *cells, style="dim")
    return table


def _harness(results: dict[str, Any]) -> Table:
    found = {name: result["harness"] for name, result in results.items() if "harness" in result}
    return harness_table(found) if found else Table()


def _behaviour(results: dict[str, Any]) -> Table:
    found = {name: result["behaviour"] for name, result in results.items() if "behaviour" in result}
    known = [key for key in ("score", "gold") if any(key in figures for figures in found.values())]
    table = _table("responses", "model", "ended", "tokens", "repetition", "distinct 2-grams", *known)
    for name, figures in found.items():
        cells = (f"{figures['tokens']:.1f}", f"{figures['repetition']:.3f}", f"{figures['distinct_2']:.3f}")
        more = [f"{figures[key]:.3f}" if key in figures else "-" for key in known]
        table.add_row(_said(name), f"{figures['ended']:.2f}", *cells, *more)
    return table


def _memorisation(results: dict[str, Any]) -> Table:
    found = {name: result["memorisation"] for name, result in results.items() if "memorisation" in result}
    copies = list(dict.fromkeys(key for figures in found.values() for key in figures.get("by_copies", {})))
    headings = [f"{key} {'copy' if key == '1' else 'copies'}" for key in copies]
    table = _table("documents gone on with word for word", "model", "training", "held out", *headings)
    for name, figures in found.items():
        if "training" in figures:
            by_copies = figures["by_copies"]
            cells = [f"{by_copies[key]['verbatim']:.2f}" if key in by_copies else "-" for key in copies]
            control = _share(figures["held_out"], "verbatim") if "held_out" in figures else "-"
            table.add_row(_said(name), _share(figures["training"], "verbatim"), control, *cells)
        else:
            table.add_row(_said(name), _said(figures.get("not_available", "all documents are too short")))
    return table


def _win_rates(found: dict[str, Any]) -> Table:
    table = _table("which responses the judge prefers", "models", "win rate", "at equal lengths", "so")
    for name, figures in found.items():
        rates = [_share(figures, key) for key in ("win_rate", "length_controlled_win_rate")]
        table.add_row(_said(name), *rates, figures["verdict"])
    return table


def _judges(found: dict[str, Any]) -> Table:
    table = _table("judges on comparisons", "judge", "source", "pairs", "accuracy", "longer wins")
    for judge, figures in found.items():
        sources = figures["accuracy_by_source"] if len(figures["accuracy_by_source"]) > 1 else {}
        rows = [("all", figures["pairs_test"], figures), *((name, row["pairs"], row) for name, row in sources.items())]
        for number, (name, pairs, row) in enumerate(rows):
            shares = [_share(row, key) for key in ("accuracy", "length_baseline_accuracy")]
            table.add_row("" if number else _said(judge), _said(name), str(pairs), *shares)
    return table


def _contamination(found: dict[str, Any]) -> Table:
    title = "tasks' items that occur in the training texts"
    example = ["such as"] if any("example" in figures for figures in found.get("tasks", {}).values()) else []
    table = _table(title, "task", "items", "too short to tell", "share", "contaminated", *example)
    for name, figures in found.get("tasks", {}).items():
        share = _share(figures, "overlap") if "overlap" in figures else "-"
        named = "CONTAMINATED" if figures["contaminated"] else ""
        cells = (str(figures["items"]), str(figures["too_short"]), share, named)
        table.add_row(_said(name), *cells, *([_said(figures.get("example", ""))] if example else []))
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    return table


def _said(text: str) -> str:
    return escape(visible(text))


def _share(figures: dict[str, Any], key: str, digits: int = 2) -> str:
    """A figure with its interval."""
    if figures.get(key) is None:
        return "-"
    low, high = figures[f"{key}_ci95"]
    return escape(f"{figures[key]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")


def _accuracy(found: dict[str, Any]) -> str:
    """With a mark where not all items were asked: the notes below tell."""
    if "not_available" in found:
        return "n/a"
    return f"{found['accuracy']:.2f}{'*' if found['too_long'] else ''}"


def _first(found: Sequence[dict[str, Any]], key: str) -> str:
    """A figure that is the same for all models, of the first that has it."""
    return next((f"{figures[key]:.2f}" for figures in found if key in figures), "-")
