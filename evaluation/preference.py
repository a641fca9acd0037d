"""What a judge of responses knows about itself, on held-out comparisons: how often it is right, how sure it may be, and
what it could be right for without knowing anything. Plain numbers and texts; no model.

Comparisons of one prompt are not independent, so every interval is over prompts.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import numpy as np

from rlhf.data.words import words_of
from rlhf.functional.intervals import Estimate, clustered_estimate, proportion_estimate

BINS = 10  # of equal width, over confidences from 0.5 to 1
HARDEST = 100.0  # a temperature is at most this many times the mean difference, and at least that part of it
DIGITS = 4


class Answer(NamedTuple):
    """A response: its text, its tokens without the prompt's, and its scores, one for each head of the judge."""

    text: str
    tokens: int
    scores: tuple[float, ...] = ()
    gold: float | None = None  # what it is really worth, where that is known

    @property
    def score(self) -> float:
        """The mean over the heads."""
        return fmean(self.scores)


class Outcome(NamedTuple):
    """A comparison with what a judge makes of it; `prompt` is the text of all messages before the responses."""

    prompt: str
    source: str
    chosen: Answer
    rejected: Answer

    @property
    def difference(self) -> float:
        """By how much the judge prefers the chosen response."""
        return self.chosen.score - self.rejected.score

    @property
    def gold_gain(self) -> float | None:
        """By how much the chosen response is really better, where that is known."""
        if self.chosen.gold is None or self.rejected.gold is None:
            return None
        return self.chosen.gold - self.rejected.gold


def wins(difference: float) -> float:
    """1 for a preference that is right, 0 for one that is wrong, 0.5 for none."""
    return 0.5 if difference == 0 else float(difference > 0)


def share(prompts: Sequence[str], values: Sequence[float]) -> Estimate:
    """The mean of values from 0 to 1, one a comparison; those of a prompt are not independent of each other."""
    groups: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, values, strict=True):
        groups.setdefault(prompt, []).append(value)
    if len(groups) == len(values):
        return proportion_estimate(math.fsum(values), len(values))
    return clustered_estimate(list(groups.values()))


def share_as_keys(name: str, outcomes: Sequence[Outcome], right: Callable[[Outcome], float]) -> dict[str, Any]:
    """`{name: share, name_ci95: [low, high]}` of the comparisons for which something is right; None where none is."""
    return _share_of(name, [(outcome, right(outcome)) for outcome in outcomes])


def _share_of(name: str, trials: Sequence[tuple[Outcome, float]]) -> dict[str, Any]:
    if not trials:
        return {name: None, f"{name}_ci95": None}
    found = share([outcome.prompt for outcome, _ in trials], [right for _, right in trials])
    return dict(found.as_keys(name, DIGITS))


def is_right(outcome: Outcome) -> float:
    """Whether the judge prefers what was chosen."""
    return wins(outcome.difference)


def longer_is_right(outcome: Outcome) -> float:
    """Whether preferring the longer response, in tokens, would be right."""
    return wins(outcome.chosen.tokens - outcome.rejected.tokens)


# Accuracy


def accuracies(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Accuracy overall, by source, and where the longer or the shorter response was chosen, beside that of length."""
    sources = sorted({outcome.source for outcome in outcomes})
    longer = [outcome for outcome in outcomes if longer_is_right(outcome) == 1.0]
    shorter = [outcome for outcome in outcomes if longer_is_right(outcome) == 0.0]
    return {
        "pairs_test": len(outcomes),
        **_beside_length(outcomes),
        "accuracy_by_source": {
            source: {"pairs": len(found), **_beside_length(found)}
            for source in sources
            if (found := [outcome for outcome in outcomes if outcome.source == source])
        },
        "pairs_longer_chosen": len(longer),
        **share_as_keys("accuracy_longer_chosen", longer, is_right),
        "pairs_shorter_chosen": len(shorter),
        **share_as_keys("accuracy_shorter_chosen", shorter, is_right),
    }


def _beside_length(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return {
        **share_as_keys("accuracy", outcomes, is_right),
        **share_as_keys("length_baseline_accuracy", outcomes, longer_is_right),
    }


def gold_figures(outcomes: Sequence[Outcome], margin: float) -> dict[str, Any]:
    """How often judge and labellers prefer what is really better; nothing where the truth is known of no comparison.

    The judge is asked only where the gold differs by at least `margin`: less hardly matters to anybody.
    """
    known = [(outcome, gain) for outcome in outcomes if (gain := outcome.gold_gain) is not None]
    if not known:
        return {}
    differ = [(outcome, gain) for outcome, gain in known if abs(gain) > 1e-9]
    matter = [(outcome, gain) for outcome, gain in differ if abs(gain) >= margin - 1e-9]
    return {
        **_share_of("gold_accuracy", [(outcome, wins(outcome.difference * gain)) for outcome, gain in matter]),
        "gold_margin": margin,
        "gold_pairs": len(matter),
        **_share_of("labellers_agree_with_gold", [(outcome, wins(gain)) for outcome, gain in differ]),
    }


# Calibration


class Bin(NamedTuple):
    """Comparisons of which a judge is about equally sure."""

    low: float
    high: float
    pairs: int
    confidence: float  # the mean probability of being right that it gives itself
    accuracy: float  # how often it is right


class Calibration(NamedTuple):
    """How far a judge's confidence can be trusted.

    `temperature` is that with which sigmoid(difference of the scores / temperature) is most nearly the probability that
    the first response is better, fitted on all comparisons. What is measured *after* it uses one that was fitted on the
    other half of the prompts.
    """

    temperature: float
    before: list[Bin]
    after: list[Bin]

    @property
    def error_before(self) -> float:
        """With the scores as training left them."""
        return calibration_error(self.before)

    @property
    def error(self) -> float:
        """With the temperature."""
        return calibration_error(self.after)


def calibration(outcomes: Sequence[Outcome], trained_temperature: float) -> Calibration | None:
    """The calibration of a judge; `trained_temperature` is that with which it was trained, in units of its score.

    None for comparisons of less than two prompts: there is no other half to fit on.
    """
    prompts = [outcome.prompt for outcome in outcomes]
    if len(set(prompts)) < 2:
        return None
    differences = [outcome.difference for outcome in outcomes]
    return Calibration(
        fit_temperature(differences),
        reliability([difference / trained_temperature for difference in differences]),
        reliability(cross_fitted(prompts, differences)),
    )


def fit_temperature(differences: Sequence[float]) -> float:
    """The temperature T with the highest likelihood of the choices, prod sigmoid(d / T) (Guo et al. 2017, section 4.2).

    d are the differences of score, chosen less rejected. The likelihood has one maximum in 1 / T; it lies at the border
    where every choice is as the scores say, or where the scores say nothing.
    """
    found = np.asarray(differences, dtype=np.float64)
    size = float(np.abs(found).mean())
    if size == 0:
        return 1.0
    low, high = size / HARDEST, size * HARDEST
    for _ in range(100):
        middle = math.sqrt(low * high)
        if float((found * _sigmoid(-found / middle)).sum()) >= 0:  # the likelihood still rises with 1 / T
            high = middle
        else:
            low = middle
    return math.sqrt(low * high)


def cross_fitted(prompts: Sequence[str], differences: Sequence[float]) -> list[float]:
    """Each difference over the temperature that was fitted on the half of the prompts to which it doesn't belong."""
    distinct = sorted(set(prompts), key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    half = {prompt: place % 2 for place, prompt in enumerate(distinct)}
    of_half: list[list[float]] = [[], []]
    for prompt, difference in zip(prompts, differences, strict=True):
        of_half[half[prompt]].append(difference)
    temperatures = [fit_temperature(found) for found in of_half]
    return [
        difference / temperatures[1 - half[prompt]] for prompt, difference in zip(prompts, differences, strict=True)
    ]


def reliability(logits: Sequence[float]) -> list[Bin]:
    """Comparisons by confidence, in bins of equal width from 0.5 to 1; empty ones are left out.

    A logit is the log-odds that a judge gives to what was chosen.
    """
    confidences = [float(_sigmoid(np.float64(abs(logit)))) for logit in logits]
    found = []
    for number in range(BINS):
        inside = [i for i, value in enumerate(confidences) if min(int((value - 0.5) * 2 * BINS), BINS - 1) == number]
        if inside:
            confidence = fmean(confidences[i] for i in inside)
            accuracy = fmean(wins(logits[i]) for i in inside)
            low, high = (0.5 + place / (2 * BINS) for place in (number, number + 1))
            found.append(Bin(low, high, len(inside), confidence, accuracy))
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """The expected calibration error: the mean over all comparisons of |accuracy - confidence| of their bin.

    Guo et al. 2017 (arXiv:1706.04599), equation 3. With few comparisons it isn't 0 even for a judge that is calibrated.
    """
    return sum(found.pairs * abs(found.accuracy - found.confidence) for found in bins) / sum(b.pairs for b in bins)


def _sigmoid(values: Any) -> Any:
    """The logistic function, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * values))


# What meets the eye


def _repeated(prompt: str, text: str) -> float:
    asked, said = set(words_of(prompt)), set(words_of(text))
    return len(asked & said) / len(asked) if asked else 0.0


def _variety(text: str) -> float:
    found = words_of(text)
    return len(set(found)) / len(found) if found else 0.0


FEATURES: dict[str, Callable[[str, Answer], float]] = {
    "tokens": lambda _, answer: answer.tokens,
    "characters": lambda _, answer: len(answer.text),
    "words": lambda _, answer: len(words_of(answer.text)),
    "lines": lambda _, answer: answer.text.count("\n") + 1,
    "prompt_words_repeated": lambda prompt, answer: _repeated(prompt, answer.text),
    "distinct_words": lambda _, answer: _variety(answer.text),
    "ends_with_punctuation": lambda _, answer: float(answer.text.rstrip()[-1:] in set(".!?…。！？\"'”’)）")),
}
"""What of a response can be seen without understanding it: of a prompt and a response, a number."""


def surface_features(train: Sequence[Outcome], test: Sequence[Outcome]) -> dict[str, Any]:
    """How often each feature alone is right on the test comparisons, and whether more or less of it is preferred.

    Which of the two is what the training comparisons say; a feature of which both responses have the same is a coin.
    """
    found = {}
    for name, feature in FEATURES.items():
        learned = fmean(wins(_gain(feature, outcome)) for outcome in train)
        sign = 1 if learned >= 0.5 else -1
        values = share_as_keys("accuracy", test, lambda outcome, f=feature, s=sign: wins(s * _gain(f, outcome)))  # type: ignore[misc]
        found[name] = {"preferred": "more" if sign > 0 else "less", **values}
    return found


def _gain(feature: Callable[[str, Answer], float], outcome: Outcome) -> float:
    return feature(outcome.prompt, outcome.chosen) - feature(outcome.prompt, outcome.rejected)


def distinct_answers(outcomes: Sequence[Outcome]) -> list[Answer]:
    """Every response that is compared, once for its prompt."""
    found = {(o.prompt, answer.text): answer for o in outcomes for answer in (o.chosen, o.rejected)}
    return list(found.values())


def length_correlation(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """How the score goes with the length in tokens, over all different responses."""
    answers = distinct_answers(outcomes)
    scores, lengths = [answer.score for answer in answers], [float(answer.tokens) for answer in answers]
    return {
        "score_length_pearson": _rounded(pearson(scores, lengths)),
        "score_length_spearman": _rounded(spearman(scores, lengths)),
    }


def pearson(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The correlation of two series, None where one doesn't vary."""
    x, y = (np.asarray(values, dtype=np.float64) - fmean(values) for values in (a, b))
    size = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / size if size > 0 else None


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The correlation of the ranks of two series, None where one doesn't vary."""
    return pearson(ranks(a), ranks(b))


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, from 1 for the smallest; equal ones share the mean of theirs."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            found[place] = (start + 1 + end) / 2
        start = end
    return found


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


# Ensembles


def head_agreement(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How far the heads of an ensemble agree on comparisons, how often it is right where they do and where they don't.

    `pairwise_agreement` is that of two heads taken at random; `spread` the mean over all different responses of the
    heads' standard deviation, in units of score.
    """
    heads = len(outcomes[0].chosen.scores)
    votes = [
        sum(a > b for a, b in zip(outcome.chosen.scores, outcome.rejected.scores, strict=True)) for outcome in outcomes
    ]
    agree = [outcome for outcome, vote in zip(outcomes, votes, strict=True) if vote in (0, heads)]
    differ = [outcome for outcome, vote in zip(outcomes, votes, strict=True) if vote not in (0, heads)]
    prompts = [outcome.prompt for outcome in outcomes]
    together = [(math.comb(vote, 2) + math.comb(heads - vote, 2)) / math.comb(heads, 2) for vote in votes]
    return {
        "heads": heads,
        **share(prompts, [float(vote in (0, heads)) for vote in votes]).as_keys("unanimous", DIGITS),
        **share(prompts, together).as_keys("pairwise_agreement", DIGITS),
        **share_as_keys("accuracy_where_unanimous", agree, is_right),
        **share_as_keys("accuracy_where_not_unanimous", differ, is_right),
        "spread": round(fmean(pstdev(answer.scores) for answer in distinct_answers(outcomes)), DIGITS),
    }
