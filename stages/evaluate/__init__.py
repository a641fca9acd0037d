"""The evaluate stage: every model of the chain by the same measures, and each against the one before it.

Perplexity on held-out documents, few-shot accuracy, responses to the same prompts with what a judge says of them,
memorised training documents, and which of the tasks' items occur in the training texts. `rlhf evaluate` calls the same
functions on any model directories.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation import fewshot, memorisation, tasks
from evaluation.harness import Harness, open_harness
from evaluation.memorisation import Document
from evaluation.responses import compare_behaviour
from evaluation.scoring import Scorer
from evaluation.suite import Measured, Suite, add_overlap, compare, compare_texts, context_of, measure
from rlhf.data.reader import Faults
from rlhf.errors import UserError
from rlhf.job import Job
from rlhf.model import check_causal, check_vocabulary, count_parameters
from rlhf.plugins import load_function
from rlhf.recipe import EvaluateSection, Recipe, externals, upstream
from rlhf.rundir import write_atomically, write_json
from rlhf.runtime import Bar, derive_seed, device, log, quiet_libraries, seed_everything
from rlhf.saver import once
from rlhf.team import Team
from rlhf.tokenizer import Messages, load_tokenizer
from stages.common import named_model, open_data, report_faults, runs_code
from stages.evaluate import answering, tables
from stages.evaluate.answering import Answers
from stages.evaluate.kept import Findings, details, read_findings, write_findings
from stages.evaluate.training import TrainingTexts, read_training


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

    def keep(name: str, find: Callable[[], Findings]) -> Findings:
        def make(folder: Path) -> dict[str, Any]:
            found = find()
            if job.team.is_main:
                write_findings(folder, found)
            return {}

        return read_findings(once(job, f"figures-{name}", make).path)

    results = _evaluate(recipe, models, keep, job.team, job)
    if job.team.is_main and results.prompts:
        answering.write_responses(job.directory.path / answering.RESPONSES, results.prompts, results.answers)
    return {"parameters": results.parameters, **results.summary}


def evaluate_directories(
    recipe: Recipe, directories: list[str], output: Path | None, details_file: Path | None
) -> dict[str, Any]:
    """Measures model directories by the recipe's evaluate section: a table on the terminal, JSON in files.

    Returns what stands in `output`.

    The recipe has no other stage: the judge and the training texts of other models are none of theirs.
    """
    every: dict[str, Findings] = {}

    def keep(name: str, find: Callable[[], Findings]) -> Findings:
        every[name] = find()
        return every[name]

    with quiet_libraries():
        seed_everything(derive_seed(recipe.seed, "evaluate"))
        results = _evaluate(recipe, {directory: directory for directory in directories}, keep, Team(), None)
    if output:
        write_json(output, results.summary)
        log(f"written to {output}")
    if details_file:
        lines = [line for name, found in every.items() for line in details(name, found)]
        write_atomically(details_file, "".join(lines))
        log(f"{len(lines):,} lines written to {details_file}")
    return results.summary


class _Results(NamedTuple):
    summary: dict[str, Any]
    prompts: list[Messages]
    answers: dict[str, Answers]
    parameters: int  # of the last model


def _evaluate(
    recipe: Recipe,
    models: dict[str, str],
    keep: Callable[[str, Callable[[], Findings]], Findings],
    team: Team,
    job: Job | None,
) -> _Results:
    """Everything that the recipe asks for; `keep` may know the findings of a model already."""
    settings = recipe.evaluate
    assert settings is not None
    for named in externals(recipe, "evaluate"):
        if named.kind == "python":  # what it lacks is known before anything is measured, as with the tokenizers
            load_function(named.key, named.value, Path(recipe.data.root))
    tokenizers = {
        directory: load_tokenizer(directory, remote_code=runs_code(recipe, directory)) for directory in models.values()
    }
    work = _prepare(recipe, settings, team, job)
    log(_announcement(work, settings, len(models)))
    found: dict[str, Findings] = {}
    parameters = 0
    for name, directory in models.items():
        model = named_model(recipe, directory).causal_lm().to(device()).eval()
        tokenizer = tokenizers[directory]
        check_vocabulary(model, tokenizer, directory)
        check_causal(model, directory)
        parameters = count_parameters(model)
        found[name] = keep(name, partial(_findings, recipe, work, name, model, tokenizer, team))
        del model
    run = job.run if job else None
    judge = answering.open_judge(recipe, run) if work.prompts else None
    answers = answering.scored(work.prompts, {name: each.responses for name, each in found.items()}, judge, team)
    metrics = {task.name: fewshot.main_metric(task) for task in work.suite.tasks}
    measured = {name: each.measured for name, each in found.items()}
    if work.training:
        measured = {name: add_overlap(each, work.training.overlaps, metrics) for name, each in measured.items()}
    behaviours = answering.figures_of(answers)
    summary: dict[str, Any] = {
        "models": {
            name: {
                **each.figures,
                **({"behaviour": behaviours[name]} if name in behaviours else {}),
                **({"memorisation": found[name].memorised} if found[name].memorised else {}),
            }
            for name, each in measured.items()
        },
        "differences": _differences(measured, metrics),
        "changes": _changes(measured, answers),
    }
    if judge:
        summary["win_rates"] = answering.win_rates(answers, derive_seed(recipe.seed, "evaluate", "win rates"))
    if settings.comparisons:
        summary["judges"] = answering.judge_accuracies(recipe, run, team)
    if work.training:
        summary["contamination"] = work.training.contamination
    if team.is_main:
        tables.show(summary, settings.fewshot.shots)
    return _Results(summary, work.prompts, answers, parameters)


class _Work(NamedTuple):
    """What all models are asked."""

    suite: Suite
    prompts: list[Messages]
    training: TrainingTexts | None


def _prepare(recipe: Recipe, settings: EvaluateSection, team: Team, job: Job | None) -> _Work:
    section = settings.fewshot
    texts: dict[str, list[str]] = {}
    for source in settings.texts:
        dataset = open_data(recipe, "evaluate", (source,), "texts", "test")
        texts.setdefault(str(source), []).extend(dataset)
        report_faults(dataset)
    seed = derive_seed(recipe.seed, "evaluate", "items")
    found = tasks_of(recipe, settings)
    suite = Suite(
        texts,
        found,
        section.shots,
        section.items,
        section.draws,
        seed,
        section.begin,
        stride=settings.stride,
        calibrate=section.calibrate,
        control=settings.special_tokens == "tokens",
        harness=_harness(recipe, settings),
    )
    cut = [each for each in found if isinstance(each, tasks.FileTask) and len(each.items) > section.items]
    if cut:
        named = ", ".join(f"{task.name} ({len(task.items)})" for task in cut)
        log(f"evaluate: the first {section.items} items (evaluate.fewshot.items) of {named}")
    probes = {task.name: task.probes(section.items, seed) for task in found}
    return _Work(suite, answering.read_test_prompts(recipe), read_training(recipe, probes, team, job))


def _announcement(work: _Work, settings: EvaluateSection, models: int) -> str:
    suite = work.suite
    parts = [
        f"{suite.documents:,} documents",
        f"{len(suite.tasks)} tasks at {', '.join(map(str, suite.shots))} demonstrations",
        f"{len(suite.harness.tasks) if suite.harness else 0} tasks of lm-evaluation-harness",
        f"{suite.size - suite.documents:,} questions",
        f"{len(work.prompts):,} prompts with {settings.responses_per_prompt} responses",
        f"{len(work.training.documents) if work.training else 0:,} training documents",
    ]
    questions = suite.size - suite.documents
    counts = (suite.documents, len(suite.tasks), suite.harness, questions, len(work.prompts), work.training)
    return f"evaluate: {models} models; " + "; ".join(part for part, count in zip(parts, counts, strict=True) if count)


def _findings(
    recipe: Recipe,
    work: _Work,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    team: Team,
) -> Findings:
    """All that is found with one model alone."""
    with Bar(f"evaluate {name}", work.suite.size) as bar:
        measured = measure(model, tokenizer, work.suite, partial(_show, bar), team)
    responses = answering.draw_answers(recipe, name, model, tokenizer, work.prompts, team) if work.prompts else []
    memorised: dict[str, Any] = {}
    if work.training and work.training.documents:
        memorised = _memorisation(recipe, work, model, tokenizer, team)
    return Findings(measured, responses, memorised)


def _memorisation(
    recipe: Recipe, work: _Work, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, team: Team
) -> dict[str, Any]:
    assert recipe.evaluate is not None and work.training is not None
    settings = recipe.evaluate.memorisation
    room = context_of(model) - settings.continuation_tokens
    if room < 1:
        return {"not_available": f"the context of {context_of(model)} tokens has no room for a beginning"}
    read = partial(
        memorisation.recall,
        Scorer(model),
        tokenizer,
        prompt_tokens=min(settings.prompt_tokens, room),
        continuation_tokens=settings.continuation_tokens,
    )
    unseen = [text for texts in work.suite.texts.values() for text in texts][: settings.random]
    training = team.share(work.training.documents, read)
    return memorisation.summarise(training, team.share([Document(text, 0) for text in unseen], read))


def _show(bar: Bar, done: int, figures: Mapping[str, float]) -> None:
    bar.show(done, **figures)


def _differences(measured: dict[str, Measured], metrics: Mapping[str, str]) -> dict[str, Any]:
    """Each model against the one before it, item by item."""
    names = list(measured)
    return {
        f"{later} - {earlier}": compare(measured[later].answers, measured[earlier].answers, metrics)
        for earlier, later in pairwise(names)
    }


def _changes(measured: dict[str, Measured], answers: Mapping[str, Answers]) -> dict[str, Any]:
    """How each model differs from the one before it on the same documents and prompts."""
    return {
        f"{later} - {earlier}": {
            **compare_texts(measured[later], measured[earlier]),
            **compare_behaviour(answers[later], answers[earlier]),
        }
        for earlier, later in pairwise(measured)
    }


def _harness(recipe: Recipe, settings: EvaluateSection) -> Harness | None:
    section, root = settings.harness, Path(recipe.data.root)
    if not section.tasks:
        return None
    include = root / section.include if section.include else None
    return open_harness(section.tasks, include=include, shots=section.shots, items=section.items)


def tasks_of(recipe: Recipe, settings: EvaluateSection) -> list[tasks.Task]:
    """The tasks that the recipe names. Raises UserError where one is there twice."""
    found: list[tasks.Task] = []
    for name in settings.fewshot.tasks:
        if name == "tinyworld":
            found += tasks.tinyworld_tasks()
            continue
        faults = Faults(recipe.data.on_bad_row)
        folder = Path(recipe.data.root) / name
        whole = folder.is_dir()
        found += tasks.file_tasks(folder if whole else folder.parent, faults, "" if whole else folder.name)
        if faults.counts:
            log(faults.report())
    names = [task.name for task in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"evaluate.fewshot.tasks: {', '.join(twice)} is there twice")
    return found
