"""The Python API, as small as the command line: read a recipe, run its stages, measure any model, publish it.

    from rlhf.api import evaluate, load_recipe, run

    recipe = load_recipe("quickstart", ["seed=2"])
    print(run(recipe, "pretrain")["pretrain"]["validation_bits_per_byte"])
    print(evaluate(["runs/quickstart/pretrain/model"], tasks=["tinyworld"])["models"])

What the command line refuses raises an rlhf.errors.RlhfError here, with the same message.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rlhf.chain import check_inputs, run_chain, wanted_stages
from rlhf.errors import MissingInput, UserError
from rlhf.launch_file import open_launch_file
from rlhf.recipe import Recipe, load_recipe
from rlhf.rundir import RunDir, model_config, read_json

__all__ = ["Recipe", "evaluate", "load_recipe", "push", "run"]


def run(
    recipe: Recipe,
    stage: str = "all",
    *,
    runs_dir: str | Path = "runs",
    fresh: bool = False,
    processes: int | None = None,
    launch_config: str = "",
) -> dict[str, Any]:
    """Runs a stage, or all of the recipe's, as `rlhf run` does: each in processes of its own, finished ones skipped.

    `launch_config`: a launch file for one machine, or a shipped one's name; Accelerate's launcher starts the processes.
    Returns the run's summary: what each stage's summary.json says, by the stage's name. Raises UserError for what must
    be mended first, StageFailed where a stage ended without finishing, Interrupted where it was asked to stop.
    """
    wanted = wanted_stages(recipe, stage)
    if processes is not None and processes < 1:
        raise UserError(f"processes: {processes} is less than one")
    launch = open_launch_file(launch_config, processes) if launch_config else None
    if launch and launch.config.num_machines > 1:
        raise UserError(f"{launch.path}: several machines are for the command line: each of them runs it")
    try:
        run_chain(
            recipe,
            wanted,
            Path(runs_dir),
            fresh=fresh,
            processes=processes or 1,
            launch=launch,
            command=f"rlhf.api.run({recipe.name!r}, {stage!r})",
            again=lambda name: f"rlhf.api.run(recipe, {name!r})",
        )
    except SystemExit as error:
        raise UserError(f"{recipe.name}: a stage refused its input; what it said stands above") from error
    return read_json(RunDir.of(recipe, Path(runs_dir)).summary_file) or {}


def evaluate(
    models: Sequence[str | Path],
    *,
    tasks: Sequence[str | Path] = (),
    texts: Sequence[str | Path] = (),
    harness: Sequence[str] = (),
    shots: Sequence[int] = (),
    prompts: Sequence[str | Path] = (),
    judge: Sequence[str] = (),
    comparisons: Sequence[str | Path] = (),
    training: Sequence[str | Path] = (),
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    details: str | Path | None = None,
) -> dict[str, Any]:
    """Measures local Hugging Face causal LMs, as `rlhf evaluate` does; the arguments are its options.

    What is measured stands in the `evaluate` section of a recipe (the quickstart's where none is named); with any of
    `tasks`, `texts`, `harness`, `prompts`, `comparisons` and `training` only what they name is measured. Returns what
    `--output` writes: {"models": {DIRECTORY: {"bits_per_byte": ..., "fewshot": {TASK: {"8": {...}}}}}, ...}.
    """
    if (judge or comparisons) and not (judge and (prompts or comparisons)):
        raise UserError("--judge and --prompts or --comparisons come together: a judge needs something to judge")
    files = {"texts": texts, "prompts": prompts, "comparisons": comparisons, "training": training}
    asked = _only(tasks, harness, files) if tasks or harness or any(files.values()) else []
    if prompts:
        asked.append("evaluate.sampling.max_tokens=256")
    if judge:
        asked.append(f"evaluate.judge={json.dumps([_named_judge(name) for name in judge])}")
    if recipe is None:
        asked.append("evaluate.special_tokens=tokens")  # as other harnesses read texts
    if shots:
        asked.append(f"evaluate.fewshot.shots={json.dumps(list(shots))}")
    settings = load_recipe(recipe or "quickstart", [*asked, *overrides])
    if not models and not comparisons:
        raise UserError("no model directory given")
    if settings.evaluate is None:
        raise UserError(f"the recipe {recipe} has no section `evaluate`")
    settings = settings.model_copy(update={"stages": ("evaluate",)})
    for directory in models:
        model_config(Path(directory))
    check_inputs(settings, ("evaluate",), processes=1)
    written = {"--output": output, "--details": details}
    for option, file in ((option, Path(file)) for option, file in written.items() if file):
        if not file.parent.is_dir():
            raise MissingInput(f"{option}: no directory {file.parent}")
        if file.exists() and not file.is_file():
            raise MissingInput(f"{option}: {file} is there and is no plain file")
    from stages.evaluate import evaluate_directories

    return evaluate_directories(
        settings, list(map(str, models)), Path(output) if output else None, Path(details) if details else None
    )


def push(model: str | Path, repository: str, *, private: bool = True) -> str:
    """Uploads a model directory, its card (README.md) included, to the Hugging Face hub; returns where it is.

    `repository` is OWNER/NAME, made where it isn't there; a file of the same name is replaced, others stay. The token
    is that of `hf auth login` or HF_TOKEN. Raises UserError where the hub refuses or can't be reached.
    """
    directory = Path(model)
    model_config(directory)
    if not (directory / "README.md").is_file():
        raise MissingInput(f"{directory} has no README.md: write a model card first, the hub shows it")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    hub, unreachable = HfApi(), cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=directory, commit_message="A model by rlhf"))
    except HFValidationError as error:
        raise UserError(f"{repository!r} is no name on the hub (OWNER/NAME): {error}") from None
    except OfflineModeIsEnabled:
        raise UserError("HF_HUB_OFFLINE is set, so nothing is uploaded") from None
    except HfHubHTTPError as error:
        told = str(error).splitlines()[0]
        if error.response.status_code in (401, 403):
            told += " (log in with `hf auth login`, or set HF_TOKEN)"
        raise UserError(f"the hub refused {repository}: {told}") from None
    except unreachable as error:  # the HTTP library's own, whichever it is, and OSError
        raise UserError(f"the hub can't be reached: {str(error) or type(error).__name__}") from None


def _only(tasks: Sequence[str | Path], harness: Sequence[str], files: dict[str, Sequence[str | Path]]) -> list[str]:
    """The overrides that leave nothing of a recipe's measures but these."""
    names = [str(name) if name == "tinyworld" else str(Path(name).absolute()) for name in tasks]
    asked = [f"evaluate.fewshot.tasks={json.dumps(names)}", "evaluate.judge=[]"]
    asked.append(f"evaluate.harness={json.dumps(_harness_section(harness))}")
    for key, paths in files.items():
        asked.append(f"evaluate.{key}={json.dumps([{'path': str(Path(path).absolute())} for path in paths])}")
    return asked


def _named_judge(name: str) -> dict[str, str]:
    """The judge that a name means: FILE.py:FUNCTION, MODULE:FUNCTION, or a reward model."""
    file, colon, function = name.rpartition(":")
    if not colon or Path(name).is_dir():
        return {"model": str(Path(name).absolute()) if Path(name).is_dir() else name}
    return {"python": f"{Path(file).absolute()}:{function}" if file.endswith(".py") else name}


def _harness_section(named: Sequence[str]) -> dict[str, object]:
    """The recipe's section for TASK and FOLDER/TASK."""
    folders = {str(Path(name).parent.absolute()) for name in named if "/" in name}
    if len(folders) > 1:
        raise UserError(f"--harness: tasks of one folder at a time, not of {' and '.join(sorted(folders))}")
    return {"tasks": [Path(name).name for name in named], "include": folders.pop() if folders else None}
