"""A run told from its files alone: as a page, as Markdown for a pull request, as JSON.

write_report(Path("runs/quickstart"))                                    # runs/quickstart/report.html
write_report(Path("runs/a"), Path("runs/b"), Path("a-b.md"), "md")       # two runs beside each other
"""

import json
from pathlib import Path
from typing import NamedTuple

from evaluation.report.compare import as_json, comparison
from evaluation.report.corpus import corpus
from evaluation.report.curves import curves
from evaluation.report.document import Document, cut
from evaluation.report.gains import gains
from evaluation.report.gather import Report, gather
from evaluation.report.judged import optimisation, reward
from evaluation.report.leaks import contamination
from evaluation.report.markdown import markdown
from evaluation.report.measured import evaluation, fewshot, win_rates
from evaluation.report.overview import chain, headline
from evaluation.report.page import page
from evaluation.report.reading import words
from evaluation.report.told import answers, lineage
from rlhf.errors import UserError
from rlhf.rundir import write_atomically

FORMATS = ("html", "json", "md")
MOST_BYTES = 3_000_000


class Room(NamedTuple):
    """How much is shown of what may be long."""

    answers: int  # prompts with their responses
    characters: int  # of each of their texts
    charts: int  # of few-shot tasks
    rows: int  # of a table


# tried in turn until the page is small enough
ROOMS = (Room(24, 1200, 60, 2000), Room(12, 800, 40, 600), Room(6, 400, 16, 200), Room(3, 200, 4, 50))


def render(run_dir: Path, other: Path | None, kind: str) -> str:
    """The report of a run, or of two beside each other, as text of this kind: html, json or md.

    Raises MissingInput where a directory is no run's, RecipeError where its recipe can't be read.
    """
    first, second = gather(run_dir), gather(other) if other else None
    if kind == "json":
        values = as_json(first, second) if second else first.as_json()
        return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    for room in ROOMS:
        found = cut(comparison(first, second) if second else document(first, room), room.rows)
        if kind == "md":
            return markdown(found)
        text = page(found)
        if len(text.encode()) < MOST_BYTES:
            return text
    raise UserError(f"{run_dir}: its report would be larger than {MOST_BYTES:,} bytes; take --format json")


def document(report: Report, room: Room) -> Document:
    """Everything there is to tell of a run."""
    sections = [
        headline(report),
        chain(report),
        corpus(report),
        curves(report),
        evaluation(report),
        gains(report),
        fewshot(report, room.charts),
        contamination(report),
        win_rates(report),
        reward(report),
        optimisation(report),
        answers(report, room.answers, room.characters),
        lineage(report),
    ]
    started = min((words(stage.summary, "started") for stage in report.stages.values() if stage.summary), default="")
    told = ["The report of a run", report.directory, started[:10], f"rlhf {report.version}"]
    return Document(report.name, " · ".join(part for part in told if part), sections)


def write_report(run_dir: Path, other: Path | None = None, output: Path | None = None, kind: str = "html") -> Path:
    """Writes the report, by default as report.html into the run's directory; returns where it is.

    Raises MissingInput where a directory is no run's, RecipeError where its recipe can't be read, OSError where the
    file can't be written.
    """
    text = render(run_dir, other, kind)
    name = f"report-vs-{other.absolute().name}" if other else "report"
    target = output or run_dir / f"{name}.{kind}"
    write_atomically(target, text.encode("utf-8", "backslashreplace").decode())
    return target
