"""A report as Markdown, short enough for a pull request: its sentences and tables, without charts and answers.

Whatever models and files said is text: it makes no markup, no HTML, no link, no image, and names nobody.
"""

import re

from evaluation.report.document import Block, Cell, Document, Facts, Paragraph, Table
from evaluation.report.reading import safe

SPECIAL = re.compile(r"([\\`*_\[\]|~$&])")
AT_THE_START = re.compile(r"^([-+=#]|\d+(?=[.)](?:\s|$)))")  # what makes a list, a heading or a rule of a line
# what becomes a link or names somebody by itself: with a character of no width in it, it doesn't
LINKS_ITSELF = re.compile(r"(?i)(@|://|www\.|#)(?=\w)")
SECTIONS = ("outcome", "differs", "chain", "corpus", "evaluation", "gains", "optimisation")


def markdown(document: Document) -> str:
    """The document as GitHub's Markdown."""
    parts = [f"## {escaped(document.title)}", escaped(document.subtitle)]
    for section in document.sections:
        if section.name not in SECTIONS:
            continue
        found = [text for block in section.blocks if (text := _block(block))]
        if found:
            parts += [f"### {escaped(section.title)}", *found]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """A text on one line that Markdown shows as it is."""
    plain = LINKS_ITSELF.sub("\\1\u2060", " ".join(safe(text).split()))
    return AT_THE_START.sub(_started, SPECIAL.sub(r"\\\1", plain)).replace("<", "&lt;").replace(">", "&gt;")


def _started(match: "re.Match[str]") -> str:
    return f"{match[1]}\\" if match[1].isdigit() else f"\\{match[1]}"


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return escaped(block.text)
    if isinstance(block, Facts):
        return "\n".join(_fact(*fact) for fact in block.facts)
    if isinstance(block, Table) and block.in_markdown:
        return _table(block)
    return ""


def _fact(name: str, value: str, note: str) -> str:
    return f"- {escaped(name)}: **{escaped(value)}** {escaped(note)}".rstrip()


def _table(table: Table) -> str:
    first = table.rows[0] if table.rows else [Cell("")] * len(table.header)
    aligned = ["---:" if cell.number else ":---" for cell in first]
    lines = [f"**{escaped(table.caption)}**", ""]
    lines += [_row([escaped(title) for title in table.header]), _row(aligned)]
    lines += [_row([_cell(cell) for cell in row]) for row in table.rows]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    return escaped(f"{cell.text or cell.full} {cell.note}".strip())
