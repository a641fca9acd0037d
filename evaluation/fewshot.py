"""Few-shot accuracy: multiple choice by the log-likelihood of each choice after the demonstrations.

The prompt of an item is the task line, a line `input -> answer` for each demonstration, and the query's `input ->`
for the built-in world; any format is a function from (item, demonstrations) to text.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.scoring import TOKEN_BUDGET, continuation_logprobs
from rlhf.functional.intervals import Estimate, proportion_estimate
from rlhf.tokenizer import begin_id, encode_texts


class Question(NamedTuple):
    """One item with its demonstrations, ready to be asked."""

    prompt: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice
    demonstrated: tuple[str, ...]  # the demonstrations' answers


class Task(Protocol):
    """What is asked: a name, and the questions at any number of demonstrations."""

    @property
    def name(self) -> str:
        """The task's name."""
        ...

    def questions(self, shots: int, n: int, seed: int) -> list[Question]:
        """At most `n` questions with `shots` demonstrations each, the same items at every count.

        Raises UserError where there are fewer demonstrations than that.
        """
        ...


class Accuracy(NamedTuple):
    """How a task went at one number of demonstrations."""

    accuracy: Estimate
    chance: float
    copy_baseline: float | None  # None without demonstrations
    items: int
    too_long: int  # items that don't fit the model's context; they are not asked, and counted here

    def summary(self) -> dict[str, object]:
        """As summaries write it."""
        found: dict[str, object] = {**self.accuracy.as_keys("accuracy", 4), "chance": round(self.chance, 4)}
        if self.copy_baseline is not None:
            found["copy_baseline"] = round(self.copy_baseline, 4)
        return {**found, "items": self.items, "too_long": self.too_long}


def chance_level(questions: Sequence[Question]) -> float:
    """The expected accuracy of a guess among the choices."""
    return sum(1 / len(question.choices) for question in questions) / len(questions)


def copy_baseline(questions: Sequence[Question]) -> float | None:
    """The expected accuracy of answering with the most frequent answer among the demonstrations (ties by lot)."""
    if not any(question.demonstrated for question in questions):
        return None
    right = 0.0
    for question in questions:
        counts = Counter(question.demonstrated)
        most = max(counts.values(), default=0)
        commonest = [answer for answer, count in counts.items() if count == most]
        if question.choices[question.answer] in commonest:
            right += 1 / len(commonest)
    return right / len(questions)


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    context: int,
    budget: int = TOKEN_BUDGET,
    progress: Callable[[int], None] | None = None,
) -> Accuracy | None:
    """The share of questions whose right choice is the likeliest continuation. None where no question fits."""
    begin = begin_id(tokenizer)
    prompts = encode_texts(tokenizer, [question.prompt for question in questions])
    contexts: list[list[int]] = []
    continuations: list[list[int]] = []
    asked: list[Question] = []
    for question, ids in zip(questions, prompts, strict=True):
        whole = encode_texts(tokenizer, [f"{question.prompt} {choice}" for choice in question.choices])
        if any(len(sequence) > context for sequence in whole):
            continue
        asked.append(question)
        for sequence in whole:
            cut = min(len(ids), len(sequence) - 1)
            contexts.append([begin, *sequence[:cut]])
            continuations.append(sequence[cut:])
    if not asked:
        return None
    logprobs = continuation_logprobs(model, contexts, continuations, budget=budget, progress=progress)
    right = place = 0
    for question in asked:
        scores = logprobs[place : place + len(question.choices)]
        place += len(question.choices)
        right += max(range(len(scores)), key=scores.__getitem__) == question.answer
    return Accuracy(
        proportion_estimate(right, len(asked)),
        chance_level(asked),
        copy_baseline(asked),
        len(asked),
        len(questions) - len(asked),
    )
