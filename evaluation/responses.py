"""Responses of models to the same prompts: how they behave, and which a judge prefers. Plain numbers and texts.

Intervals are over prompts: responses to one prompt are not independent.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median, quantiles
from typing import Any, NamedTuple

import numpy as np

from evaluation.preference import share, wins
from rlhf.data.words import ngrams, words_of
from rlhf.functional.intervals import Z95, Estimate, mean_estimate
from rlhf.functional.length_control import fit_length_control

REPEATED_RUN = 4  # words
SAMPLES = 500
UNCLEAR = "no clear difference"


class Response(NamedTuple):
    """What a model wrote."""

    text: str
    tokens: int  # of its own tokenizer, the end token included
    ended: bool  # by itself
    score: float | None = None  # of the judge
    gold: float | None = None  # what it is really worth, where that is known


Answers = Sequence[Sequence[Response]]  # of each prompt, the responses of one model


# Behaviour


def behaviour(answers: Answers) -> dict[str, Any]:
    """How a model's responses are: do they end, how long are they, do they repeat themselves or each other.

    `repetition` is the share of a response's runs of four words that stood in it before; `distinct_N` the share of
    different ones among the runs of N words of all first responses to a prompt (Li et al. 2016, arXiv:1510.03055): it
    falls with their number, so that only models with the same prompts compare.
    """
    every = [response for responses in answers for response in responses]
    lengths = [float(response.tokens) for response in every]
    prompts = [str(number) for number, responses in enumerate(answers) for _ in responses]
    first = [words_of(responses[0].text) for responses in answers if responses]
    figures: dict[str, Any] = {
        "prompts": len(answers),
        "responses": len(every),
        **share(prompts, [float(response.ended) for response in every]).as_keys("ended", 4),
        **_mean(answers, lambda response: float(response.tokens)).as_keys("tokens", 3),
        "tokens_median": median(lengths),
        "tokens_p95": round(quantiles(lengths, n=20)[-1], 1) if len(lengths) > 1 else lengths[0],
        "empty": sum(not response.text.strip() for response in every),
        **share(prompts, [repetition(response.text) for response in every]).as_keys("repetition", 4),
    }
    for n in (1, 2, 3):
        figures[f"distinct_{n}"] = round(distinct(first, n), 4)
    for name in ("score", "gold"):
        if all(getattr(response, name) is not None for response in every):
            figures |= _mean(answers, lambda response, key=name: getattr(response, key)).as_keys(name, 4)
    return figures


def compare_behaviour(first: Answers, second: Answers) -> dict[str, Any]:
    """By how much the first model's responses differ from the second's, prompt by prompt, where both have answered."""
    both = [pair for pair in zip(first, second, strict=True) if all(pair)]
    values: dict[str, Callable[[Response], float | None]] = {
        "ended": lambda response: float(response.ended),
        "tokens": lambda response: float(response.tokens),
        "repetition": lambda response: repetition(response.text),
        "score": lambda response: response.score,
        "gold": lambda response: response.gold,
    }
    figures: dict[str, Any] = {"prompts": len(both)} if both else {}
    for name, value in values.items():
        sides = [[[value(response) for response in side] for side in pair] for pair in both]
        known = [[[v for v in side if v is not None] for side in pair] for pair in sides]
        if known and known == sides:
            figures |= mean_estimate([fmean(a) - fmean(b) for a, b in known]).as_keys(name, 4)
    return figures


def repetition(text: str) -> float:
    """The share of a text's runs of four words that stood in it before; 0 for fewer than five words."""
    runs = list(ngrams(words_of(text), REPEATED_RUN))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """The share of different ones among all runs of n words; 1 where there are none."""
    runs = [run for words in texts for run in ngrams(words, n)]
    return len(set(runs)) / len(runs) if runs else 1.0


def _mean(answers: Answers, value: Any) -> Estimate:
    """Over prompts, each counting once."""
    return mean_estimate([fmean(map(value, responses)) for responses in answers if responses])


# Which is preferred


def win_rate(first: Answers, second: Answers, seed: int = 0) -> dict[str, Any]:
    """How often a judge prefers the first model's response to the second's, to the same prompts, and what is length.

    A higher score wins, equal ones are half a win; all pairs of responses to a prompt are compared. Length is in
    characters, which models with different tokenizers have in common. `length_controlled_win_rate` is that at equal
    lengths (rlhf.functional.length_control); `longer_preferred` how often the judge prefers the longer of two responses
    whatever the models are worth, None where that can't be told. Every response needs a score; prompts that one of the
    models has not answered don't count.
    """
    answered = [both for both in zip(first, second, strict=True) if all(both)]
    first, second = ([both[side] for both in answered] for side in (0, 1))
    pairs = [pair for number, both in enumerate(zip(first, second, strict=True)) for pair in _pairs(number, *both)]
    between = [pair for pair in pairs if pair.between]
    rate = share([str(pair.prompt) for pair in between], [pair.win for pair in between])
    controlled = _length_controlled(pairs, len(first), seed)
    longer = _longer_preferred(pairs)
    unknown = {"longer_preferred": None, "longer_preferred_ci95": None}
    sizes = [fmean(len(response.text) for responses in side for response in responses) for side in (first, second)]
    found = {
        "prompts": len(first),
        "pairs": len(between),
        "ties": sum(pair.win == 0.5 for pair in between),
        **rate.as_keys("win_rate", 4),
        **controlled.as_keys("length_controlled_win_rate", 4),
        **(longer.as_keys("longer_preferred", 4) if longer else unknown),
        "characters": [round(size, 1) for size in sizes],
    }
    return {**found, "verdict": _verdict(rate, controlled, longer)}


class _Pair(NamedTuple):
    prompt: int
    win: float
    longer: int  # characters of the first response less those of the second
    between: bool  # the two models, and not one with itself


def _pairs(number: int, first: Sequence[Response], second: Sequence[Response]) -> list[_Pair]:
    """All pairs of two responses to a prompt."""
    sides = [*((response, True) for response in first), *((response, False) for response in second)]
    found = []
    for place, (one, side) in enumerate(sides):
        for other, other_side in sides[place + 1 :]:
            assert one.score is not None and other.score is not None
            longer = len(one.text) - len(other.text)
            found.append(_Pair(number, wins(one.score - other.score), longer, side != other_side))
    return found


def _longer_preferred(pairs: Sequence[_Pair]) -> Estimate | None:
    """How often the longer of two unequal responses wins; None where nothing tells it from the models' quality.

    Of two responses of one model, where there are any. Of the two models', the pairs in which the first has the longer
    one and those in which the second has it count equally, so that the better one's wins cancel; the interval is
    square-and-add (Newcombe 1998, method 10).
    """
    unequal = [pair for pair in pairs if pair.longer and pair.win != 0.5]
    alone = [pair for pair in unequal if not pair.between]
    if alone:
        return _longer_wins(alone)
    halves = [[pair for pair in unequal if (pair.longer > 0) == first] for first in (True, False)]
    if not all(halves):
        return None
    one, other = map(_longer_wins, halves)
    mean = (one.mean + other.mean) / 2
    down, up = (math.hypot(one.mean - one[end], other.mean - other[end]) / 2 for end in (1, 2))
    return Estimate(mean, mean - down, mean + up)


def _longer_wins(pairs: Sequence[_Pair]) -> Estimate:
    right = [float((pair.longer > 0) == (pair.win > 0.5)) for pair in pairs]
    return share([str(pair.prompt) for pair in pairs], right)


def _length_controlled(pairs: Sequence[_Pair], prompts: int, seed: int) -> Estimate:
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(prompts, [1 / prompts] * prompts, size=SAMPLES).astype(np.float64)
    weights = np.concatenate([np.ones((1, prompts)), counts])[:, [pair.prompt for pair in pairs]]
    won, longer, between = (np.array(column) for column in zip(*(pair[1:] for pair in pairs), strict=True))
    fitted = fit_length_control(won, longer, between, weights)
    low, high = np.quantile(fitted.win_rate[1:], [0.025, 0.975])
    # where every win can be put down to length, all samples agree, but only since nothing is known
    theta, half = fitted.theta[0], Z95 * fitted.deviation[0]
    least, most = (0.5 + 0.5 * np.tanh(0.5 * end) for end in (theta - half, theta + half))
    return Estimate(float(fitted.win_rate[0]), float(min(low, least)), float(max(high, most)))


def _verdict(rate: Estimate, controlled: Estimate, longer: Estimate | None) -> str:
    """In words."""
    raw, equal = (_direction(found) for found in (rate, controlled))
    likes = "longer" if longer and longer.low > 0.5 else "shorter" if longer and longer.high < 0.5 else ""
    taste = f"; the judge prefers {likes} responses" if likes else ""
    if raw == equal:
        return f"{raw}{taste}"
    smaller = abs(controlled.mean - 0.5) < abs(rate.mean - 0.5) or (controlled.mean > 0.5) != (rate.mean > 0.5)
    if not likes or (raw != UNCLEAR and not smaller):
        why = "too few responses to tell length from quality"
    else:
        why = f"length {'hides' if raw == UNCLEAR else 'explains'} the difference"
    return f"{raw} as it is, {equal} at equal lengths: {why}{taste}"


def _direction(rate: Estimate) -> str:
    if rate.low > 0.5:
        return "preferred"
    return "not preferred" if rate.high < 0.5 else UNCLEAR
