"""What is found with one model, as a run keeps it: a run that is killed goes on with the next model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.perplexity import DocumentScore
from evaluation.responses import Response
from evaluation.suite import Answer, Measured
from rlhf.rundir import write_atomically, write_json

ANSWERS, DOCUMENTS, RESPONSES, FIGURES = "answers.jsonl", "documents.jsonl", "responses.jsonl", "figures.json"


class Findings(NamedTuple):
    """What is found with one model."""

    measured: Measured
    responses: list[list[Response]]  # to each prompt
    memorised: dict[str, Any]  # figures; empty where no training document is known


def write_findings(folder: Path, found: Findings) -> None:
    """Writes them as files."""
    write_json(folder / FIGURES, {"figures": found.measured.figures, "memorised": found.memorised})
    _write_lines(folder / ANSWERS, (answer._asdict() for answer in found.measured.answers))
    scores = found.measured.documents.items()
    _write_lines(folder / DOCUMENTS, ({"source": source, **each._asdict()} for source, of in scores for each in of))
    _write_lines(folder / RESPONSES, ([response._asdict() for response in given] for given in found.responses))


def read_findings(folder: Path) -> Findings:
    """What `write_findings` wrote."""
    facts = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
    answers = [Answer(**{**line, "logprobs": tuple(line["logprobs"])}) for line in _lines(folder / ANSWERS)]
    documents: dict[str, list[DocumentScore]] = {}
    for line in _lines(folder / DOCUMENTS):
        documents.setdefault(line.pop("source"), []).append(DocumentScore(**line))
    responses = [[Response(**response) for response in given] for given in _lines(folder / RESPONSES)]
    return Findings(Measured(facts["figures"], answers, documents), responses, facts["memorised"])


def details(name: str, found: Findings) -> Iterator[str]:
    """A JSON line for every document that a model has read, every question and every prompt that it was asked."""
    for source, scores in found.measured.documents.items():
        for number, score in enumerate(scores):
            yield _line({"model": name, "source": source, "document": number, **score._asdict()})
    for answer in found.measured.answers:
        yield _line({"model": name, **answer._asdict()})
    for number, given in enumerate(found.responses):
        for response in given:
            yield _line({"model": name, "prompt": number, **response._asdict()})


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _write_lines(path: Path, values: Any) -> None:
    write_atomically(path, "".join(map(_line, values)))


def _lines(path: Path) -> Iterator[Any]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
