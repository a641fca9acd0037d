"""Tasks of lm-evaluation-harness, asked through its Python API of a model that is in memory already.

    asked = open_harness(["arc_easy", "mine"], include=Path("my-tasks"), items=100)
    figures = measure_harness(model, tokenizer, asked)

An optional extra: `lm_eval` is imported where it is needed, nowhere before. Prompts, metrics, groups and standard
errors are its own, and so is the seed of its demonstrations; what departs from its command line is in
evaluation.harness_model.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from rlhf.errors import MissingInput, RlhfError, UserError
from rlhf.runtime import log

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEED = 1234  # lm-evaluation-harness's own: another one shows other demonstrations, whose figures can't be compared
BOOTSTRAPS = 2000  # samples, for the standard errors of metrics that have no formula; a multiple of 1000
LOGITS = 2**29  # numbers of one forward pass, where a prompt fills the whole context
MOST_ROWS = 64  # of one forward pass


class Harness(NamedTuple):
    """Tasks whose data is loaded, ready to be asked of any number of models."""

    loaded: Mapping[str, Any]  # lm_eval's TaskDict: `tasks`, `groups`, `group_map`
    items: int | None  # of a task, at most; None: all
    size: int  # items of all tasks together

    @property
    def tasks(self) -> Mapping[str, Any]:
        """lm_eval's tasks by name, those of groups too."""
        return self.loaded["tasks"]


def check_installed() -> None:
    """Raises UserError where lm-evaluation-harness is not installed; imports nothing."""
    if find_spec("lm_eval") is None:
        raise UserError(
            "evaluate.harness: lm-evaluation-harness is not installed; it comes with pip install 'rlhf[harness]' "
            "(from a checkout: pip install -e '.[harness]')"
        )


def check_include(include: Path | None) -> None:
    """Raises MissingInput where the folder of a user's own tasks is not there."""
    if include is not None and not include.is_dir():
        raise MissingInput(f"evaluate.harness.include: no folder {include} (relative paths start at data.root)")


# Opening


def open_harness(
    tasks: Sequence[str], *, include: Path | None = None, shots: int | None = None, items: int | None = None
) -> Harness:
    """Loads tasks, groups and tags by name, with their data; `include` is a folder of YAML files that adds its own.

    `shots`: demonstrations; None takes each task's own number, and a task that says 0 keeps it, as lm_eval has it.
    Raises UserError for a name that isn't known, for data that can't be had, and for what can't be asked here.
    """
    check_installed()
    check_include(include)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with _quiet():
        manager = _manager(tasks, include)
        for name in tasks:
            _check_name(manager, name, include)
            found = _load(manager, name)
            for part, known in loaded.items():
                known.update(found.get(part, {}))
        size = sum(_prepared(name, task, shots, items) for name, task in loaded["tasks"].items())
    kept = [name for name, task in loaded["tasks"].items() if shots and task.get_config("num_fewshot") != shots]
    if kept:
        log(f"evaluate.harness: {', '.join(kept)} say that they have no demonstrations, and so are asked without")
    return Harness(loaded, items, size)


def _manager(tasks: Sequence[str], include: Path | None) -> Any:
    """What knows the tasks. lm_eval's own 14,000 take seconds to list, so they are only where they may be meant."""
    from lm_eval.tasks import TaskManager

    if include:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
    return TaskManager(include_path=str(include) if include else None)


def _check_name(manager: Any, name: str, include: Path | None) -> None:
    if name in manager.all_tasks:
        return
    unread = next(iter(sorted(include.rglob(f"{name}.yaml"))), None) if include else None
    if unread:  # lm_eval passes over files that it can't read; here its user learns why
        _load(manager, str(unread))
    close = get_close_matches(name, manager.all_tasks, n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else " (`lm_eval ls tasks` lists those that it has)"
    where = f", nor is it in {include}" if include else ""
    raise UserError(f"evaluate.harness.tasks: lm-evaluation-harness knows no task {name!r}{where}{hint}")


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        return manager.load([name])
    except Exception as error:  # anything: a task is code, and its data comes from anywhere
        what = "its data can't be had" if isinstance(error, OSError) else "can't be loaded"
        offline = "; without a network, only what was fetched before is there" if "Offline" in str(error) else ""
        raise UserError(f"evaluate.harness.tasks: {name}: {what}: {_why(error)}{offline}") from error


def _prepared(name: str, task: Any, shots: int | None, items: int | None) -> int:
    """Sets a task's number of demonstrations; how many of its items will be asked."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(f"evaluate.harness.tasks: {name} runs code that the model writes, which is not done here")
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"evaluate.harness.tasks: {name} asks about more than text")
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config("num_fewshot", shots or 0)
    task.set_fewshot_seed(SEED)
    try:
        task.build_all_requests(limit=1)  # so that what is wrong with its prompts is known before a model is loaded
        count = len(task.eval_docs)
    except Exception as error:
        raise UserError(f"evaluate.harness.tasks: {name}: its items can't be asked: {_why(error)}") from error
    return min(count, items or count)


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


# Measuring


def measure_harness(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    harness: Harness,
    *,
    begin: bool = True,
    control: bool = False,
    context: int | None = None,
    batch_size: int | None = None,
    seed: int = SEED,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """The figures of every task and group: {NAME: {METRIC: value, METRIC_stderr: ..., version, shots, items, cut}}.

    A figure that is no finite number is None; one with a filter of its own is called `METRIC,FILTER`. `cut` counts the
    items whose prompt lost its beginning to the `context` (tokens; None: the model's), as lm_eval does it.
    `begin`: BOS stands before every prompt, as in evaluation.suite; before a text it always does; `control`: what looks
    like a control token is one. `progress` is told how many of harness.size items are answered. Raises UserError where
    a task can't be asked of this model.
    """
    import torch
    from lm_eval import evaluate

    from evaluation.harness_model import HarnessModel

    context = context or int(model.config.max_position_embeddings)
    rows = batch_size or max(1, min(MOST_ROWS, LOGITS // (context * int(model.config.vocab_size))))
    gpus = [model.device] if model.device.type == "cuda" else []
    with _quiet(), torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)  # for tasks that sample
        for task in harness.tasks.values():
            task.set_fewshot_seed(seed)  # anew for every model, or it would see other demonstrations than the last one
        try:
            asked = HarnessModel(model, tokenizer, context=context, begin=begin, control=control, rows=rows)
            asked.set_cache_hook(_Answered(harness, progress))
            found = evaluate(
                asked, dict(harness.loaded), limit=harness.items, bootstrap_iters=BOOTSTRAPS, log_samples=False
            )
        except RlhfError:
            raise
        except Exception as error:
            names = ", ".join(harness.tasks)
            raise UserError(f"lm-evaluation-harness can't ask this model ({names}): {_why(error)}") from error
    return {name: _figures(found, name, harness, asked.cut) for name in found["results"]}


class _Answered:
    """Counts answers: lm_eval tells it of each, as it tells its cache."""

    def __init__(self, harness: Harness, progress: Callable[[int], None] | None) -> None:
        self._harness, self._progress = harness, progress
        self._answered = self._requests = 0

    def add_partial(self, *_: Any) -> None:
        """One request is answered."""
        if not self._requests:  # they are made by now
            tasks = self._harness.tasks.values()
            self._requests = sum(instance.repeats for task in tasks for instance in task.instances)
        self._answered += 1
        if self._progress:
            self._progress(min(self._answered, self._requests) * self._harness.size // self._requests)


def _figures(found: Mapping[str, Any], name: str, harness: Harness, cut: set[str]) -> dict[str, Any]:
    """What lm_eval found for a task or group; its key `acc,none` (no filter) is `acc` here."""
    values = found["results"][name]
    figures = {key.removesuffix(",none"): _number(value) for key, value in values.items() if "," in key}
    figures |= {"version": found["versions"].get(name), "shots": found["n-shot"].get(name)}
    if name in harness.tasks:
        of_items = {instance.doc_id for instance in harness.tasks[name].instances if instance.args[0] in cut}
        return {**figures, "items": values["sample_len"], "cut": len(of_items)}
    members = harness.loaded["groups"][name].get_all_tasks()
    return {**figures, "items": values.get("sample_len"), "tasks": [task.task_name for task in members]}


def _number(value: Any) -> float | None:
    return round(float(value), 6) if isinstance(value, Real) and math.isfinite(value) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences lm_eval: what it logs below errors, its progress bars, and the processes in which it resamples."""
    from tqdm import tqdm

    logger, made = logging.getLogger("lm_eval"), tqdm.__init__
    level, processes = logger.level, os.environ.get("DISABLE_MULTIPROC")

    def without_bar(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **{**options, "disable": True})

    try:
        logger.setLevel(logging.ERROR)
        tqdm.__init__ = without_bar  # type: ignore[method-assign]  # it takes no setting once it is imported
        os.environ["DISABLE_MULTIPROC"] = "1"
        yield
    finally:
        logger.setLevel(level)
        tqdm.__init__ = made  # type: ignore[method-assign]
        os.environ.pop("DISABLE_MULTIPROC")
        os.environ.update({"DISABLE_MULTIPROC": processes} if processes is not None else {})


# Showing


def harness_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    """The figures of several models, by name, as `measure_harness` gives them: value ± standard error."""
    table = Table(title="lm-evaluation-harness", title_justify="left")
    for heading in ("task", "shots", "items", "metric", "model", "value"):
        right = heading in ("shots", "items", "value")
        table.add_column(heading, justify="right" if right else "left", overflow="fold", no_wrap=heading == "value")
    for task, figures in next(iter(results.values())).items():
        for metric in [key for key in figures if _stderr(key) in figures]:
            for number, (name, found) in enumerate(results.items()):
                first = [escape(task), _shown(figures["shots"]), _items(figures), escape(metric)]
                table.add_row(*(["", "", "", ""] if number else first), escape(name), _value(found[task], metric))
    return table


def _stderr(metric: str) -> str:
    name, comma, kind = metric.partition(",")
    return f"{name}_stderr{comma}{kind}"


def _value(figures: Mapping[str, Any], metric: str) -> str:
    value, error = figures[metric], figures[_stderr(metric)]
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _items(figures: Mapping[str, Any]) -> str:
    return f"{_shown(figures['items'])} ({figures['cut']} cut)" if figures.get("cut") else _shown(figures["items"])


def _shown(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
