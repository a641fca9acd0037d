"""The chain: which stages a command runs, what each stands on, and the process that each one gets.

A stage is *done* when it is complete and was made from what the recipe says now; *stale* when it was made from
something else; *interrupted* when it was begun and not completed. Decided by the recipe's fields that change the
result, the seed, the digests of the input files, and the digests of the models that it stands on.
Imports nothing heavy: the parent only decides, starts and waits.
"""

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

import rlhf
from rlhf.data.files import source_files
from rlhf.errors import MissingInput, StageFailed, UserError
from rlhf.recipe import Recipe, Source, StageName, needs_base, result_fields, upstream
from rlhf.rundir import RunDir, StageDir, digest_file, digest_folder, write_json

# What a stage stands on


def sources_in(section: BaseModel) -> Iterator[Source]:
    """Every data source named in a section."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Source):
            yield value
        elif isinstance(value, BaseModel):
            yield from sources_in(value)
        elif isinstance(value, tuple):
            for item in value:
                if isinstance(item, Source):
                    yield item


def _uses_tinyworld(recipe: Recipe, stage: StageName) -> bool:
    """Whether the built-in world makes something of what this stage reads, labels or asks."""
    labelled = stage == "reward" and recipe.reward is not None and recipe.reward.collect is not None
    asked = stage == "evaluate" and recipe.evaluate is not None and "tinyworld" in recipe.evaluate.fewshot.tasks
    return labelled or asked or any(source.builtin for source in sources_in(getattr(recipe, stage)))


def stage_inputs(recipe: Recipe, stage: StageName, run: RunDir) -> dict[str, Any]:
    """Everything that decides this stage's result, flat; equal dictionaries mean equal results."""
    section = getattr(recipe, stage)
    inputs: dict[str, Any] = {f"{stage}.{key}": value for key, value in result_fields(section).items()}
    inputs["seed"] = recipe.seed
    if stage == "pretrain":
        inputs |= {f"model.{key}": value for key, value in result_fields(recipe.model).items()}
    for source in sources_in(section):
        inputs["data.on_bad_row"] = recipe.data.on_bad_row
        for path in source_files(source, Path(recipe.data.root)):
            inputs[f"file {source.path} {path.name}"] = digest_file(path)
    if _uses_tinyworld(recipe, stage):
        inputs["tinyworld"] = digest_folder(Path(rlhf.__file__).parent / "tinyworld")
    if needs_base(recipe, stage) and recipe.base:
        inputs["base"] = digest_folder(Path(recipe.base)) if Path(recipe.base).is_dir() else recipe.base
    if stage == "reward" and recipe.reward and recipe.reward.from_:
        judge = Path(recipe.reward.from_)
        inputs["reward.from"] = digest_folder(judge) if judge.is_dir() else recipe.reward.from_
    if stage == "evaluate" and recipe.evaluate:
        for task in recipe.evaluate.fewshot.tasks:
            folder = Path(recipe.data.root) / task
            if task != "tinyworld":
                if not folder.is_dir():
                    raise MissingInput(f"evaluate.fewshot.tasks: no folder {folder} (and `tinyworld` is built in)")
                inputs[f"tasks {task}"] = digest_folder(folder)
    for name in upstream(recipe, stage):
        inputs[f"stage {name}"] = run.stage(name).output_digest()
    return inputs


class State(NamedTuple):
    """Where a stage stands, and why."""

    name: str  # "done", "stale", "interrupted", "missing"
    why: str = ""


def state_of(recipe: Recipe, stage: StageName, run: RunDir) -> State:
    """Whether the stage is done as the recipe says now; the reason where it isn't."""
    directory = run.stage(stage)
    if not directory.path.exists():
        return State("missing")
    if directory.summary() is None:
        return State("interrupted", "it was begun and not completed")
    for name in upstream(recipe, stage):
        if run.stage(name).summary() is None:
            return State("stale", f"the stage {name} that it stands on is gone")
    was, now = directory.manifest().get("inputs", {}), _jsonable(stage_inputs(recipe, stage, run))
    changed = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    if changed:
        return State("stale", _describe_changes(changed, was, now))
    return State("done")


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    return [_jsonable(v) for v in value] if isinstance(value, list | tuple) else value


def _describe_changes(changed: list[str], was: dict[str, Any], now: dict[str, Any]) -> str:
    words = []
    for key in changed[:3]:
        if key.startswith("stage "):
            words.append(f"{key.removeprefix('stage ')} was made anew")
        elif key.startswith(("file ", "base", "tinyworld", "tasks ")):
            words.append(f"{key} has changed")
        else:
            words.append(f"{key}: {was.get(key)} -> {now.get(key)}")
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return "; ".join(words) + more


# Running


def run_chain(
    recipe: Recipe, wanted: tuple[StageName, ...], runs_dir: Path, *, fresh: bool, command: str, recipe_name: str
) -> None:
    """Runs the wanted stages in order, each in a process of its own; skips what is done, redoes what is stale.

    Raises UserError for what the user must mend, StageFailed where a stage ended without finishing.
    """
    check_inputs(recipe, wanted)
    run = RunDir.of(recipe, runs_dir)
    if len(wanted) == 1:
        check_upstream(recipe, wanted[0], run, recipe_name)
    run.create()
    run.write_recipe(recipe)
    redone = 0
    for number, stage in enumerate(wanted, 1):
        directory = run.stage(stage)
        state = state_of(recipe, stage, run)
        label = f"[{number}/{len(wanted)}] {stage}"
        if state.name == "done" and not fresh:
            print(f"{label}: done, skipped", flush=True)
            continue
        if directory.path.exists():
            why = state.why or "--fresh"
            aside = directory.move_aside()
            print(f"{label}: redone, since {why} (the old one is now {aside.name})", flush=True)
        else:
            print(f"{label}: starts", flush=True)
        redone += 1
        begin_stage(recipe, stage, run, command)
        _run_in_process(stage, run, recipe)
        run.write_summary()
    if redone == 0:
        print(f"nothing to do: every stage of {run.path} is done with this recipe (--fresh runs it again)")


def check_inputs(recipe: Recipe, wanted: tuple[StageName, ...]) -> None:
    """Finds the files that the wanted stages read, so that a misspelt path is known before the first stage runs."""
    for stage in wanted:
        for source in sources_in(getattr(recipe, stage)):
            source_files(source, Path(recipe.data.root))
            if source.builtin and source.rows is None and stage != "ppo":
                raise UserError(f"{stage}: the source builtin: {source.builtin} never ends; say how many with rows:")
        if needs_base(recipe, stage) and recipe.base:
            _check_model_directory("base", recipe.base)
        if stage == "reward" and recipe.reward and recipe.reward.from_:
            _check_model_directory("reward.from", recipe.reward.from_)


def _check_model_directory(key: str, name: str) -> None:
    """A local directory must hold a model; what looks like a path must exist; anything else is a hub id."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MissingInput(f"{key}: {path} holds no config.json, so it is no Hugging Face model directory")
    elif path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingInput(f"{key}: no directory {path}")


def check_upstream(recipe: Recipe, stage: StageName, run: RunDir, recipe_name: str) -> None:
    """Raises MissingInput, naming the command, where a stage that this one stands on isn't done."""
    for name in upstream(recipe, stage):
        state = state_of(recipe, name, run)
        if state.name != "done":
            what = {"missing": "has not been run", "stale": f"is stale ({state.why})"}.get(
                state.name, "was interrupted"
            )
            raise MissingInput(
                f"{stage} stands on the stage {name}, which {what} in {run.path}; run\n"
                f"  rlhf run {name} --recipe {recipe_name}\n"
                f"first, or rlhf run all --recipe {recipe_name}"
            )


def begin_stage(recipe: Recipe, stage: StageName, run: RunDir, command: str) -> None:
    """Makes the stage's directory and writes down what goes in."""
    directory = run.stage(stage)
    directory.path.mkdir()
    write_json(
        directory.manifest_file,
        {
            "stage": stage,
            "inputs": _jsonable(stage_inputs(recipe, stage, run)),
            "versions": _versions(),
            "git_commit": _git_commit(),
            "command": command,
        },
    )


def finish_stage(directory: StageDir, summary: dict[str, Any]) -> None:
    """Writes the digest of what came out, then the summary, last: its existence says that the stage is complete."""
    output = digest_folder(directory.model) if directory.model.is_dir() else ""
    write_json(directory.manifest_file, {**directory.manifest(), "output": output})
    write_json(directory.summary_file, summary)


def _run_in_process(stage: StageName, run: RunDir, recipe: Recipe) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf.worker", stage, str(run.path)], env=_environment(recipe), stdin=subprocess.DEVNULL
    )

    def forward(number: int, _: object) -> None:
        process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if code == 130 or code in (-signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if code == UserError.exit_code:
        raise SystemExit(code)  # the stage has said what is wrong
    if code != 0:
        how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        raise StageFailed(f"the stage {stage} {how}")


def _environment(recipe: Recipe) -> dict[str, str]:
    """The stage's environment, which must be set before torch is imported.

    Threads: an idle OpenMP thread spins for some microseconds and then sleeps. Spinning without end stalls two threads
    on two shared cores; sleeping at once halves the speed of a small model.
    Memory: glibc keeps what is freed for the next step; giving it back costs a third of a small model's time.
    """
    threads = str(recipe.threads or len(os.sched_getaffinity(0)))
    return {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**36),
        "MALLOC_TOP_PAD_": str(2**27),
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "20000",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONUNBUFFERED": "1",
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "rlhf": rlhf.__version__}
    for package in ("torch", "transformers", "trl", "accelerate", "tokenizers", "datasets", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """The commit of the checkout that the package runs from, None where it is installed."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
