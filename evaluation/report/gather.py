"""A run as its files tell it: recipe, summaries, manifests, metrics, answers. Nothing is loaded or computed anew.

A stage that wasn't run, that ended in the middle or runs now, and a file that is torn are said to be so.
"""

import base64
import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import rlhf
from evaluation.report.reading import finite, number, words
from rlhf.data.prepare.inputs import CORPUS, REPLAYED
from rlhf.errors import MissingInput
from rlhf.recipe import STAGES, read_yaml
from rlhf.rundir import RunDir, StageDir

MOST_POINTS = 400  # of a curve: more can't be seen
MOST_ANSWERS = 40  # prompts of evaluate/responses.jsonl
MOST_METRIC_BYTES = 256 * 2**20
MOST_PICTURE_BYTES = 200_000
OLD_PICTURES = {"reliability.png": "Reliability", "length.png": "Score and length"}


class Curve(NamedTuple):
    """A figure over the steps or updates of a stage, thinned out."""

    steps: list[float]
    values: list[float]
    not_finite: int = 0  # values that were no numbers, and are not among these


class StageReport(NamedTuple):
    """What there is of a stage."""

    name: str
    state: str  # "done", "running", "interrupted", "not run"
    note: str  # where it stands, why it ended, what it doesn't fit to
    summary: dict[str, Any]  # empty where it isn't complete
    manifest: dict[str, Any]
    curves: dict[str, Curve]
    torn_lines: int  # of metrics.jsonl
    command: str  # what runs it


class Report(NamedTuple):
    """A run."""

    name: str
    description: str
    directory: str
    version: str  # of the package that read it
    recipe: dict[str, Any]
    recipe_text: str
    stages: dict[str, StageReport]
    corpora: dict[str, dict[str, Any]]  # the card.json of each corpus that is there, by its directory
    calibration: dict[str, Any]  # reward/calibration.json
    answers: list[dict[str, Any]]  # the first lines of evaluate/responses.jsonl
    answers_in_all: int
    pictures: dict[str, str]  # of runs without calibration.json: what it shows -> data URI

    @property
    def run_dir(self) -> Path:
        """Where it is."""
        return Path(self.directory)

    def summary(self, stage: str) -> dict[str, Any]:
        """A stage's summary; empty where it isn't complete or isn't part of the run."""
        return self.stages[stage].summary if stage in self.stages else {}

    def as_json(self) -> dict[str, Any]:
        """The same as plain values; pictures are left out."""
        found = {key: value for key, value in self._asdict().items() if key != "pictures"}
        found["stages"] = {
            name: {**stage._asdict(), "curves": {key: curve._asdict() for key, curve in stage.curves.items()}}
            for name, stage in self.stages.items()
        }
        return finite(found)


def gather(run_dir: Path) -> Report:
    """Reads a run's directory. Raises MissingInput where it is none, RecipeError where its recipe can't be read."""
    file = run_dir / "recipe.yaml"
    if not file.is_file():
        raise MissingInput(
            f"{run_dir} is no run's directory (it has no recipe.yaml); `rlhf run all --recipe quickstart` makes one"
        )
    recipe = read_yaml(file, "recipe")
    recipe = finite(recipe) if isinstance(recipe, dict) else {}
    run = RunDir(run_dir)
    named = recipe.get("stages")
    listed = [name for name in STAGES if not isinstance(named, list) or name in named]
    answers, in_all = _answers(run.stage("evaluate").path / "responses.jsonl")
    calibration = finite(_object(run.stage("reward").path / "calibration.json"))
    return Report(
        name=words(recipe, "name") or run_dir.absolute().name,
        description=words(recipe, "description"),
        directory=str(run_dir),
        version=rlhf.__version__,
        recipe=recipe,
        recipe_text=file.read_text(encoding="utf-8-sig", errors="replace"),
        stages={name: _stage(run, name) for name in listed},
        corpora={name: card for name in (CORPUS, REPLAYED) if (card := finite(_object(run_dir / name / "card.json")))},
        calibration=calibration,
        answers=answers,
        answers_in_all=in_all,
        pictures={} if calibration else _pictures(run.stage("reward").path / "plots"),
    )


def again(run_dir: Path, stage: str) -> str:
    """The command that runs a stage of this run."""
    return shlex.join(
        ["rlhf", "run", stage, "--recipe", str(run_dir / "recipe.yaml"), "--runs-dir", str(run_dir.parent)]
    )


def _stage(run: RunDir, name: str) -> StageReport:
    directory = run.stage(name)
    curves, torn, last = _curves(directory.metrics)
    found = _object(directory.summary_file)
    summary = finite(found) if found.get("stage") == name else {}
    manifest = _object(directory.manifest_file)
    manifest = finite(manifest) if isinstance(manifest.get("inputs"), dict) else {}
    if summary:
        state, note = "done", _older_inputs(run, manifest)
    elif directory.path.is_dir():
        state = "running" if run.holder() else "interrupted"
        note = _where(directory, last)
    else:
        state, note = "not run", ""
    return StageReport(name, state, note, summary, manifest, curves, torn, again(run.path, name))


def _older_inputs(run: RunDir, manifest: dict[str, Any]) -> str:
    """Which stages were made anew after this one had learned from them."""
    made_anew = [
        key.removeprefix("stage ")
        for key, digest in (manifest.get("inputs") or {}).items()
        if key.startswith("stage ") and _object(run.stage(key[6:]).manifest_file).get("output") not in (None, digest)
    ]
    return f"made from an earlier {', '.join(made_anew)}" if made_anew else ""


def _where(directory: StageDir, last: dict[str, Any]) -> str:
    place = next((f"at {key} {last[key]:,.0f}" for key in ("step", "update") if number(last, key) is not None), "")
    failure = directory.failure()
    return "; ".join(part for part in (place, f"it ended: {failure}" if failure else "") if part)


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# Metrics


def _curves(path: Path) -> tuple[dict[str, Curve], int, dict[str, Any]]:
    """Every figure of a metrics file over its step, how many lines can't be read, and the last one that can be."""
    found: dict[str, Curve] = {}
    torn, last = 0, dict[str, Any]()
    for line in _objects(path):
        step = next((number(line, key) for key in ("step", "update") if line and number(line, key) is not None), None)
        if line is None or step is None:
            torn += 1
            continue
        last = line
        for key, value in line.items():
            if key in ("step", "update", "time") or isinstance(value, bool):
                continue
            curve = found.setdefault(key, Curve([], []))
            finite_value = number(line, key)
            if finite_value is not None:
                curve.steps.append(step)
                curve.values.append(finite_value)
            elif value in ("nan", "inf", "-inf"):  # as the log writes what JSON can't hold
                found[key] = curve._replace(not_finite=curve.not_finite + 1)
    return {key: _thinned(curve) for key, curve in found.items() if curve.values or curve.not_finite}, torn, last


def _objects(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSON-lines file, None for a line that is none. Nothing where there is no such file."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_METRIC_BYTES:
            return
        with path.open("rb") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                yield value if isinstance(value, dict) else None
    except OSError:
        return


def _thinned(curve: Curve) -> Curve:
    """At most MOST_POINTS points, the first and the last among them: of each stretch, the one farthest from the mean of
    its neighbours, so that a spike stays.
    """
    count = len(curve.values)
    if count <= MOST_POINTS:
        return curve
    kept = [0, *_salient(curve.values, MOST_POINTS - 2), count - 1]
    return Curve([curve.steps[i] for i in kept], [curve.values[i] for i in kept], curve.not_finite)


def _salient(values: list[float], wanted: int) -> Iterable[int]:
    inner = len(values) - 2
    for stretch in range(wanted):
        start, stop = 1 + stretch * inner // wanted, 1 + (stretch + 1) * inner // wanted
        mean = sum(values[start:stop]) / (stop - start)
        yield max(range(start, stop), key=lambda i: abs(values[i] - mean))


# What else there is


def _answers(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The first prompts with their responses, and how many there are."""
    kept, count = list[dict[str, Any]](), 0
    for line in _objects(path):
        if line and isinstance(line.get("responses"), dict):
            count += 1
            if len(kept) < MOST_ANSWERS:
                kept.append(finite(line))
    return kept, count


def _pictures(folder: Path) -> dict[str, str]:
    found = {}
    for name, title in OLD_PICTURES.items():
        try:
            data = (folder / name).read_bytes()
        except OSError:
            continue
        if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) <= MOST_PICTURE_BYTES:
            found[title] = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return found
