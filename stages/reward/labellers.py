"""Who says which of two responses is better: the built-in world, a Python function, a preference file, a person.

A labeller is given a prompt and two responses to it, and says 1 (the first is better), 2, 0 (neither: a tie), or None
(it doesn't know). What it said is kept (`once`), so that nobody is asked twice, and ties and unknown pairs are counted.
"""

import itertools
import json
import math
import operator
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf.data.reader import Faults, read_rows
from rlhf.data.rows import Comparison, Malformed, to_comparisons
from rlhf.errors import DataError, StageFailed, UserError
from rlhf.job import Job
from rlhf.plugins import load_function
from rlhf.recipe import Source
from rlhf.rundir import digest_folder, write_atomically
from rlhf.runtime import Bar, derive_seed, log
from rlhf.saver import once
from rlhf.templates import Messages
from rlhf.tinyworld.oracle import prefers_first
from rlhf.tinyworld.words import Draw
from stages.common import open_data, report_faults

Split = Literal["train", "test"]
Labeller = Callable[[Messages, str, str], int | None]
KEY = "reward.collect.labeller"


class Labels(NamedTuple):
    """What a labeller said of a split."""

    comparisons: list[Comparison]
    ties: int = 0
    unknown: int = 0
    digest: str = ""  # of the folder that they come from, where a person labelled


def label_all(job: Job, name: str, responses: Sequence[tuple[Messages, list[str]]], split: Split) -> Labels:
    """Has every two responses to each prompt compared, and keeps what is said."""
    total = sum(math.comb(len(texts), 2) for _, texts in responses)

    def ask(folder: Path) -> dict[str, Any]:
        counts: Counter[str] = Counter()
        if job.team.is_main:
            labeller = _labeller(job, name, split)
            if name.startswith("python:"):
                labeller = remembering(labeller, job.directory.path / f"answers.{split}.jsonl")
            asked = ((prompt, *two) for prompt, texts in responses for two in itertools.combinations(texts, 2))
            with Bar(f"reward: comparing {split}", total) as bar:
                rows = _answers(labeller, asked, name, counts, bar)
                write_atomically(folder / "comparisons.jsonl", "".join(map(_line, rows)))
        return dict(counts)

    kept = once(job, f"labels-{split}", ask)
    lines = (kept.path / "comparisons.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    labels = Labels(
        [Comparison(**json.loads(line)) for line in lines], kept.facts.get("ties", 0), kept.facts.get("unknown", 0)
    )
    if labels.ties or labels.unknown:
        log(
            f"reward: {split}: {len(labels.comparisons)} comparisons by {name}; {labels.ties} ties are left out, and "
            f"{labels.unknown} pairs of which it knows nothing"
        )
    if not labels.comparisons:
        raise DataError(f"{KEY}: {name} prefers no response to another in any of the {total} {split} pairs")
    return labels


def _answers(
    labeller: Labeller,
    asked: Iterable[tuple[Messages, str, str]],
    name: str,
    counts: Counter[str],
    bar: Bar,
) -> Iterator[Comparison]:
    """The comparisons that a labeller's answers mean; what means none is counted."""
    for done, (prompt, first, second) in enumerate(asked, 1):
        choice = labeller(prompt, first, second)
        bar.show(done)
        if choice == 1:
            yield Comparison(prompt, first, second, source=name)
        elif choice == 2:
            yield Comparison(prompt, second, first, source=name)
        else:
            counts["unknown" if choice is None else "ties"] += 1


def _line(comparison: Comparison) -> str:
    return json.dumps(comparison._asdict(), ensure_ascii=False) + "\n"


def _labeller(job: Job, name: str, split: Split) -> Labeller:
    kind, _, rest = name.partition(":")
    if kind == "tinyworld":
        draw = Draw("labeller", derive_seed(job.recipe.seed, "reward", split))
        return lambda prompt, first, second: 1 if prefers_first(prompt[0]["content"], first, second, draw) else 2
    if kind == "python":
        return python_labeller(rest, Path(job.recipe.data.root))
    return _file_labeller(job, rest)


# A Python function


def python_labeller(reference: str, root: Path) -> Labeller:
    """The function that a recipe names: f(prompt: list of messages, first, second) -> 1, 2, or 0 for a tie.

    Raises UserError where it can't be had, where it raises, and where it returns anything else.
    """
    function = load_function(KEY, reference, root)

    def ask(prompt: Messages, first: str, second: str) -> int:
        try:
            answer = function([dict(message) for message in prompt], first, second)
        except Exception as error:  # whatever the user's function raises
            raise UserError(
                f"{KEY}: {reference} raised {type(error).__name__}: {error}, asked about "
                f"{_asked(prompt, first, second)}"
            ) from error
        try:
            choice = operator.index(answer)
        except TypeError:
            choice = -1
        if choice not in (0, 1, 2) or isinstance(answer, bool):
            raise UserError(
                f"{KEY}: {reference} returned {str(answer)[:60]!r} ({type(answer).__name__}), asked about "
                f"{_asked(prompt, first, second)}; it is to return 1 (the first is better), 2 or 0 (a tie)"
            )
        return choice

    return ask


def remembering(labeller: Labeller, path: Path) -> Labeller:
    """The labeller with what it has said in a file, a line an answer as it comes; it isn't asked again what is there.

    So a labeller that costs time or money loses nothing when the process is killed. A last line that was cut short is
    asked again.
    """
    kept = path.read_bytes() if path.exists() else b""
    kept = kept[: kept.rfind(b"\n") + 1]
    with path.open("ab") as file:
        file.truncate(len(kept))
    said = {json.dumps([row["prompt"], row["first"], row["second"]]): row["answer"] for row in _rows(kept)}
    if said:
        log(f"reward: {len(said)} answers in {path.name} are from before the stage was interrupted, and used again")

    def ask(prompt: Messages, first: str, second: str) -> int | None:
        key = json.dumps([prompt, first, second])
        if key not in said:
            said[key] = labeller(prompt, first, second)
            row = {"prompt": prompt, "first": first, "second": second, "answer": said[key]}
            with path.open("ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
        return said[key]

    return ask


def _rows(lines: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.split(b"\n")[:-1]]


def _asked(prompt: Messages, first: str, second: str) -> str:
    shown = [text if len(text) <= 60 else text[:57] + "..." for text in (prompt[-1]["content"], first, second)]
    return "the prompt {!r} with {!r} and {!r}".format(*shown)


# A file


def _file_labeller(job: Job, path: str) -> Labeller:
    """Looks comparisons up in a preference file, by prompt and the two texts in either order.

    Where it holds a pair more than once, the majority counts; the rows' own margins and weights don't.
    """
    dataset = open_data(job.recipe, "reward", (Source(path=path),), "comparisons", "train")  # type: ignore[call-arg]
    votes: Counter[tuple[str, str, str]] = Counter()
    known = set()
    for comparison in dataset:
        key = json.dumps(comparison.prompt)
        votes[key, comparison.chosen, comparison.rejected] += 1
        known |= {(key, comparison.chosen, comparison.rejected), (key, comparison.rejected, comparison.chosen)}
    report_faults(dataset)

    def look_up(prompt: Messages, first: str, second: str) -> int | None:
        key = json.dumps(prompt)
        if (key, first, second) not in known:
            return None
        lead = votes[key, first, second] - votes[key, second, first]
        return 0 if lead == 0 else 1 if lead > 0 else 2

    return look_up


# A person


def labelled_by_a_person(job: Job, splits: Sequence[Split]) -> dict[Split, Labels]:
    """What a person has answered (`rlhf label`), as it is when this is called first: kept, since more may come later.

    Raises StageFailed, saying what to do, where nothing is labelled yet of one of the splits; the stage stays.
    """
    folder, on_bad_row = job.run.labels, job.recipe.data.on_bad_row

    def keep(into: Path) -> dict[str, Any]:
        found = job.team.from_main(lambda: _read_labels(folder, splits, on_bad_row))
        if not all(found.values()):
            have = " and ".join(f"{len(found[split])} of {split}" for split in splits)
            raise StageFailed(
                f"reward: {have} comparisons are labelled in {folder}, and some of each are needed. The responses are "
                f"drawn; compare them with\n  rlhf label {job.run.path}\nand give the same command again, which goes on"
            )
        if not job.team.is_main:
            return {}
        (into / "labels").mkdir()
        for file in sorted(folder.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                shutil.copyfile(file, into / "labels" / file.name)
        _read_labels(into / "labels", splits, on_bad_row)  # a bad row that has just come in is not kept for ever
        return {"digest": digest_folder(into / "labels")}

    kept = once(job, "labels", keep)
    used = _read_labels(kept.path / "labels", splits, on_bad_row)
    log("reward: labelled by a person: " + ", ".join(f"{len(used[split])} {split} comparisons" for split in splits))
    return {split: Labels(used[split], digest=kept.facts["digest"]) for split in splits}


def _read_labels(
    folder: Path, splits: Sequence[Split], on_bad_row: Literal["error", "skip"]
) -> dict[Split, list[Comparison]]:
    """The comparisons of a folder of preference files whose rows say which `split` they are of."""
    found: dict[Split, list[Comparison]] = {split: [] for split in splits}
    faults = Faults(on_bad_row)
    for path in sorted(folder.glob("*.jsonl")) if folder.is_dir() else []:
        if path.stat().st_size == 0:
            continue
        for row in read_rows(path, faults):
            try:
                comparisons = [one._replace(source=one.source or "person") for one in to_comparisons(row.value)]
                split = row.value.get("split")
                if split not in ("train", "test"):
                    raise Malformed(f"`split` is {split!r}, and must be train or test")
            except Malformed as fault:
                faults.bad(row.path, row.line, str(fault), row.unit)
                continue
            if split in found:
                found[split] += comparisons
    if faults.counts:
        log(faults.report())
    return found
