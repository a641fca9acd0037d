"""A corpus: what pretrain learns from, as tokens, in a directory of its own beside the stages.

There is one of the new texts, and one of those that are replayed, where the recipe replays any.

It is made where it is missing, by `rlhf run pretrain` (the first process; the others wait) or `rlhf prepare`, kept as
long as what it was made from stays the same, moved aside where that has changed, gone on with where a run was killed.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from evaluation.tasks import file_tasks, tinyworld_tasks, training_examples
from rlhf.data.overlap import RunSearch, item_runs
from rlhf.data.prepare.card import unique_names
from rlhf.data.prepare.cleaning import STEPS
from rlhf.data.prepare.incontext import InContext
from rlhf.data.prepare.inputs import CORPUS, corpora, corpus_inputs
from rlhf.data.prepare.packing import DOCUMENT, DOCUMENTS, TOKENS
from rlhf.data.prepare.personal import KINDS
from rlhf.data.prepare.pipeline import Plan, finish, pack_texts, prepare_texts
from rlhf.data.prepare.sketches import band_rows
from rlhf.data.prepare.treatment import Steps
from rlhf.data.reader import MAX_LINE_BYTES, Faults
from rlhf.data.tokens import PackedTokens, PackStats, token_dtype
from rlhf.data.words import words_of
from rlhf.errors import DataError, UserError
from rlhf.job import Job
from rlhf.recipe import PrepareSection, Recipe, fields_at_default, newer_keys
from rlhf.rundir import RunDir, StageDir, digest_file, read_json, write_json
from rlhf.runtime import derive_seed, log
from rlhf.tokenizer import begin_id
from stages.common import named_model, open_data, report_faults

CARD = "card.json"
BATCH = 500  # documents that are decoded at a time
EVERY_ITEM = 10**9


class Corpus(NamedTuple):
    """A complete one."""

    folder: Path
    card: dict[str, Any]

    @property
    def stats(self) -> PackStats:
        """How much there is of it."""
        out = self.card["out"]
        return PackStats(out["documents"], out["tokens"], out["bytes"])

    def rows(self, vocab_size: int, length: int, seed: int | None) -> PackedTokens:
        """Its tokens in rows of so many, in an order that depends on the seed."""
        return PackedTokens(self.folder / TOKENS, vocab_size, length, seed)

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
        """Its documents as they are read in training, with the tokenizer that it was made for."""
        kind = token_dtype(len(tokenizer))
        tokens = np.memmap(self.folder / TOKENS, dtype=kind, mode="r")
        places = np.memmap(self.folder / DOCUMENTS, dtype=DOCUMENT, mode="r")
        around = {begin_id(tokenizer), tokenizer.eos_token_id}  # what stands around every document
        for start in range(0, len(places), BATCH):
            batch = []
            for place in places[start : start + BATCH]:
                ids = tokens[int(place["start"]) : int(place["start"]) + int(place["tokens"])].tolist()
                batch.append(ids[1:-1] if ids[-1] in around else ids[1:])
            yield from tokenizer.batch_decode(batch)

    def summary(self) -> dict[str, Any]:
        """The card in short, for the summary of pretrain."""
        keys = ("documents", "bytes", "tokens", "bytes_per_token")
        found: dict[str, Any] = {
            "sources": {
                name: {key: source["out"][key] for key in keys if key in source["out"]}
                for name, source in self.card["sources"].items()
            }
        }
        if self.card["prepared"]:
            found = {"documents_in": self.card["in"]["documents"], "bytes_in": self.card["in"]["bytes"], **found}
            found["removed"] = {why: figures["documents"] for why, figures in self.card["removed"].items()}
        return {**{key: self.card["out"][key] for key in keys}, **found}


def corpus_of(run: RunDir, name: str = CORPUS) -> Corpus | None:
    """The corpus of a run in the directory of this name; None where there is no complete one."""
    card = read_json(run.path / name / CARD)
    return Corpus(run.path / name, card) if card else None


def training_corpus(job: Job, tokenizer: PreTrainedTokenizerBase, name: str = CORPUS) -> Corpus:
    """A corpus of a pretrain stage, made by the first process where it is missing."""
    return job.team.from_main(lambda: make_corpus(job.recipe, job.run, tokenizer, name))


def tokenizer_of(recipe: Recipe, run: RunDir) -> PreTrainedTokenizerBase:
    """The tokenizer that a recipe's corpus is made for."""
    start = named_model(recipe, recipe.base) if recipe.base else named_model(recipe, str(run.stage("tokenizer").model))
    return start.tokenizer()


def make_corpus(
    recipe: Recipe, run: RunDir, tokenizer: PreTrainedTokenizerBase, name: str = CORPUS, *, fresh: bool = False
) -> Corpus:
    """The corpus as the recipe says: the one that is there, or a new one. Raises DataError where the texts are bad."""
    directory = StageDir(run.path / name)
    inputs = json.loads(json.dumps(corpus_inputs(recipe, name, _tokenizer_digest(tokenizer))))
    assert recipe.pretrain is not None
    why = "--fresh" if fresh and directory.path.exists() else _stale(directory, inputs, recipe.pretrain.prepare)
    card = read_json(directory.path / CARD)
    if card and not why:
        finish(directory.path)  # where the process was killed before that
        log(f"{name}: as it was made ({_in_short(card)}); see {directory.path / CARD}")
        return Corpus(directory.path, card)
    aside = None
    if why:
        aside = directory.move_aside()
        log(f"{name}: made anew, since {why} (the old one is now {aside.name})")
    elif directory.path.exists():
        log(f"{name}: was interrupted, goes on")
    directory.path.mkdir(exist_ok=True)
    if not directory.manifest():
        write_json(directory.manifest_file, {"inputs": inputs})
    try:
        return _made(recipe, directory, inputs, tokenizer)
    except UserError:
        if aside:
            shutil.rmtree(directory.path)
            aside.rename(directory.path)
            log(f"{name}: no new one could be made, so the old one is back in its place")
        raise


def _made(recipe: Recipe, directory: StageDir, inputs: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Corpus:
    section = recipe.pretrain
    assert section is not None
    name = directory.path.name
    sources = corpora(recipe)[name]
    dataset = open_data(
        recipe, "pretrain", sources, "texts", "train", _not_too_long if section.prepare else None,
        split_texts=section.prepare is not None,
    )  # fmt: skip
    plan = Plan(
        dataset,
        unique_names([str(source) for source in sources]),
        [source.weight for source in sources],
        tokenizer,
        derive_seed(recipe.seed, "pretrain", "texts", "train"),
    )
    if section.prepare is None:
        card = pack_texts(directory.path, plan)
    else:
        card = prepare_texts(directory.path, _with_steps(plan, recipe, section.prepare, name))
    report_faults(dataset)
    card |= {"settings": inputs}
    files = {name: _facts(directory.path / name) for name in (TOKENS, DOCUMENTS)}
    write_json(directory.manifest_file, {"inputs": inputs, "files": files})
    write_json(directory.path / CARD, card)
    finish(directory.path)
    for line in _told(card):
        log(f"{name}: {line}")
    return Corpus(directory.path, card)


def _not_too_long(text: str) -> str:
    """The text. Raises DataError where no line of a file may be so long."""
    if len(text) > MAX_LINE_BYTES:
        raise DataError(f"a text of more than {MAX_LINE_BYTES // 2**20} Mi characters; cut it into several rows")
    return text


# Whether it is there


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """The digest of a tokenizer's file, or the name by which it was loaded; and what it puts around a document."""
    file = Path(tokenizer.name_or_path) / "tokenizer.json"
    name = digest_file(file) if file.is_file() else tokenizer.name_or_path
    return f"{name} {begin_id(tokenizer)} {tokenizer.eos_token_id}"


def _stale(directory: StageDir, inputs: dict[str, Any], prepare: PrepareSection | None) -> str:
    """Why the corpus that is there, whole or not, is not the one that these inputs make; empty where it is."""
    if not directory.path.exists():
        return ""
    was = directory.manifest().get("inputs", {})
    if not was:
        return "it was never really begun"
    new = newer_keys({f"prepare.{key}" for key in fields_at_default(prepare)}, was) if prepare else set()
    changed = {key: _difference(key, was, inputs) for key in {**was, **inputs} if was.get(key) != inputs.get(key)}
    changed = {key: told for key, told in changed.items() if key not in new}
    if (was.get("data.on_bad_row"), inputs["data.on_bad_row"]) == ("error", "skip"):
        del changed["data.on_bad_row"]  # it had no bad row, or hasn't met it yet
    if changed:
        return "; ".join(list(changed.values())[:3])
    for name, (size, time, digest) in (read_json(directory.manifest_file) or {}).get("files", {}).items():
        path = directory.path / name
        if not path.is_file():
            return f"its {name} is gone"
        if [path.stat().st_size, path.stat().st_mtime_ns] != [size, time] and digest_file(path) != digest:
            return f"its {name} was changed"
    return ""


def _difference(key: str, was: dict[str, Any], now: dict[str, Any]) -> str:
    if key.startswith(("file ", "tasks ")) and not (key in was and key in now):
        return f"{key} is {'new' if key in now else 'no longer read'}"
    return f"{key} has changed"


def _facts(path: Path) -> list[Any]:
    return [path.stat().st_size, path.stat().st_mtime_ns, digest_file(path)]


# What is done with the texts


def _with_steps(plan: Plan, recipe: Recipe, prepare: PrepareSection, name: str) -> Plan:
    """The plan with what the recipe's `prepare` says, as plain values."""
    cleaning, filters, near = prepare.cleaning, prepare.filters, prepare.near_duplicates
    limits = filters.model_dump(exclude={"from_words"}, exclude_none=True) if filters else None
    owners = _runs_of_items(recipe, prepare)
    items = RunSearch(tuple(run.split(" ")) for run in owners) if owners else None
    longest = prepare.decontamination.words if prepare.decontamination else 0
    steps = Steps(
        cleaning=tuple(name for name in STEPS if cleaning and getattr(cleaning, name)),
        limits=limits,
        from_words=filters.from_words if filters else 0,
        personal=tuple(name for name in KINDS if getattr(prepare.personal_data, name)),
        items=items,
        longest_run=longest,
        band_rows=band_rows(near.changed_words) if near else 0,
        sketched_words=near.min_words if near else 0,
    )
    return plan._replace(
        steps=steps,
        equal=prepare.exact_duplicates,
        changed=near.changed_words if near else None,
        owners=owners,
        incontext=_incontext(recipe, prepare, items) if name == CORPUS else None,
        processes=recipe.threads or len(os.sched_getaffinity(0)),
    )


def _runs_of_items(recipe: Recipe, prepare: PrepareSection) -> dict[str, list[tuple[str, int]]]:
    """The runs of words that no document may have, each with the tasks and items that have it."""
    found: dict[str, list[tuple[str, int]]] = {}
    if prepare.decontamination is None or recipe.evaluate is None:
        return found
    section = recipe.evaluate.fewshot
    seed = derive_seed(recipe.seed, "evaluate", "items")
    for name in section.tasks:
        if name == "tinyworld":
            probes = {task.name: task.probes(section.items, seed) for task in tinyworld_tasks()}
        else:
            tasks = _in_folder(recipe, name, file_tasks)
            probes = {task.name: task.probes(EVERY_ITEM, seed) for task in tasks}
        for task, asked in probes.items():
            for item, runs in enumerate(item_runs(asked, prepare.decontamination.words)):
                for run in runs:
                    found.setdefault(" ".join(run), []).append((task, item))
    return found


def _in_folder(recipe: Recipe, name: str, read: Callable[[Path, Faults, str], Any]) -> Any:
    """What `read` finds of FOLDER or FOLDER/TASK; says what it had to skip."""
    folder = Path(recipe.data.root) / name
    faults = Faults(recipe.data.on_bad_row)
    whole = folder.is_dir()
    found = read(folder if whole else folder.parent, faults, "" if whole else folder.name)
    if faults.counts:
        log(faults.report())
    return found


def _incontext(recipe: Recipe, prepare: PrepareSection, items: RunSearch | None) -> tuple[InContext, float] | None:
    """The documents to be made and their share; no row is among them that holds an item of the evaluation."""
    section = prepare.incontext
    if section is None:
        return None
    examples: dict[str, Any] = {}
    held_back: dict[str, int] = {}
    for name in section.tasks:
        for task, rows in _in_folder(recipe, name, training_examples).items():
            held = {number for number, _ in items.find([words_of(row.item) for row in rows])} if items else set()
            examples[task] = [row for number, row in enumerate(rows) if number not in held]
            if held:
                held_back[task] = len(held)
                log(
                    f"corpus: {len(held):,} training rows of {task} are in no in-context document, since they hold "
                    "items of evaluate.fewshot.tasks"
                )
    seed = derive_seed(recipe.seed, "pretrain", "incontext")
    made = InContext(examples, section.shots, seed, held_back)
    if not made.tasks:
        raise DataError(f"pretrain.prepare.incontext: no task has rows for {min(section.shots)} demonstrations")
    for task, counts in made.left_out.items():
        told = ", ".join(map(str, counts))
        log(f"corpus: in-context documents of {task} without {told} demonstrations: it has {len(examples[task])} rows")
    return made, section.share


# What is said of it


def _in_short(card: dict[str, Any]) -> str:
    out = card["out"]
    return (
        f"{out['documents']:,} documents, {out['bytes'] / 1e6:,.1f} MB, {out['tokens']:,} tokens, "
        f"{out.get('bytes_per_token', 0):.2f} bytes a token"
    )


def _told(card: dict[str, Any]) -> list[str]:
    """The totals, a few lines."""
    seconds = sum(card["seconds"].values())
    lines = []
    if card["prepared"]:
        read, removed = card["in"], card["removed"]
        total = sum(figures["documents"] for figures in removed.values())
        lines.append(
            f"{read['documents']:,} documents, {read['bytes'] / 1e6:,.1f} MB read in; {total:,} removed"
            + (": " if removed else "")
            + ", ".join(f"{why} {figures['documents']:,}" for why, figures in removed.items())
        )
    if card["bad_rows"]:
        lines.append(f"{card['bad_rows']:,} bad rows skipped")
    return [*lines, f"{_in_short(card)}; {seconds:.0f} s"]
