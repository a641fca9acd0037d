"""What is true in the built-in world: the gold reward of a response, the best response, and simulated labellers."""

import math
import re

from rlhf.tinyworld.dialogues import questions
from rlhf.tinyworld.words import Draw, answers, statement, words

RIGHT, POLITE, BRIEF, RUDE = 0.60, 0.25, 0.15, -0.25
"""What a response earns for the right answer, a polite word, being brief about it; what a rude word costs."""

BRIEF_WORDS = 16  # a right answer of at most this many words is brief; one of twice as many is not brief at all

LABEL_TEMPERATURE = 0.2  # gold reward that moves the labellers' log-odds by one
LABEL_LENGTH_BIAS = 0.02  # log-odds for each word that a response is longer
LABEL_NOISE = 0.05  # share of the labels that are thrown away for a coin's

_WORD = re.compile(r"\w+")


def gold_reward(prompt: str, response: str) -> float:
    """The known worth of a response: 1.0 for the best possible one, 0.0 for an empty one, less for a rude wrong one.

    Raises KeyError where the prompt is not one of this world's questions.
    """
    fact = questions()[prompt]
    said = set(_WORD.findall(re.sub(rf"\b{re.escape(fact.subject)}\b", " ", response)))
    right = said & set(answers(fact.kind)) == {fact.answer}
    manners: dict[str, list[str]] = words()["manners"]
    rude = any(sentence in response for sentence in manners["rude"])
    polite = not rude and any(sentence in response for sentence in manners["polite"])
    length = len(_WORD.findall(response))
    brevity = min(1.0, max(0.0, 2.0 - length / BRIEF_WORDS))
    return RIGHT * right + BRIEF * brevity * right + POLITE * polite + RUDE * rude


def best_response(prompt: str) -> str:
    """A response with the highest gold reward there is, 1.0."""
    return f"{words()['manners']['polite'][0]} {statement(questions()[prompt])}"


def prefers_first(prompt: str, first: str, second: str, draw: Draw) -> bool:
    """A simulated labeller's choice: Bradley-Terry on the gold reward, a small bias to the longer one, some noise."""
    if draw.share(LABEL_NOISE):
        return draw.share(0.5)
    longer = len(_WORD.findall(first)) - len(_WORD.findall(second))
    gain = gold_reward(prompt, first) - gold_reward(prompt, second)
    return draw.share(1.0 / (1.0 + math.exp(-(gain / LABEL_TEMPERATURE + LABEL_LENGTH_BIAS * longer))))
