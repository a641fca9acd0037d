"""The evaluate stage: perplexity on held-out documents and few-shot accuracy, for every model of the chain.

`rlhf evaluate` calls the same functions on any model directories.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation import fewshot, tasks
from evaluation.perplexity import perplexity, score_documents
from rlhf.data.reader import Faults
from rlhf.errors import UserError
from rlhf.job import Job
from rlhf.model import check_vocabulary, count_parameters, load_causal_lm
from rlhf.recipe import EvaluateSection, Recipe, upstream
from rlhf.rundir import write_json
from rlhf.runtime import Bar, derive_seed, device, log, quiet_libraries, seed_everything
from rlhf.saver import once
from rlhf.tokenizer import load_tokenizer
from stages.common import open_data, report_faults, runs_code

LONGEST_CONTEXT = 2048  # tokens of a window or a few-shot prompt, where the model can hold more


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

    def keep(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return once(job, f"figures-{name}", lambda _: measure()).facts

    results, parameters = _measure_all(recipe, models, keep)
    return {"parameters": parameters, "models": results}


def evaluate_directories(recipe: Recipe, directories: list[str], output: Path | None) -> None:
    """Measures model directories by the recipe's evaluate section: a table on the terminal, JSON in a file."""
    with quiet_libraries():
        seed_everything(derive_seed(recipe.seed, "evaluate"))
        models = {directory: directory for directory in directories}
        results, _ = _measure_all(recipe, models, lambda _, measure: measure())
    if output:
        write_json(output, {"models": results})
        log(f"written to {output}")


def _measure_all(
    recipe: Recipe,
    models: dict[str, str],
    keep: Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]],
) -> tuple[dict[str, Any], int]:
    """The figures of every model, and the parameters of the last; `keep` may know a model's figures already."""
    settings = recipe.evaluate
    assert settings is not None
    dataset = open_data(recipe, "evaluate", settings.texts, "texts", "test")
    texts = list(dataset)
    report_faults(dataset)
    found = _tasks(recipe, settings)
    seed = derive_seed(recipe.seed, "evaluate", "items")
    asked = {
        (task.name, shots): task.questions(shots, settings.fewshot.items, seed)
        for task in found
        for shots in settings.fewshot.shots
    }
    log(
        f"evaluate: {len(models)} models; {len(texts):,} documents; {len(found)} tasks at "
        f"{', '.join(map(str, settings.fewshot.shots))} demonstrations, {sum(map(len, asked.values())):,} questions"
    )
    results: dict[str, Any] = {}
    parameters = 0
    for name, directory in models.items():
        remote_code = runs_code(recipe, directory)
        model = load_causal_lm(directory, remote_code=remote_code).to(device()).eval()
        tokenizer = load_tokenizer(directory, remote_code=remote_code)
        check_vocabulary(model, tokenizer, directory)
        parameters = count_parameters(model)
        total = len(texts) + sum(len(question.choices) for questions in asked.values() for question in questions)
        with Bar(f"evaluate {name}", total) as bar:
            measure = partial(_measure, model, tokenizer, texts, asked, bar)
            results[name] = keep(name, measure)
    _print_table(results, settings.fewshot.shots)
    return results, parameters


def _tasks(recipe: Recipe, settings: EvaluateSection) -> list[fewshot.Task]:
    found: list[fewshot.Task] = []
    for name in settings.fewshot.tasks:
        if name == "tinyworld":
            found += tasks.tinyworld_tasks()
            continue
        faults = Faults(recipe.data.on_bad_row)
        more, left_out = tasks.file_tasks(Path(recipe.data.root) / name, faults)
        found += more
        if faults.counts:
            log(faults.report())
        if left_out:
            log(f"evaluate: not asked, since their answers are free text: {', '.join(left_out)}")
    if not found:
        raise UserError("evaluate.fewshot.tasks: no multiple-choice task found")
    return found


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    asked: dict[tuple[str, int], list[fewshot.Question]],
    bar: Bar,
) -> dict[str, Any]:
    done = 0

    def show(figure: str, value: float) -> Callable[[int], None]:
        return lambda answered: bar.show(done + answered, **({figure: value} if figure else {}))

    context = min(int(getattr(model.config, "max_position_embeddings", LONGEST_CONTEXT)), LONGEST_CONTEXT)
    scores = score_documents(model, tokenizer, texts, context=context)
    whole = perplexity(scores)
    done = len(texts)
    bits = whole.bits_per_byte.mean
    answers: dict[str, dict[str, Any]] = {}
    for (task, shots), questions in asked.items():
        found = fewshot.accuracy(model, tokenizer, questions, context=context, progress=show("bits_per_byte", bits))
        done += sum(len(question.choices) for question in questions)
        answers.setdefault(task, {})[str(shots)] = (
            found.summary() if found else {"not_available": f"no item fits the context of {context} tokens"}
        )
    bar.show(done, bits_per_byte=bits)
    return {
        **whole.nats_per_token.as_keys("nats_per_token"),
        "perplexity": round(whole.perplexity, 4),
        **whole.bits_per_byte.as_keys("bits_per_byte"),
        "documents": whole.documents,
        "tokens": whole.tokens,
        "fewshot": answers,
    }


def _print_table(results: dict[str, Any], shots: tuple[int, ...]) -> None:
    """Models side by side; below each task, chance and what copying the most frequent demonstrated answer gives."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(title="held-out documents", title_justify="left")
    for heading in ("model", "perplexity", "bits per byte"):
        table.add_column(heading, justify="left" if heading == "model" else "right", overflow="fold")
    for name, result in results.items():
        low, high = result["bits_per_byte_ci95"]
        table.add_row(
            escape(name), f"{result['perplexity']:.3f}", f"{result['bits_per_byte']:.4f} [{low:.4f}, {high:.4f}]"
        )
    console.print(table)
    table = Table(title="few-shot accuracy by number of demonstrations", title_justify="left")
    table.add_column("task")
    table.add_column("model", overflow="fold")
    for count in shots:
        table.add_column(str(count), justify="right")
    first = next(iter(results.values()))["fewshot"]
    for task, by_shots in first.items():
        for name, result in results.items():
            cells = [_cell(result["fewshot"][task][str(count)], "accuracy") for count in shots]
            table.add_row(escape(task) if name == next(iter(results)) else "", escape(name), *cells)
        for label, key in (("(chance)", "chance"), ("(copy)", "copy_baseline")):
            table.add_row("", label, *(_cell(by_shots[str(count)], key) for count in shots), style="dim")
    console.print(table)


def _cell(found: dict[str, Any], key: str) -> str:
    return f"{found[key]:.2f}" if key in found else "-"
