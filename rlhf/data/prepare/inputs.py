"""What decides how a corpus comes out: its fingerprint. Imports nothing heavy."""

from pathlib import Path
from typing import Any

import rlhf
from rlhf.data.files import source_files
from rlhf.recipe import Recipe, Source, result_fields
from rlhf.rundir import digest_file, digest_folder

CORPUS, REPLAYED = "corpus", "corpus-replayed"  # the directories of a run's corpora


def corpora(recipe: Recipe) -> dict[str, tuple[Source, ...]]:
    """The sources of each corpus that the stage pretrain learns from, by the name of its directory."""
    section = recipe.pretrain
    if section is None:
        return {}
    return {CORPUS: section.train, **({REPLAYED: section.replay.train} if section.replay else {})}


def corpus_inputs(recipe: Recipe, name: str, tokenizer: str) -> dict[str, Any]:
    """Everything that decides the corpus of this name, flat; `tokenizer` is its digest."""
    assert recipe.pretrain is not None
    sources, root = corpora(recipe)[name], Path(recipe.data.root)
    key = "train" if name == CORPUS else "replay.train"
    found: dict[str, Any] = {
        field: value
        for field, value in result_fields(recipe.pretrain).items()
        if field == key or field.split(".")[0] == "prepare"
    }
    if name == REPLAYED:  # no in-context documents are made of it
        found = {field: value for field, value in found.items() if not field.startswith("prepare.incontext")}
    found |= {"seed": recipe.seed, "data.on_bad_row": recipe.data.on_bad_row, "tokenizer": tokenizer}
    for source in sources:
        for path in source_files(source, root):
            found[f"file {path.relative_to(root) if path.is_relative_to(root) else path}"] = digest_file(path)
    if any(source.builtin for source in sources):
        found["tinyworld"] = _tinyworld()
    return found | task_inputs(recipe, incontext=name == CORPUS)


def task_inputs(recipe: Recipe, *, incontext: bool = True) -> dict[str, Any]:
    """What of few-shot tasks decides a corpus: which are kept out of it, and, with `incontext`, which it is made of."""
    prepare = recipe.pretrain.prepare if recipe.pretrain else None
    found: dict[str, Any] = {}
    if prepare is None:
        return found
    fewshot = recipe.evaluate.fewshot if recipe.evaluate and prepare.decontamination else None
    named = [*(fewshot.tasks if fewshot else ()), *(prepare.incontext.tasks if incontext and prepare.incontext else ())]
    for task in named:
        if task != "tinyworld":
            path = Path(recipe.data.root) / task
            found[f"tasks {task}"] = digest_folder(path if path.is_dir() else path.parent)
    if fewshot:
        found["evaluate.fewshot.tasks"] = list(fewshot.tasks)
        if "tinyworld" in fewshot.tasks:
            found |= {"evaluate.fewshot.items": fewshot.items, "tinyworld": _tinyworld()}
    return found


def _tinyworld() -> str:
    return digest_folder(Path(rlhf.__file__).parent / "tinyworld")
