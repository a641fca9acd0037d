"""The evaluate stage: perplexity on held-out documents and few-shot accuracy, for every model of the chain.

`rlhf evaluate` calls the same functions on any model directories.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evaluation import fewshot, tasks
from evaluation.harness import Harness, harness_table, open_harness
from evaluation.suite import Answer, Measured, Suite, compare, measure
from rlhf.data.reader import Faults
from rlhf.errors import UserError
from rlhf.job import Job
from rlhf.model import check_vocabulary, count_parameters, load_causal_lm
from rlhf.recipe import EvaluateSection, Recipe, upstream
from rlhf.rundir import write_atomically, write_json
from rlhf.runtime import Bar, derive_seed, device, log, quiet_libraries, seed_everything
from rlhf.saver import once
from rlhf.team import Team
from rlhf.tokenizer import load_tokenizer
from stages.common import open_data, report_faults, runs_code

ANSWERS = "answers.jsonl"


def run(job: Job) -> dict[str, Any]:
    """Measures base, sft and ppo, as far as the recipe has them."""
    recipe, run = job.recipe, job.run
    models: dict[str, str] = {}
    stood_on = upstream(recipe, "evaluate")
    if "pretrain" in stood_on:
        models["base"] = str(run.stage("pretrain").model)
    elif recipe.base:
        models["base"] = recipe.base
    for name in ("sft", "ppo"):
        if name in stood_on:
            models[name] = str(run.stage(name).model)

    def keep(name: str, measure: Callable[[], Measured]) -> Measured:
        def make(folder: Path) -> dict[str, Any]:
            found = measure()
            if job.team.is_main:
                write_details(folder / ANSWERS, found.answers)
            return found.figures

        kept = once(job, f"figures-{name}", make)
        return Measured(kept.facts, read_details(kept.path / ANSWERS))

    results, parameters = _measure_all(recipe, models, keep, job.team)
    return {"parameters": parameters, **results}


def evaluate_directories(recipe: Recipe, directories: list[str], output: Path | None, details: Path | None) -> None:
    """Measures model directories by the recipe's evaluate section: a table on the terminal, JSON in files."""
    every: list[dict[str, Any]] = []

    def keep(name: str, measure: Callable[[], Measured]) -> Measured:
        found = measure()
        every.extend({"model": name, **answer._asdict()} for answer in found.answers)
        return found

    with quiet_libraries():
        seed_everything(derive_seed(recipe.seed, "evaluate"))
        results, _ = _measure_all(recipe, {directory: directory for directory in directories}, keep, Team())
    if output:
        write_json(output, results)
        log(f"written to {output}")
    if details:
        write_atomically(details, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in every))
        log(f"{len(every):,} answers written to {details}")


def write_details(path: Path, answers: Sequence[Answer]) -> None:
    """A JSON line for every answer."""
    lines = (json.dumps(answer._asdict(), ensure_ascii=False) for answer in answers)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_details(path: Path) -> list[Answer]:
    """What `write_details` wrote."""
    found = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
    return [Answer(**{**line, "logprobs": tuple(line["logprobs"])}) for line in found]


def _measure_all(
    recipe: Recipe, models: dict[str, str], keep: Callable[[str, Callable[[], Measured]], Measured], team: Team
) -> tuple[dict[str, Any], int]:
    """The figures of every model and how they compare, and the parameters of the last; `keep` may know some already."""
    settings = recipe.evaluate
    assert settings is not None
    section = settings.fewshot
    texts: dict[str, list[str]] = {}
    for source in settings.texts:
        dataset = open_data(recipe, "evaluate", (source,), "texts", "test")
        texts.setdefault(str(source), []).extend(dataset)
        report_faults(dataset)
    seed = derive_seed(recipe.seed, "evaluate", "items")
    found = _tasks(recipe, settings)
    suite = Suite(
        texts,
        found,
        section.shots,
        section.items,
        section.draws,
        seed,
        section.begin,
        stride=settings.stride,
        harness=_harness(recipe, settings),
    )
    others = f" and {len(suite.harness.tasks)} of lm-evaluation-harness" if suite.harness else ""
    log(
        f"evaluate: {len(models)} models; {suite.documents:,} documents; {len(found)} tasks at "
        f"{', '.join(map(str, section.shots))} demonstrations{others}, {suite.size - suite.documents:,} questions"
    )
    measured: dict[str, Measured] = {}
    parameters = 0
    for name, directory in models.items():
        remote_code = runs_code(recipe, directory)
        model = load_causal_lm(directory, remote_code=remote_code).to(device()).eval()
        tokenizer = load_tokenizer(directory, remote_code=remote_code)
        check_vocabulary(model, tokenizer, directory)
        parameters = count_parameters(model)
        with Bar(f"evaluate {name}", suite.size) as bar:
            show = partial(_show, bar)
            measured[name] = keep(name, partial(measure, model, tokenizer, suite, show, team))
    results = {name: each.figures for name, each in measured.items()}
    _print_table(results, section.shots)
    if suite.harness:
        Console(highlight=False, soft_wrap=True).print(harness_table({n: r["harness"] for n, r in results.items()}))
    metrics = {task.name: fewshot.main_metric(task) for task in found}
    return {"models": results, "differences": _differences(measured, metrics)}, parameters


def _show(bar: Bar, done: int, figures: Mapping[str, float]) -> None:
    bar.show(done, **figures)


def _differences(measured: dict[str, Measured], metrics: Mapping[str, str]) -> dict[str, Any]:
    """Each model against the one before it, item by item."""
    names = list(measured)
    return {
        f"{later} - {earlier}": compare(measured[later].answers, measured[earlier].answers, metrics)
        for earlier, later in pairwise(names)
    }


def _harness(recipe: Recipe, settings: EvaluateSection) -> Harness | None:
    section, root = settings.harness, Path(recipe.data.root)
    if not section.tasks:
        return None
    include = root / section.include if section.include else None
    return open_harness(section.tasks, include=include, shots=section.shots, items=section.items)


def _tasks(recipe: Recipe, settings: EvaluateSection) -> list[tasks.Task]:
    found: list[tasks.Task] = []
    for name in settings.fewshot.tasks:
        if name == "tinyworld":
            found += tasks.tinyworld_tasks()
            continue
        faults = Faults(recipe.data.on_bad_row)
        folder = Path(recipe.data.root) / name
        found += tasks.file_tasks(folder if folder.is_dir() else folder.parent, faults, folder.name)
        if faults.counts:
            log(faults.report())
    names = [task.name for task in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"evaluate.fewshot.tasks: {', '.join(twice)} is there twice")
    return found


def _print_table(results: dict[str, Any], shots: tuple[int, ...]) -> None:
    """Models side by side; below each task, chance and what copying the most frequent demonstrated answer gives."""
    console = Console(highlight=False, soft_wrap=True)
    if any("perplexity" in result for result in results.values()):
        table = Table(title="held-out documents", title_justify="left")
        for heading in ("model", "perplexity", "bits per byte"):
            table.add_column(heading, justify="left" if heading == "model" else "right", overflow="fold")
        for name, result in results.items():
            low, high = result["bits_per_byte_ci95"]
            table.add_row(
                escape(name), f"{result['perplexity']:.3f}", f"{result['bits_per_byte']:.4f} [{low:.4f}, {high:.4f}]"
            )
        console.print(table)
    first = next(iter(results.values()))["fewshot"]
    if not first:
        return
    table = Table(title="few-shot accuracy by number of demonstrations", title_justify="left")
    table.add_column("task")
    table.add_column("model", overflow="fold")
    for count in shots:
        table.add_column(str(count), justify="right")
    for task, by_shots in first.items():
        for name, result in results.items():
            cells = [_cell(result["fewshot"][task][str(count)], "accuracy") for count in shots]
            table.add_row(escape(task) if name == next(iter(results)) else "", escape(name), *cells)
        for label, key in (("(chance)", "chance"), ("(copy)", "copy_baseline")):
            table.add_row("", label, *(_cell(by_shots[str(count)], key) for count in shots), style="dim")
    console.print(table)


def _cell(found: dict[str, Any], key: str) -> str:
    return f"{found[key]:.2f}" if key in found else "-"
