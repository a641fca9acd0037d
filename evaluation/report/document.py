"""What a report is made of, before it is a page or Markdown: sections of paragraphs, tables, charts and answers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    note: str = ""  # after the text, in smaller print: an interval
    full: str = ""  # what the text is short for
    number: bool = True  # set on the right, its digits below each other


class Table(NamedTuple):
    """A table; the first cell of every row names the row."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    in_markdown: bool = True  # worth its room in a pull request


class Chart(NamedTuple):
    """A picture, drawn when it is needed: SVG by `evaluation.report.charts`, for a name that is unique in the page."""

    draw: Callable[[str], str]
    caption: str
    small: bool = False  # many of them stand beside each other


class Picture(NamedTuple):
    """A picture that a stage has left: PNG as a data URI."""

    uri: str
    caption: str


class Charts(NamedTuple):
    """Pictures that stand beside each other where there is room."""

    charts: Sequence[Chart | Picture]


class Paragraph(NamedTuple):
    """A few sentences."""

    text: str
    kind: str = ""  # "lead", "missing" or "warning"


class Facts(NamedTuple):
    """A few large numbers, each with what it is."""

    facts: Sequence[tuple[str, str, str]]  # what it is, the number, what is to be said besides


class Folded(NamedTuple):
    """A long text that a reader unfolds."""

    title: str
    text: str
    open: bool = False  # before it is asked for, and so in print


class Reply(NamedTuple):
    """What one model answered."""

    model: str
    text: str
    facts: str  # its length, score, ...


class Answers(NamedTuple):
    """One prompt, and what the models answered, side by side."""

    prompt: Sequence[tuple[str, str]]  # role and text
    replies: Sequence[Reply]


Block = Paragraph | Facts | Table | Charts | Folded | Answers


class Section(NamedTuple):
    """A part of the report with a heading."""

    name: str  # within links
    title: str
    blocks: Sequence[Block]


class Document(NamedTuple):
    """The whole report."""

    title: str
    subtitle: str
    sections: Sequence[Section]


def text(value: str) -> Cell:
    """A cell of words."""
    return Cell(value, number=False)


def cut(document: Document, rows: int) -> Document:
    """The document with at most so many rows in each table, and how many are left out below it."""
    sections = [
        section._replace(blocks=[_cut(block, rows) if isinstance(block, Table) else block for block in section.blocks])
        for section in document.sections
    ]
    return document._replace(sections=sections)


def _cut(table: Table, rows: int) -> Table:
    more = len(table.rows) - rows
    if more <= 0:
        return table
    told = f"{more:,} more rows are left out here; `rlhf report --format json` has everything."
    return table._replace(rows=table.rows[:rows], notes=[*table.notes, told])
