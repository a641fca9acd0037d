"""The whole suite on one model: what the chain, `rlhf evaluate` and a user's own code call.

Use: `measure(model, tokenizer, Suite(tasks=file_tasks(Path("tasks"), Faults()), shots=(0, 8))).figures`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation import fewshot
from evaluation.harness import Harness, measure_harness
from evaluation.perplexity import DocumentScore, perplexity, score_documents
from evaluation.scoring import Scorer
from evaluation.tasks import Question, Task
from rlhf.functional.bootstrap import paired_estimate
from rlhf.functional.intervals import ratio_estimate, sign_test
from rlhf.team import Team
from rlhf.tokenizer import begin_id

LONGEST_CONTEXT = 2048  # tokens of a window or a few-shot prompt, where the model can hold more

Progress = Callable[[int, Mapping[str, float]], None]  # how much of `Suite.size` is done, and a figure to show


class Suite(NamedTuple):
    """What is measured."""

    texts: Mapping[str, Sequence[str]] = {}  # documents by source
    tasks: Sequence[Task] = ()
    shots: Sequence[int] = (0, 1, 2, 4, 8)
    items: int = 200  # of a task, at most
    draws: int = 1  # of demonstrations
    seed: int = 0  # of the draws
    begin: bool = True  # whether BOS stands before every prompt; it always does before a text
    stride: int | None = None  # tokens that a window behind the first predicts; None: as many as it reads
    calibrate: bool = False  # whether choices are also compared with their probability where nothing is asked
    control: bool = False  # whether what looks like a control token in a text or prompt is one
    harness: Harness | None = None  # tasks of lm-evaluation-harness

    def draws_of(self, task: Task, shots: int) -> Iterator[list[Question]]:
        """The questions of each draw; none where the task has too few demonstrations."""
        if shots <= task.most_shots:
            for draw in range(task.draws(shots, self.draws)):
                yield task.questions(shots, self.items, self.seed, draw)

    @property
    def documents(self) -> int:
        """How many there are."""
        return sum(map(len, self.texts.values()))

    @property
    def size(self) -> int:
        """Documents and questions, lm-evaluation-harness's items included."""
        asked = sum(
            len(questions) for task in self.tasks for shots in self.shots for questions in self.draws_of(task, shots)
        )
        return self.documents + asked + (self.harness.size if self.harness else 0)


class Answer(NamedTuple):
    """How one question went."""

    task: str
    shots: int
    draw: int
    item: int
    right: Mapping[str, bool]  # by metric
    logprobs: tuple[float, ...]  # of each choice, nats
    written: str  # the free answer


class Measured(NamedTuple):
    """What a model's summary says, and every answer that it stands on."""

    figures: dict[str, Any]
    answers: list[Answer]
    documents: dict[str, list[DocumentScore]]  # by source


def context_of(model: PreTrainedModel) -> int:
    """How many tokens of a text or a prompt are read at a time."""
    return min(int(getattr(model.config, "max_position_embeddings", None) or LONGEST_CONTEXT), LONGEST_CONTEXT)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    suite: Suite,
    progress: Progress | None = None,
    team: Team | None = None,
) -> Measured:
    """Perplexity of the texts, and accuracy of the tasks at each number of demonstrations.

    The processes of a `team` share the work, and all have all results.
    """
    team = team or Team()
    context = context_of(model)
    scorer = Scorer(model)
    figures: dict[str, Any] = {}
    shown: dict[str, float] = {}
    read = partial(score_documents, scorer, tokenizer, context=context, stride=suite.stride, control=suite.control)
    documents = {source: team.share(texts, read) for source, texts in suite.texts.items()}
    if suite.texts:
        figures = {**_perplexities(documents), "context": context, "stride": min(suite.stride or context, context)}
        shown["bits_per_byte"] = figures["bits_per_byte"]
    done = suite.documents
    begin = [begin_id(tokenizer)] if suite.begin else []
    reader = fewshot.Reader(scorer, tokenizer, context, begin, suite.calibrate, suite.control)
    found: dict[str, dict[str, Any]] = {}
    answers: list[Answer] = []
    for task in suite.tasks:
        answer = fewshot.answer_freely if task.free else fewshot.answer_by_likelihood
        for shots in suite.shots:
            ask = partial(answer, reader, task.format)
            draws: list[list[fewshot.Outcome]] = []
            too_long = 0
            for number, questions in enumerate(suite.draws_of(task, shots)):
                outcomes = team.share(questions, ask)
                draws.append([outcome for outcome in outcomes if outcome])
                too_long += outcomes.count(None)
                answers += [
                    Answer(task.name, shots, number, o.question.item, o.right, o.logprobs, o.written) for o in draws[-1]
                ]
                done += len(questions)
                if progress:
                    progress(done, shown)
            found.setdefault(task.name, {})[str(shots)] = _figures(task, shots, draws, too_long, context)
    if suite.harness:
        # lm_eval's model runs in one process or under launchers of its own, so rank 0 asks, and the others wait
        show = partial(_show_items, progress, done, shown) if progress else None
        options: dict[str, Any] = {"begin": suite.begin, "control": suite.control, "context": context, "progress": show}
        figures["harness"] = team.from_main(partial(measure_harness, model, tokenizer, suite.harness, **options))
    return Measured({**figures, "fewshot": found}, answers, documents)


def _show_items(progress: Progress, done: int, shown: Mapping[str, float], items: int) -> None:
    progress(done + items, shown)


def _perplexities(by_source: Mapping[str, list[DocumentScore]]) -> dict[str, Any]:
    """Of all documents together and of each source."""
    found = perplexity([score for scores in by_source.values() for score in scores]).summary()
    if len(by_source) > 1:
        found["by_source"] = {source: perplexity(scores).summary() for source, scores in by_source.items()}
    return found


def _figures(task: Task, shots: int, draws: list[list[fewshot.Outcome]], too_long: int, context: int) -> dict[str, Any]:
    if not draws:
        return {"not_available": f"the task has {task.most_shots} demonstrations, fewer than {shots}"}
    if not all(draws):
        return {"not_available": f"no item fits the context of {context} tokens"}
    return fewshot.summarise(task, draws, too_long)


def compare(first: Sequence[Answer], second: Sequence[Answer], metrics: Mapping[str, str]) -> dict[str, Any]:
    """How much more often the first model is right than the second, on the items that both were asked.

    By task and number of demonstrations: `difference` with its interval, resampled item by item: what the two have in
    common falls away; `p_value` is McNemar's, exact. `metrics` names each task's.
    """
    of_item = [_by_item(answers, metrics) for answers in (first, second)]
    found: dict[str, Any] = {}
    for task, shots in dict.fromkeys((key[0], key[1]) for key in of_item[0]):
        items = [key for key in of_item[0] if key[:2] == (task, shots) and key in of_item[1]]
        if items:
            mine, others = ([fmean(side[key]) for key in items] for side in of_item)
            found.setdefault(task, {})[str(shots)] = {
                "items": len(items),
                **paired_estimate(mine, others).as_keys("difference", 4),
                "p_value": round(sign_test([a - b for a, b in zip(mine, others, strict=True)]), 6),
            }
    return found


def compare_texts(first: Measured, second: Measured) -> dict[str, Any]:
    """By how much the first model needs more bits per byte than the second, on the documents that both have read."""
    both = [
        pair
        for source, mine in first.documents.items()
        for pair in zip(mine, second.documents.get(source, ()), strict=False)
    ]
    if not any(one.bytes for one, _ in both):
        return {}
    more = [(one.nats - other.nats) / math.log(2) for one, other in both]
    more_per_byte = ratio_estimate(more, [float(one.bytes) for one, _ in both])
    return {"documents": len(both), **more_per_byte.as_keys("bits_per_byte")}


def _by_item(answers: Sequence[Answer], metrics: Mapping[str, str]) -> dict[tuple[str, int, int], list[float]]:
    found: dict[tuple[str, int, int], list[float]] = {}
    for answer in answers:
        key = answer.task, answer.shots, answer.item
        found.setdefault(key, []).append(float(answer.right[metrics[answer.task]]))
    return found


def add_overlap(
    measured: Measured, overlaps: Mapping[str, Sequence[bool | None]], metrics: Mapping[str, str]
) -> Measured:
    """The figures with, beside each accuracy, the share of its items that occur in training and the accuracy without.

    `overlaps` says of each task's items whether they occur there, None where that can't be told: these count as clean.
    """
    of_item = _by_item(measured.answers, metrics)
    found: dict[str, dict[str, Any]] = {}
    for task, by_shots in measured.figures["fewshot"].items():
        for shots, cell in by_shots.items():
            asked = {key[2]: fmean(right) for key, right in of_item.items() if key[:2] == (task, int(shots))}
            found.setdefault(task, {})[shots] = {**cell, **_beside_overlap(asked, overlaps[task])}
    return measured._replace(figures={**measured.figures, "fewshot": found})


def _beside_overlap(right: Mapping[int, float], overlaps: Sequence[bool | None]) -> dict[str, float]:
    checked = [overlap for item in right if (overlap := overlaps[item]) is not None]
    if not checked:
        return {}
    clean = [share for item, share in right.items() if not overlaps[item]]
    accuracy = {"accuracy_clean": round(fmean(clean), 4)} if any(checked) and clean else {}
    return {"overlap": round(sum(checked) / len(checked), 4), **accuracy}
