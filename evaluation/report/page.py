"""A report as one HTML file: nothing is fetched, no script runs, and whatever models and files said is text."""

from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from evaluation.report.document import Document
from evaluation.report.reading import safe

HERE = Path(__file__).parent


def page(document: Document) -> str:
    """The document as HTML. Every text is escaped; the charts, which are ours, are not."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        finalize=_safe,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    names = (f"chart{number}" for number in count(1))
    environment.filters["drawn"] = lambda chart: Markup(chart.draw(next(names)))  # its texts are escaped in there
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.jinja").render(document=document, style=Markup(style))


def _safe(value: Any) -> Any:
    return safe(value) if type(value) is str else value
