"""What the training texts tell: which tasks' items occur in them, and which documents a model may have memorised."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from evaluation.contamination import OverlapSearch
from evaluation.memorisation import Document, DocumentSample
from rlhf.data.overlap import Probe
from rlhf.data.prepare.inputs import CORPUS, REPLAYED
from rlhf.job import Job
from rlhf.recipe import Recipe, training_sources
from rlhf.rundir import RunDir, write_atomically
from rlhf.runtime import Bar, derive_seed, log
from rlhf.saver import once
from rlhf.team import Team
from stages.common import open_data, report_faults
from stages.corpus import corpus_of, tokenizer_of

DOCUMENTS = "documents.jsonl"
BATCH = 500  # texts


class TrainingTexts(NamedTuple):
    """What was found in them."""

    contamination: dict[str, Any]  # as the summary says it
    overlaps: dict[str, list[bool | None]]  # by task, whether each of its items occurs there
    documents: list[Document]  # that a model may have memorised


def read_training(recipe: Recipe, probes: dict[str, list[Probe]], team: Team, job: Job | None) -> TrainingTexts | None:
    """Reads the training texts once; None where the recipe has none. A run keeps what was found."""
    if not training_sources(recipe):
        return None
    if job is None:
        return _read(recipe, probes, None)

    def make(folder: Path) -> dict[str, Any]:
        if not team.is_main:
            return {}
        found = _read(recipe, probes, job.run)
        lines = (json.dumps(document._asdict(), ensure_ascii=False) for document in found.documents)
        write_atomically(folder / DOCUMENTS, "".join(f"{line}\n" for line in lines))
        return {"contamination": found.contamination, "overlaps": found.overlaps}

    kept = once(job, "training-texts", make)
    lines = (kept.path / DOCUMENTS).read_text(encoding="utf-8").split("\n")
    return TrainingTexts(**kept.facts, documents=[Document(**json.loads(line)) for line in lines if line])


def _read(recipe: Recipe, probes: dict[str, list[Probe]], run: RunDir | None) -> TrainingTexts:
    assert recipe.evaluate is not None
    settings = recipe.evaluate.memorisation
    search = OverlapSearch(probes)
    sample = DocumentSample(settings.repeated, settings.random, derive_seed(recipe.seed, "evaluate", "documents"))
    log("evaluate: reading the training texts")
    with Bar("evaluate: training texts", None) as bar:
        for key, texts in _training_texts(recipe, run):
            search.read(texts)
            if key != "sft.train":  # a conversation is never read as it stands
                sample.read(texts)
            bar.show(search.documents, words=search.words)
    found = search.results()
    tasks = {name: overlap.summary() for name, overlap in found.items()}
    named = [name for name, figures in tasks.items() if figures["contaminated"]]
    contamination = {"documents": search.documents, "words": search.words, "contaminated": named, "tasks": tasks}
    overlaps = {name: list(overlap.items) for name, overlap in found.items()}
    return TrainingTexts(contamination, overlaps, sample.documents())


def _training_texts(recipe: Recipe, run: RunDir | None) -> Iterator[tuple[str, list[str]]]:
    """The very texts that the stages were trained on, a batch at a time, with the key that names them."""
    for key, sources in training_sources(recipe).items():
        stage, _, _ = key.partition(".")
        name = {"pretrain.train": CORPUS, "pretrain.replay.train": REPLAYED}.get(key)
        corpus = corpus_of(run, name) if run and name else None
        if run and corpus and corpus.card["prepared"]:  # what was removed, nobody was trained on
            yield from ((key, batch) for batch in _batches(corpus.texts(tokenizer_of(recipe, run))))
            continue
        dataset = open_data(recipe, stage, sources, "conversations" if stage == "sft" else "texts", "train")
        texts = ("\n".join(turn["content"] for turn in item) if stage == "sft" else item for item in dataset)
        yield from ((key, batch) for batch in _batches(texts))
        report_faults(dataset)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    found = iter(texts)
    while batch := list(islice(found, BATCH)):
        yield batch
