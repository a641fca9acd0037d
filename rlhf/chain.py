"""The chain: which stages a command runs, and what each stands on.

A stage is *done* when it is complete and was made from what the recipe says now; *stale* when it was made from
something else; *interrupted* when it was begun and not completed. Decided by the recipe's fields that change the
result, the seed, the digests of the input files, and the digests of the models that it stands on.
Imports nothing heavy: the parent only decides, starts and waits.
"""

import glob
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

import rlhf
from evaluation.harness import check_include, check_installed
from rlhf.choices import check_attention
from rlhf.data.files import source_files
from rlhf.data.prepare.inputs import corpora, task_inputs
from rlhf.errors import Interrupted, MissingInput, StageFailed, UserError
from rlhf.launch import TRAINING, run_processes
from rlhf.launch_file import LaunchFile
from rlhf.launcher import run_launched
from rlhf.plugins import check_function, function_file
from rlhf.quantisation import check_quantisation
from rlhf.recipe import (
    STAGES,
    External,
    FewShotSection,
    HarnessSection,
    Recipe,
    RequireSection,
    Source,
    StageName,
    evaluating_judges,
    externals,
    fields_at_default,
    microbatches,
    newer_keys,
    result_fields,
    training_sources,
    upstream,
)
from rlhf.rundir import (
    RunDir,
    StageDir,
    digest_file,
    digest_folder,
    digest_tree,
    files_in,
    model_config,
    no_room,
    write_json,
)
from rlhf.runtime import log
from rlhf.tinyworld.incontext import MAX_SHOTS
from rlhf.trackers import check_trackers

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
    collect = recipe.reward.collect if stage == "reward" and recipe.reward else None
    labelled = collect is not None and collect.labeller == "tinyworld"
    asked = stage == "evaluate" and recipe.evaluate is not None and "tinyworld" in recipe.evaluate.fewshot.tasks
    return labelled or asked or any(source.builtin for source in _sources(recipe, stage))


def _borrowed(recipe: Recipe, stage: StageName) -> dict[str, Any]:
    """What a stage takes from other sections where its own doesn't say it.

    The reward stage: how to normalise the score, by the way the reference answers, and the prompts that it is asked
    (stages.reward.normalise). The evaluate stage: how the models answer, who judges, and what they were trained on.
    """
    found: dict[str, Any] = {}
    reward, evaluate = recipe.reward, recipe.evaluate
    if stage == "reward" and reward and not reward.collect:
        found |= _borrowed_sampling(recipe) if reward.sampling is None else {}
        found |= _borrowed_fields(recipe, "ppo.prompts") if reward.from_ and recipe.ppo else {}
    if stage == "evaluate" and evaluate:
        found |= _borrowed_sampling(recipe) if evaluate.prompts and evaluate.sampling is None else {}
        key, judges = evaluating_judges(recipe)
        judged = evaluate.prompts or evaluate.comparisons
        found |= _borrowed_fields(recipe, key) if judged and judges and not evaluate.judge else {}
        found |= _borrowed_fields(recipe, *training_sources(recipe)) if not evaluate.training else {}
    return found


def _borrowed_sampling(recipe: Recipe) -> dict[str, Any]:
    """The way of answering that ppo, or else sft, has."""
    lender = next((name for name in ("ppo", "sft") if getattr(recipe, name)), None)
    fields = result_fields(getattr(recipe, lender)) if lender else {}
    return {f"{lender}.{key}": value for key, value in fields.items() if key.startswith("sampling.")}


def _borrowed_fields(recipe: Recipe, *keys: str) -> dict[str, Any]:
    """Fields of sections, by SECTION.FIELD."""
    return {key: result_fields(getattr(recipe, key.partition(".")[0]))[key.partition(".")[2]] for key in keys}


def _sources(recipe: Recipe, stage: StageName) -> list[Source]:
    """Every data source that a stage reads, those of other sections too."""
    found = list(sources_in(getattr(recipe, stage)))
    for key in _borrowed(recipe, stage):
        section, _, field = key.partition(".")
        value = getattr(getattr(recipe, section), field, None)
        found += [source for source in value if isinstance(source, Source)] if isinstance(value, tuple) else []
    return found


def stage_inputs(recipe: Recipe, stage: StageName, run: RunDir) -> dict[str, Any]:
    """Everything that decides this stage's result, flat; equal dictionaries mean equal results."""
    section = getattr(recipe, stage)
    inputs: dict[str, Any] = {f"{stage}.{key}": value for key, value in result_fields(section).items()}
    inputs["seed"] = recipe.seed
    if stage in TRAINING and recipe.precision != "auto":
        inputs["precision"] = recipe.precision
    if stage != "tokenizer" and recipe.attention != "auto":
        inputs["attention"] = recipe.attention
    if stage == "pretrain" and recipe.pretrain:
        inputs["pretrain.compile"] = recipe.pretrain.compile is True  # auto is as it was when nobody asked for it
    if stage == "pretrain" and recipe.base is None:
        inputs |= {f"model.{key}": value for key, value in result_fields(recipe.model).items()}
    inputs |= _borrowed(recipe, stage)
    for source in _sources(recipe, stage):
        inputs["data.on_bad_row"] = recipe.data.on_bad_row
        for path in source_files(source, Path(recipe.data.root)):
            inputs[f"file {_below(path, Path(recipe.data.root))}"] = _digest_input(path)
    if _uses_tinyworld(recipe, stage):
        inputs["tinyworld"] = digest_folder(Path(rlhf.__file__).parent / "tinyworld")
    for external in externals(recipe, stage):
        name = external.key if external.key in ("base", "reward.from") else f"{external.key} {external.value}"
        inputs[name] = _digest_external(external, Path(recipe.data.root))
    if stage == "reward" and recipe.reward and recipe.reward.collect and recipe.reward.collect.labeller == "person":
        inputs["labels"] = digest_folder(run.labels) if run.labels.is_dir() else ""
    if stage == "evaluate" and recipe.evaluate:
        for task in recipe.evaluate.fewshot.tasks:
            if task != "tinyworld":
                _check_tasks(recipe.evaluate.fewshot, Path(recipe.data.root))
                path = Path(recipe.data.root) / task
                inputs[f"tasks {task}"] = digest_folder(path if path.is_dir() else path.parent)
        include = recipe.evaluate.harness.include
        if include:
            check_include(Path(recipe.data.root) / include)
            inputs[f"harness {include}"] = digest_tree(Path(recipe.data.root) / include)
    if stage == "pretrain":
        inputs |= task_inputs(recipe)
    for name in upstream(recipe, stage):
        inputs[f"stage {name}"] = run.stage(name).output_digest()
    return inputs


def _digest_external(external: External, root: Path) -> str:
    """The digest of a model's folder, a file or a function's file; a hub id, or a module without one, is itself."""
    if external.kind in ("file", "python"):
        file = root / external.value if external.kind == "file" else function_file(external.value, root)
        return _digest_input(file) if file else external.value
    folder = Path(external.value)
    return digest_folder(folder) if folder.is_dir() else external.value


def _below(path: Path, root: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path


def _digest_input(path: Path) -> str:
    try:
        return digest_file(path)
    except OSError as error:
        raise MissingInput(f"{path}: can't be read: {error.strerror}") from None


class State(NamedTuple):
    """Where a stage stands, and why."""

    name: str  # "done", "stale", "interrupted", "missing"
    why: str = ""


def state_of(recipe: Recipe, stage: StageName, run: RunDir) -> State:
    """Whether the stage is done as the recipe says now; the reason where it isn't."""
    directory = run.stage(stage)
    if not directory.path.exists():
        return State("missing")
    for name in upstream(recipe, stage):
        if run.stage(name).summary() is None:
            return State("stale", f"the stage {name} that it stands on is {run.stage(name).presence}")
    was, now = directory.manifest().get("inputs", {}), _jsonable(stage_inputs(recipe, stage, run))
    # what an older version didn't know, and is as if nobody had asked for it, is as it was then
    new = newer_keys(_at_default(recipe, stage), was) if was else set()
    changed = [key for key in {**was, **now} if was.get(key) != now.get(key) and key not in new]
    if was.get("data.on_bad_row") == "error" and now.get("data.on_bad_row") == "skip" and "data.on_bad_row" in changed:
        changed.remove("data.on_bad_row")  # it had no bad row, so there is nothing to skip
    if directory.summary() is None and "labels" in changed:
        changed.remove("labels")  # a person is still labelling; what was used is written down at the end
    if changed:
        return State("stale", _describe_changes(changed, was, now) if was else "it was never really begun")
    if directory.summary() is None:
        return State("interrupted")
    damage = directory.damage()
    return State("stale", damage) if damage else State("done")


def _at_default(recipe: Recipe, stage: StageName) -> set[str]:
    """The keys of this stage's inputs whose values nobody had to give."""
    sections = {stage} | {key.partition(".")[0] for key in _borrowed(recipe, stage)}
    return {f"{name}.{key}" for name in sections for key in fields_at_default(getattr(recipe, name))}


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    return [_jsonable(v) for v in value] if isinstance(value, list | tuple) else value


def _describe_changes(changed: list[str], was: dict[str, Any], now: dict[str, Any]) -> str:
    words = []
    for key in changed[:3]:
        if key.startswith("stage "):
            words.append(f"{key.removeprefix('stage ')} was made anew")
        elif " " in key or key in ("base", "tinyworld"):
            words.append(f"{key} has changed")
        else:
            words.append(f"{key}: {was.get(key)} -> {now.get(key)}")
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return "; ".join(words) + more


# The gate before PPO


def check_gate(recipe: Recipe, stage: StageName, run: RunDir) -> None:
    """Raises StageFailed, with the reasons, where a finished reward stage lacks what `reward.require` asks for."""
    if stage != "reward" or recipe.reward is None:
        return
    reasons = unmet(recipe.reward.require, run.stage("reward").summary() or {})
    if reasons:
        raise StageFailed(
            f"the judge in {run.stage('reward').path} is not what reward.require asks for: {'; '.join(reasons)}. The "
            "stage is kept; better comparisons or other settings make a better judge, another reward.require lets this "
            "one pass"
        )


def unmet(require: RequireSection, summary: dict[str, Any]) -> list[str]:
    """What of the requirements the reward stage's summary doesn't show, each with its figures."""
    found = []
    if require != RequireSection() and summary.get("pairs_test") and summary.get("pairs_test_unseen") == 0:
        found.append(f"the prompts of all {summary['pairs_test']} test comparisons are trained on as well")
    for name, wanted in (("accuracy", require.accuracy), ("gold_accuracy", require.gold_accuracy)):
        value = summary.get(name)
        if wanted is not None and (value is None or value < wanted):
            found.append(f"{name} {'is not known' if value is None else value}, required {wanted}")
    accuracy, length = summary.get("accuracy"), summary.get("length_baseline_accuracy")
    if require.beats_length and (accuracy is None or length is None or accuracy <= length):
        found.append(f"accuracy {accuracy} does not beat preferring the longer response, {length}")
    error = summary.get("calibration_error")
    if require.calibration_error is not None and (error is None or error > require.calibration_error):
        shown = "is not known" if error is None else error
        found.append(f"calibration_error {shown}, required at most {require.calibration_error}")
    return found


# Running


def wanted_stages(recipe: Recipe, stage: str) -> tuple[StageName, ...]:
    """The stages that `all`, or the name of one, means. Raises UserError where the recipe has none of that name."""
    if stage != "all" and stage not in STAGES:
        raise UserError(f"no stage {stage!r}; there are: all {' '.join(STAGES)}")
    wanted = tuple(name for name in STAGES if name in recipe.stages and stage in ("all", name))
    if not wanted:
        raise UserError(f"the recipe {recipe.name} has no stage {stage}; its stages are: {' '.join(recipe.stages)}")
    return wanted


def run_chain(
    recipe: Recipe,
    wanted: tuple[StageName, ...],
    runs_dir: Path,
    *,
    fresh: bool,
    processes: int,
    command: str,
    again: Callable[[str], str],
    launch: LaunchFile | None = None,
) -> None:
    """Runs the wanted stages in order; skips what is done, goes on with what was interrupted, redoes what is stale.

    `launch`: Accelerate's launcher starts the processes, as many as this file says. `again` gives the command that runs
    a stage of this name with the same recipe. Raises UserError for what the user must mend, StageFailed where a stage
    ended without finishing, Interrupted where it was asked to stop.
    """
    processes = launch.processes if launch else processes
    check_inputs(recipe, wanted, processes)
    if launch:
        log(f"launch: {launch}")
    run = RunDir.of(recipe, runs_dir)
    run.check_free()
    if len(wanted) == 1:
        check_upstream(recipe, wanted[0], run, again)
    run.create()
    started = time.monotonic()
    with run.lock():
        run.write_recipe(recipe)
        todo = 0
        for number, stage in enumerate(wanted, 1):
            label = f"[{number}/{len(wanted)}] {stage}"
            plan = prepare(recipe, stage, run, fresh=fresh, command=command, label=label)
            if plan is None:
                check_gate(recipe, stage, run)
                continue
            todo += 1
            run.write_summary()  # without what was moved aside
            try:
                if launch:
                    run_launched(recipe, stage, run, launch)
                else:
                    run_processes(recipe, stage, run, processes)
            except SystemExit:  # the user's input was refused
                take_back(plan)
                raise
            run.write_summary()
            check_gate(recipe, stage, run)
        run.write_summary()  # of a run that was killed at its very end
    whole = len(wanted) > 1 or wanted == recipe.stages
    if whole:
        _report(run, anew=todo > 0)
    if todo == 0:
        print(f"nothing to do: every stage of {run.path} is done with this recipe (--fresh runs it again)")
    elif whole:
        _say_what_is_there(recipe, run, time.monotonic() - started)


def run_prepare(recipe: Recipe, runs_dir: Path, *, fresh: bool, again: Callable[[str], str]) -> None:
    """Makes the corpus that pretrain learns from, without training.

    Raises UserError for what the user must mend, MissingInput where the tokenizer isn't there yet.
    """
    if recipe.pretrain is None or "pretrain" not in recipe.stages:
        raise UserError("the recipe has no stage pretrain, so there is no corpus to prepare")
    for sources in corpora(recipe).values():
        for source in sources:
            source_files(source, Path(recipe.data.root))
            _check_ends("pretrain", source)
    _check_prepare(recipe)
    run = RunDir.of(recipe, runs_dir)
    run.check_free()
    check_upstream(recipe, "pretrain", run, again)
    run.create()
    with run.lock():
        from rlhf.runtime import quiet_libraries
        from rlhf.worker import disk_full
        from stages.corpus import make_corpus, tokenizer_of

        run.write_recipe(recipe)
        try:
            with quiet_libraries():
                tokenizer = tokenizer_of(recipe, run)
                made = [make_corpus(recipe, run, tokenizer, name, fresh=fresh) for name in corpora(recipe)]
        except KeyboardInterrupt:
            raise Interrupted("prepare: interrupted; the same command goes on with what is done") from None
        except OSError as error:
            if disk_full(error):
                raise StageFailed(no_room(run.path)) from None
            raise
    for corpus in made:
        print(f"the corpus: {corpus.folder}")


def _report(run: RunDir, *, anew: bool) -> None:
    """Writes the report of a finished run; where that fails, says why: the run is done all the same."""
    if not anew and (run.path / "report.html").exists():
        return
    try:
        from evaluation.report import write_report

        log(f"the report: {write_report(run.path)}")
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        log(f"the report could not be written ({why}); `rlhf report {run.path}` tries again")


def _say_what_is_there(recipe: Recipe, run: RunDir, seconds: float) -> None:
    print(f"done in {seconds / 60:.1f} minutes: {run.path}")
    for stage in ("ppo", "sft"):
        if stage in recipe.stages:
            print(f"talk with its model: rlhf chat {run.stage(stage).model}")
            return


class Plan(NamedTuple):
    """A stage that is about to run: its directory, whether it begins now, and what was moved aside for it."""

    directory: StageDir
    begins: bool
    aside: Path | None


def take_back(plan: Plan) -> None:
    """Undoes the beginning of a stage whose input was refused before it had trained: the old one is back.

    Where there was no old one, what it made once (responses that were drawn) is kept for the next time.
    """
    made = "checkpoints/step-*" if plan.aside else "*/step-*"
    if not plan.begins or any(plan.directory.path.glob(made)):
        return
    shutil.rmtree(plan.directory.path)
    if plan.aside:
        plan.aside.rename(plan.directory.path)
        log(f"{plan.directory.name}: nothing was redone; {plan.aside.name} is {plan.directory.name} again")


def prepare(
    recipe: Recipe,
    stage: StageName,
    run: RunDir,
    *,
    fresh: bool,
    command: str,
    label: str = "",
) -> Plan | None:
    """What is to be run, None where the stage is done; says why, moves aside what is stale, makes what begins.

    Raises StageFailed where the stage may not learn from the judge that it stands on.
    """
    for name in upstream(recipe, stage):
        check_gate(recipe, name, run)
    directory, state, label = run.stage(stage), state_of(recipe, stage, run), label or stage
    if state.name in ("done", "interrupted") and not fresh:
        changes = _other_versions(directory)
        if changes:
            log(f"{label}: begun with other versions ({changes})")
    if state.name == "done" and not fresh:
        log(f"{label}: done, skipped")
        return None
    if state.name == "interrupted" and not fresh:
        log(f"{label}: was interrupted, goes on")
        return Plan(directory, False, None)
    aside = None
    if directory.path.exists():
        why = "--fresh" if fresh else state.why
        aside = directory.move_aside()
        log(f"{label}: redone, since {why} (the old one is now {aside.name})")
    else:
        log(f"{label}: starts")
    begin_stage(recipe, stage, run, command)
    return Plan(directory, True, aside)


def _other_versions(directory: StageDir) -> str:
    was, now = directory.manifest().get("versions", {}), _versions()
    return ", ".join(f"{name} {was[name]}, now {now.get(name)}" for name in was if was[name] != now.get(name))


def check_inputs(recipe: Recipe, wanted: tuple[StageName, ...], processes: int) -> None:
    """Checks what can be checked before the first stage runs: trackers, files, and the arithmetic of batches."""
    check_trackers(recipe.track)
    for stage in wanted:
        check_attention(recipe, stage)
        check_quantisation(recipe, stage)
        if stage in TRAINING and stage != "ppo" and not (stage == "reward" and recipe.reward and recipe.reward.from_):
            microbatches(recipe, stage, processes)
        for source in sources_in(getattr(recipe, stage)):
            source_files(source, Path(recipe.data.root))
            _check_ends(stage, source)
        for external in externals(recipe, stage):
            _check_external(external, Path(recipe.data.root))
        if stage == "pretrain":
            _check_prepare(recipe)
        if stage == "evaluate" and recipe.evaluate:
            _check_tasks(recipe.evaluate.fewshot, Path(recipe.data.root))
            _check_harness(recipe.evaluate.harness, Path(recipe.data.root))


def _check_ends(stage: StageName, source: Source) -> None:
    if source.builtin and source.rows is None and stage not in ("reward", "ppo"):
        raise UserError(f"{stage}: the source builtin: {source.builtin} never ends; say how many with rows:")


def _check_harness(harness: HarnessSection, root: Path) -> None:
    if harness.tasks:
        check_installed()
        check_include(root / harness.include if harness.include else None)


def _check_tasks(fewshot: FewShotSection, root: Path) -> None:
    for task in fewshot.tasks:
        if task == "tinyworld" and max(fewshot.shots) > MAX_SHOTS:
            raise UserError(f"evaluate.fewshot.shots: tinyworld's tasks have at most {MAX_SHOTS} demonstrations")
        path = root / task
        if task != "tinyworld" and not path.is_dir() and not list(path.parent.glob(f"{glob.escape(path.name)}.test.*")):
            named = f"no folder {path}, and no file {path}.test.jsonl (`tinyworld` is built in)"
            if path.is_file():
                named = f"{path} is a file; a task is named FOLDER/TASK, without .test.jsonl"
            raise MissingInput(f"evaluate.fewshot.tasks: {named}")


def _check_prepare(recipe: Recipe) -> None:
    """The few-shot tasks that a corpus is kept free of, and made of, must be there."""
    prepare, root = recipe.pretrain.prepare if recipe.pretrain else None, Path(recipe.data.root)
    if prepare and prepare.decontamination and recipe.evaluate:
        _check_tasks(recipe.evaluate.fewshot, root)
    for task in prepare.incontext.tasks if prepare and prepare.incontext else ():
        path = root / task
        if not path.is_dir() and not list(path.parent.glob(f"{glob.escape(path.name)}.train.*")):
            raise MissingInput(
                f"pretrain.prepare.incontext.tasks: no folder {path}, and no file {path}.train.jsonl"
                + (" (the built-in world's own documents hold such tasks already)" if task == "tinyworld" else "")
            )


def _check_external(external: External, root: Path) -> None:
    """A file must exist; a local directory must hold a model of the right kind."""
    if external.kind == "python":
        check_function(external.key, external.value, root)
    elif external.kind == "file":
        if not (root / external.value).is_file():
            raise MissingInput(f"{external.key}: no file {root / external.value} (relative paths start at data.root)")
    else:
        wanted = {"judge": True, "causal_lm": False}.get(external.kind)
        _check_model_directory(external.key, external.value, judge=wanted)


def _check_model_directory(key: str, name: str, *, judge: bool | None) -> None:
    """A local directory must hold a model; what looks like a path must exist; anything else is a hub id.

    `judge` says whether it must be a sequence classifier or must not be one; None takes either.
    """
    path = Path(name)
    if path.is_dir():
        kinds = model_config(path, key).get("architectures") or []
        is_judge = any("SequenceClassification" in str(kind) for kind in kinds)
        if kinds and judge is not None and is_judge != judge:
            wanted = "a reward model (a sequence classifier)" if judge else "a causal LM"
            raise UserError(f"{key}: {path} is {', '.join(map(str, kinds))}, not {wanted}")
    elif path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise MissingInput(f"{key}: no directory {path}")
    elif judge and get_close_matches(name, ["reward"]):
        raise UserError(f"{key}: no directory {path}; did you mean reward, the judge of this run's reward stage?")


def check_upstream(recipe: Recipe, stage: StageName, run: RunDir, again: Callable[[str], str]) -> None:
    """Raises MissingInput, naming the commands, where a stage that this one stands on isn't done."""
    states = {name: state_of(recipe, name, run) for name in _ancestors(recipe, stage)}
    missing = [name for name, state in states.items() if state.name != "done"]
    if missing:
        state = states[missing[-1]]
        what = {"missing": "has not been run", "stale": f"is stale ({state.why})"}.get(state.name, "was interrupted")
        commands = "\n  ".join(again(name) for name in missing)
        raise MissingInput(
            f"{stage} stands on the stage {missing[-1]}, which {what} in {run.path}; run\n  {commands}\n"
            f"first, or everything:\n  {again('all')}"
        )


def _ancestors(recipe: Recipe, stage: StageName) -> list[StageName]:
    """Every stage that this one stands on, by way of others too, in order."""
    found = set(upstream(recipe, stage))
    for name in tuple(found):
        found |= set(_ancestors(recipe, name))
    return [name for name in STAGES if name in found]


def begin_stage(recipe: Recipe, stage: StageName, run: RunDir, command: str) -> None:
    """Makes the stage's directory and writes down what goes in."""
    directory = run.stage(stage)
    beginning = StageDir(run.path / f".{stage}.beginning")
    shutil.rmtree(beginning.path, ignore_errors=True)
    beginning.path.mkdir()
    write_json(
        beginning.manifest_file,
        {
            "stage": stage,
            "inputs": _jsonable(stage_inputs(recipe, stage, run)),
            "versions": _versions(),
            "git_commit": _git_commit(),
            "command": command,
        },
    )
    beginning.path.rename(directory.path)


def finish_stage(directory: StageDir, summary: dict[str, Any]) -> None:
    """Writes the digest of what came out, then the summary, last: its existence says that the stage is complete."""
    output = digest_folder(directory.model) if directory.model.is_dir() else ""
    manifest = {**directory.manifest(), "output": output, "files": files_in(directory.model)}
    if "labels_digest" in summary:  # what a person has answered, as it was when the stage took it
        manifest["inputs"]["labels"] = summary["labels_digest"]
    write_json(directory.manifest_file, manifest)
    write_json(directory.summary_file, summary)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "rlhf": rlhf.__version__}
    for package in (
        "torch",
        "transformers",
        "trl",
        "accelerate",
        "tokenizers",
        "datasets",
        "peft",
        "lm_eval",
        "bitsandbytes",
    ):
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
