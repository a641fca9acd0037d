"""Few-shot accuracy: multiple choice by the log-likelihood of each choice, free answers by greedy generation.

Figures of a task at one number of demonstrations are means over its items and over several draws of demonstrations:
which are shown, and in what order, moves a small model's accuracy by far more than its interval says (Lu et al. 2022,
arXiv:2104.08786).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from evaluation.answers import is_right, write_answers
from evaluation.scoring import Request, Scorer
from evaluation.tasks import Metric, Question, Task, TaskFormat
from rlhf.functional.bootstrap import bootstrap_estimate
from rlhf.functional.intervals import clustered_estimate
from rlhf.tokenizer import begin_id, encode_texts

Sizes = Callable[[str], int]
LEAST = -700.0  # nats: a choice less likely than that where nothing is asked counts as this likely there
SIZES: dict[Metric, Sizes] = {"acc": lambda _: 1, "acc_norm": len, "acc_bytes": lambda choice: len(choice.encode())}


class Reader(NamedTuple):
    """Who is asked, and how: what all questions have in common."""

    scorer: Scorer
    tokenizer: PreTrainedTokenizerBase
    context: int  # tokens that are read at most
    begin: Sequence[int]  # the ids before every prompt
    calibrate: bool = False  # whether choices are compared with their probability where nothing is asked, too
    control: bool = False  # whether what looks like a control token in a text is one

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts, nothing before or behind them."""
        return encode_texts(self.tokenizer, list(texts), control=self.control)


class Outcome(NamedTuple):
    """How one question went."""

    question: Question
    right: Mapping[str, bool]  # by metric
    logprobs: tuple[float, ...] = ()  # of each choice, nats
    written: str = ""  # the free answer


def encode_questions(reader: Reader, questions: Sequence[Question], delimiter: str = " ") -> list[list[Request] | None]:
    """A request for each choice of each question; None for a question that needs more than the context's tokens.

    As in lm-evaluation-harness: prompt and choice are encoded together, and the choice is what has no place in the
    prompt's own ids; white space at a prompt's end belongs to it; and BOS stands before a prompt that is empty.
    """
    stems = reader.encode([question.prompt.rstrip() for question in questions])
    texts = [f"{question.prompt}{delimiter}{choice}" for question in questions for choice in question.choices]
    wholes = iter(reader.encode(texts))
    requests: list[list[Request] | None] = []
    for question, stem in zip(questions, stems, strict=True):
        found = [_request(reader, stem, next(wholes)) for _ in question.choices]
        fits = all(len(each.context) + len(each.continuation) - 1 <= reader.context for each in found)
        requests.append(found if fits else None)
    return requests


def _request(reader: Reader, stem: Sequence[int], whole: Sequence[int]) -> Request:
    """The choice behind the prompt `stem`, from the ids of both together."""
    context, continuation = stem, whole[len(stem) :]
    if not continuation:  # a token holds the prompt's end and all of the choice
        context, continuation = whole[:-1], whole[-1:]
    return Request([*reader.begin, *context] or [begin_id(reader.tokenizer)], continuation)


def answer_by_likelihood(reader: Reader, style: TaskFormat, questions: Sequence[Question]) -> list[Outcome | None]:
    """What the model takes for right, question by question; None where one doesn't fit the context."""
    requests = encode_questions(reader, questions, style.delimiter)
    logprobs = iter(reader.scorer.logprobs([request for found in requests if found for request in found]))
    scores = [tuple(next(logprobs) for _ in found or ()) for found in requests]
    outcomes = [
        Outcome(question, _right(question, found), found) if found else None
        for question, found in zip(questions, scores, strict=True)
    ]
    return _calibrated(reader, style, outcomes) if reader.calibrate or style.metric == "acc_calibrated" else outcomes


def _calibrated(reader: Reader, style: TaskFormat, outcomes: Sequence[Outcome | None]) -> list[Outcome | None]:
    """The outcomes with `acc_calibrated`: choices are compared over their probability where nothing is asked.

    Zhao et al. 2021 (arXiv:2102.09690), section 5: argmax p(choice) / p_cf(choice), with p_cf the mean over inputs
    without content of the choices' shares. What is alike in many questions, as all such prompts are in a task whose
    items share demonstrations and choices, is asked once.
    """
    asked = [outcome.question for outcome in outcomes if outcome]
    empties = list(dict.fromkeys((prompt, question.choices) for question in asked for prompt in question.empty))
    requests = encode_questions(reader, [Question(*empty, 0, ()) for empty in empties], style.delimiter)
    logprobs = iter(reader.scorer.logprobs([request for found in requests if found for request in found]))
    shares = {
        empty: _shares([next(logprobs) for _ in found]) if found else None
        for empty, found in zip(empties, requests, strict=True)
    }
    calibrated: list[Outcome | None] = []
    for outcome in outcomes:
        question = outcome.question if outcome else None
        priors = [shares[prompt, question.choices] for prompt in question.empty] if question else []
        known = [prior for prior in priors if prior]
        if outcome is None or question is None or len(known) < len(priors):
            calibrated.append(None)  # one without content is longer than the item, and doesn't fit
            continue
        prior = [max(math.log(mean), LEAST) if (mean := fmean(of)) > 0 else LEAST for of in zip(*known, strict=True)]
        values = [score - before for score, before in zip(outcome.logprobs, prior, strict=True)]
        right = {**outcome.right, "acc_calibrated": values.index(max(values)) == question.answer}
        calibrated.append(outcome._replace(right=right))
    return calibrated


def _shares(logprobs: Sequence[float]) -> list[float]:
    """The softmax."""
    most = max(logprobs)
    weights = [math.exp(value - most) for value in logprobs]
    return [weight / sum(weights) for weight in weights]


def answer_freely(reader: Reader, style: TaskFormat, questions: Sequence[Question]) -> list[Outcome | None]:
    """What the model writes, question by question; None where the context has no room for the answer."""
    tokenizer = reader.tokenizer
    texts = reader.encode([question.prompt for question in questions])
    prompts = [[*reader.begin, *ids] or [begin_id(tokenizer)] for ids in texts]
    fits = [len(ids) + style.max_tokens <= reader.context for ids in prompts]
    asked = [ids for ids, fitting in zip(prompts, fits, strict=True) if fitting]
    written = iter(write_answers(reader.scorer.model, tokenizer, asked, style))
    outcomes: list[Outcome | None] = []
    for question, fitting in zip(questions, fits, strict=True):
        text = next(written).text if fitting else ""
        right = {"exact_match": is_right(text, question.target, style)}
        outcomes.append(Outcome(question, right, written=text) if fitting else None)
    return outcomes


def _right(question: Question, scores: Sequence[float]) -> dict[str, bool]:
    """Whether the likeliest choice is right: as it is, by character, by byte. Of equal ones the first counts."""
    found: dict[str, bool] = {}
    for metric, size in SIZES.items():
        values = [score / size(choice) for score, choice in zip(scores, question.choices, strict=True)]
        found[metric] = values.index(max(values)) == question.answer
    return found


# Figures


def chance_level(questions: Sequence[Question]) -> float:
    """The expected accuracy of a guess among the choices; 0 where the answers are free."""
    return fmean(1 / len(question.choices) if question.choices else 0.0 for question in questions)


def copy_baseline(questions: Sequence[Question]) -> float | None:
    """The expected accuracy of answering with the most frequent answer among the demonstrations (ties by lot)."""
    if not any(question.demonstrated for question in questions):
        return None
    right = 0.0
    for question in questions:
        counts = Counter(question.demonstrated)
        most = max(counts.values(), default=0)
        commonest = [answer for answer, count in counts.items() if count == most]
        wanted = question.choices[question.answer] if question.choices else question.target
        if wanted in commonest:
            right += 1 / len(commonest)
    return right / len(questions)


def main_metric(task: Task) -> Metric:
    """The figure that is a task's accuracy."""
    return task.format.metric or ("exact_match" if task.free else "acc")


def summarise(task: Task, draws: Sequence[Sequence[Outcome]], too_long: int) -> dict[str, Any]:
    """The figures of a task at one number of demonstrations, from the outcomes of each draw, of the same items.

    `accuracy` is the task's own metric. Its `_ci95` is Wilson's on the effective number of items (draws of one item
    are one trial or more, by how far they agree), its `_bootstrap95` the percentiles of resampled items, and
    `spread` the standard deviation over the draws.
    """
    metric = main_metric(task)
    of_items: dict[int, list[Outcome]] = {}
    for outcomes in draws:
        for outcome in outcomes:
            of_items.setdefault(outcome.question.item, []).append(outcome)
    groups = [[float(outcome.right[metric]) for outcome in found] for found in of_items.values()]
    questions = [outcome.question for outcomes in draws for outcome in outcomes]
    by_draw = [fmean(float(outcome.right[metric]) for outcome in outcomes) for outcomes in draws]
    bootstrapped = bootstrap_estimate([fmean(group) for group in groups])
    found: dict[str, Any] = {
        **clustered_estimate(groups).as_keys("accuracy", 4),
        "accuracy_bootstrap95": [round(bootstrapped.low, 4), round(bootstrapped.high, 4)],
        "metric": metric,
        "version": task.format.version,
        "chance": round(chance_level(questions), 4),
    }
    for name in next(iter(of_items.values()))[0].right:
        found[name] = round(fmean(float(o.right[name]) for outcomes in draws for o in outcomes), 4)
    copied = copy_baseline(questions)
    if copied is not None:
        found["copy_baseline"] = round(copied, 4)
    if len(draws) > 1:
        found |= {"draws": [round(share, 4) for share in by_draw], "spread": round(pstdev(by_draw), 4)}
    return {**found, "items": len(of_items), "too_long": too_long}
