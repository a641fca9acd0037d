"""A report as Markdown, short enough for a pull request: its sentences and tables, without charts and answers.

Whatever models and files said is text: it makes no markup, no HTML, no link, no image, and names nobody.
"""

import re

from evaluation.report.document import Block, Cell, Document, Facts, Paragraph, Table
from evaluation.report.reading import safe

SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~&$^=-])")
# what becomes a link or a mention by itself: a zero-width character in it, and it doesn't
LINKS_ITSELF = re.compile(r"(?i)(@|://|www\.|#)(?=\w)")
IN_MARKDOWN = ("outcome", "chain", "evaluation", "gains", "contamination", "wins", "reward", "optimisation", "differs")


def markdown(document: Document) -> str:
    """The document as GitHub's Markdown."""
    parts = [f"## {escaped(document.title)}", escaped(document.subtitle)]
    for section in document.sections:
        if section.name not in IN_MARKDOWN:
            continue
        found = [text for block in section.blocks if (text := _block(block))]
        if found:
            parts += [f"### {escaped(section.title)}", *found]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """A text on one line that Markdown shows as it is."""
    plain = " ".join(safe(text).split())
    return SPECIAL.sub(r"\\\1", LINKS_ITSELF.sub("\\1\u2060", plain)).replace("\\<", "&lt;").replace("\\>", "&gt;")


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return escaped(block.text)
    if isinstance(block, Facts):
        return "\n".join(f"- {escaped(name)}: **{escaped(value)}** {escaped(note)}".rstrip() for name, value, note in block.facts)
    if isinstance(block, Table) and block.in_markdown:
        return _table(block)
    return ""


def _table(table: Table) -> str:
    aligned = [("---:" if table.rows and table.rows[0][column].number else ":---") for column in range(len(table.header))]
    lines = [f"**{escaped(table.caption)}**", ""]
    lines += [_row([escaped(title) for title in table.header]), _row(aligned)]
    lines += [_row([_cell(cell) for cell in row]) for row in table.rows]
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    return escaped(f"{cell.text} {cell.note}".strip())
