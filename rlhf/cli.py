"""The command line. Nothing heavy is imported before a command needs it."""

import errno
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf import __version__
from rlhf.errors import Interrupted, RlhfError, UserError

if TYPE_CHECKING:
    from rlhf.recipe import Recipe

app = typer.Typer(
    name="rlhf",
    help="From random weights to an aligned chat model: tokenizer, pretrain, sft, reward, ppo, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeOption = Annotated[
    str, typer.Option("--recipe", help="a recipe file, or the name of a shipped recipe (see `rlhf recipes`)")
]
RunsDirOption = Annotated[Path, typer.Option("--runs-dir", help="where runs are kept; this one is runs-dir/NAME")]

LaunchOption = Annotated[
    str,
    typer.Option(
        "--launch-config", help="Accelerate's launcher starts them: a launch file, or the name of a shipped one"
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rlhf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="show it")] = False,
) -> None:
    """The options that stand before a command."""


def _recipe(recipe: str, overrides: list[str] | None) -> "Recipe":
    """The recipe that a command names, with its overrides."""
    from rlhf.recipe import load_recipe

    if not recipe:
        raise UserError("--recipe is missing: a file, or one of the shipped recipes (`rlhf recipes` lists them)")
    return load_recipe(recipe, overrides or [])


@app.command()
def run(
    stage: Annotated[str, typer.Argument(help="all, or one of: tokenizer pretrain sft reward ppo evaluate")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="e.g. seed=2 ppo.kl.coefficient=0.1")
    ] = None,
    recipe: RecipeOption = "",
    runs_dir: RunsDirOption = Path("runs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="run again what is done; the old is moved aside")] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            "--processes", min=1, max=1024, help="processes of a stage that trains, on this machine (default: 1)"
        ),
    ] = None,
    launch_config: LaunchOption = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only check everything and tell what it will do and need (rlhf plan)")
    ] = False,
) -> None:
    """Runs one stage of a recipe, or all that are not done.

    A finished stage that still matches the recipe is skipped, an interrupted one goes on from its last checkpoint, and
    a stale one is moved aside and redone.
    """
    from rlhf import chain

    settings = _recipe(recipe, overrides)
    wanted = chain.wanted_stages(settings, stage)
    if dry_run:
        from rlhf.plan import machine_of, run_plan

        machine = machine_of(settings, None, None, processes, launch_config)
        run_plan(settings, wanted, runs_dir, machine, as_json=False, fresh=fresh)
        return
    command = "rlhf " + " ".join(sys.argv[1:])
    said = [argument for argument in sys.argv[1:] if argument not in ("run", "--fresh")]
    said.remove(stage) if stage in said else None

    def again(name: str) -> str:
        return shlex.join(["rlhf", "run", name, *said])

    from rlhf.launch_file import open_launch_file
    from rlhf.launcher import check_no_launcher, run_on_machines
    from rlhf.team import rank_in_environment

    if launch_config:
        check_no_launcher()
    launch = open_launch_file(launch_config, processes) if launch_config else None
    if launch and launch.config.num_machines > 1:
        options = ["--recipe", recipe, "--runs-dir", str(runs_dir), *(["--fresh"] if fresh else []), *(overrides or [])]
        run_on_machines(settings, wanted, runs_dir, launch, options)
        return
    if rank_in_environment()[1] > 1:
        if processes and processes != rank_in_environment()[1]:
            raise UserError("--processes: the launcher that has started this process says how many there are")
        if len(wanted) > 1:
            raise UserError(f"under a launcher one stage runs at a time: rlhf run {wanted[0]}, then the next")
        from rlhf.worker import leave, run_under_launcher

        leave(run_under_launcher(settings, wanted[0], runs_dir, fresh=fresh, command=command, again=again))
    chain.run_chain(
        settings,
        wanted,
        runs_dir,
        fresh=fresh,
        processes=processes or 1,
        command=command,
        again=again,
        launch=launch,
    )


@app.command()
def plan(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="e.g. sft.microbatch_size=4")
    ] = None,
    recipe: RecipeOption = "",
    stage: Annotated[str, typer.Option("--stage", help="only this one")] = "all",
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=0, max=4096, help="so many GPUs, a process on each; 0: this machine's CPU"),
    ] = None,
    gpu_memory: Annotated[float | None, typer.Option("--gpu-memory", min=1, max=1024, help="GiB of each GPU")] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, max=1024, help="without GPUs: so many processes")
    ] = None,
    launch_config: LaunchOption = "",
    runs_dir: RunsDirOption = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
) -> None:
    """Checks a recipe without training: files, rows, templates; tells batches, memory, work, time and disk.

    Plans for the recipe's own `hardware`, where it has any and no option says otherwise, or for this machine.
    """
    settings = _recipe(recipe, overrides)
    from rlhf.chain import wanted_stages
    from rlhf.plan import machine_of, run_plan

    wanted = wanted_stages(settings, stage)
    machine = machine_of(settings, gpus, gpu_memory, processes, launch_config)
    run_plan(settings, wanted, runs_dir, machine, as_json=as_json)


@app.command()
def prepare(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="e.g. pretrain.prepare.near_duplicates=off")
    ] = None,
    recipe: RecipeOption = "",
    runs_dir: RunsDirOption = Path("runs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="make it again; the old one is moved aside")] = False,
) -> None:
    """Makes the corpus that pretrain learns from: texts cleaned, filtered, deduplicated, as tokens, with a data card.

    `rlhf run pretrain` makes it as well, where it is missing. What a killed run has done is kept.
    """
    from rlhf.chain import run_prepare
    from rlhf.runtime import print_anything

    settings = _recipe(recipe, overrides)
    print_anything()
    said = [argument for argument in sys.argv[1:] if argument not in ("prepare", "--fresh")]

    def again(name: str) -> str:
        return shlex.join(["rlhf", "run", name, *said])

    run_prepare(settings, runs_dir, fresh=fresh, again=again)


@app.command()
def recipes() -> None:
    """Lists the shipped recipes, with what each needs and takes, and the launch files."""
    from rlhf.launch_file import described, shipped_launch_files
    from rlhf.recipe import load_recipe, shipped_recipes

    for path in shipped_recipes():
        recipe = load_recipe(str(path))
        print(f"{path.stem}\n  {recipe.description}\n  stages: {' '.join(recipe.stages)}")
        print(f"  needs:  {recipe.needs}\n  takes:  {recipe.takes}\n")
    print("launch files, for rlhf run --launch-config NAME; each says when to take it:")
    for path in shipped_launch_files():
        print(f"{path.stem}\n  {described(path)}\n  {path}")


@app.command()
def schema() -> None:
    """Prints the JSON Schema of a recipe, so that an editor can complete and check it."""

    from rlhf.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(by_alias=True), indent=2, ensure_ascii=False))


@app.command()
def status(run_dir: Annotated[Path, typer.Argument(help="a run's directory, such as runs/quickstart")]) -> None:
    """Shows what is done, running, failed, and where it stands."""
    from rlhf.status import print_status

    print_status(run_dir)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="a run's directory, such as runs/quickstart")],
    other: Annotated[Path | None, typer.Argument(metavar="[RUN_B]", help="a second run to set beside it")] = None,
    kind: Annotated[str, typer.Option("--format", help="html, json (for machines) or md (for pull requests)")] = "html",
    output: Annotated[
        Path | None, typer.Option("--output", help="FILE; default: report.html in the run; json and md are printed")
    ] = None,
) -> None:
    """Tells a run from its files, finished or not: one page that needs no network; or two runs beside each other."""
    from evaluation.report import FORMATS, render, write_report

    if kind not in FORMATS:
        raise UserError(f"--format: {kind!r} is none of {', '.join(FORMATS)}")
    if output and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise UserError(f"--output: {output} is a directory" if output.is_dir() else f"no directory {output.parent}")
    if output is None and kind != "html":
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
        print(render(run_dir, other, kind), end="")
        return
    print(f"written to {write_report(run_dir, other, output, kind)}")


@app.command()
def evaluate(
    model_dirs: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL_DIR... [key=value ...]", help="Hugging Face causal LMs; overrides"),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", help="`tinyworld`, FOLDER or FOLDER/TASK; may stand several times")
    ] = None,
    texts: Annotated[
        list[Path] | None, typer.Option("--texts", help="file of documents for perplexity; may stand several times")
    ] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option("--harness", help="task of lm-evaluation-harness, or FOLDER/TASK; may stand several times"),
    ] = None,
    shots: Annotated[str, typer.Option("--shots", help="numbers of demonstrations, with commas between")] = "",
    prompts: Annotated[
        list[Path] | None, typer.Option("--prompts", help="file of prompts to answer; may stand several times")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option("--judge", help="reward model's directory, or FILE.py:FUNCTION; may stand several times"),
    ] = None,
    comparisons: Annotated[
        list[Path] | None, typer.Option("--comparisons", help="file of comparisons to try the judges on")
    ] = None,
    training: Annotated[
        list[Path] | None, typer.Option("--training", help="file of training texts: contamination and memorisation")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", help="also write the results as JSON")] = None,
    details: Annotated[Path | None, typer.Option("--details", help="write a JSON line for every question")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="whose `evaluate` section says what is measured; default: quickstart")
    ] = None,
) -> None:
    """Measures any local Hugging Face causal LM: perplexity, few-shot accuracy, responses, memorised documents.

    What is measured stands in the `evaluate` section of a recipe: by default the built-in world's documents, tasks and
    prompts. --tasks, --harness, --texts, --prompts, --comparisons and --training take the place of the recipe's: with
    any of them, only what is named is measured.
    """
    from rlhf import api
    from rlhf.runtime import print_anything

    print_anything()
    words = model_dirs or []
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    counts = [word.strip() for word in shots.split(",")] if shots else []
    for count in counts:
        if not count.isdecimal():
            raise UserError(f"--shots: numbers with commas between, such as 0,8, and not {shots!r}")
    api.evaluate(
        [word for word in words if word not in overrides],
        tasks=tasks or (),
        texts=texts or (),
        harness=harness or (),
        shots=list(map(int, counts)),
        prompts=prompts or (),
        judge=judge or (),
        comparisons=comparisons or (),
        training=training or (),
        recipe=recipe,
        overrides=overrides,
        output=output,
        details=details,
    )


@app.command()
def push(
    model_dir: Annotated[Path, typer.Argument(help="a Hugging Face directory, such as runs/mine/ppo/model")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made where it isn't there")],
    public: Annotated[bool, typer.Option("--public", help="a new repository is for everybody to see")] = False,
) -> None:
    """Uploads a model with its card to the Hugging Face hub, by the token of `hf auth login` or HF_TOKEN."""
    from rlhf import api

    print(f"uploaded to {api.push(model_dir, repository, private=not public)}")


@app.command()
def chat(
    model_dir: Annotated[Path, typer.Argument(help="a Hugging Face directory with a chat template")],
    system: Annotated[str, typer.Option("--system", help="a system turn before the first question")] = "",
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="longest response in tokens")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token")] = 0.7,
    seed: Annotated[int, typer.Option("--seed", help="what the draws depend on")] = 1,
) -> None:
    """Talks with a model. An empty line or Ctrl-D ends it."""
    from rlhf.rundir import model_config

    model_config(model_dir)
    from rlhf.chat import chat_loop

    chat_loop(model_dir, system=system, max_tokens=max_tokens, temperature=temperature, seed=seed)


@app.command()
def label(
    run_dir: Annotated[Path, typer.Argument(help="a run's directory, such as runs/mine; the answers are kept there")],
    name: Annotated[str, typer.Option("--name", help="who compares; default: your login name")] = "",
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="compare this file's responses instead of the run's")
    ] = None,
    repeats: Annotated[
        float, typer.Option("--repeats", min=0.0, max=0.5, help="share of questions that are asked again")
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed", help="what the order depends on")] = 1,
) -> None:
    """Shows prompts with two responses each: a person says which is better. Ends and goes on at any time.

    The answers make a preference file, which the reward stage learns from (reward.collect.labeller: person).
    """
    from rlhf.label.session import label

    label(run_dir, name=name, pairs=pairs, repeats=repeats, seed=seed)


def main() -> int:
    """The entry point: runs the command, turns what rlhf raises on purpose into one message and an exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app(standalone_mode=True)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except RlhfError as error:
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a file or folder that can't be read or written
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        return _say(f"{error.filename or 'the file system'}: {error.strerror or error}", 1 if full else 2)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


def _say(message: str, code: int) -> int:
    from rlhf.runtime import print_anything, visible

    print_anything()
    print(visible(f"error: {message}"), file=sys.stderr)
    return code
