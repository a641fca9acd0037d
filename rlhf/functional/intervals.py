"""Means with their sampling error. Plain floats; nothing here needs torch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

Z95 = 1.959963984540054  # the normal distribution's 97.5 % point
NO_VARIANCE = 1e-12  # of a share: less is rounding


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def as_keys(self, name: str, digits: int = 6) -> dict[str, float | list[float]]:
        """`{name: mean, name_ci95: [low, high]}`, as summaries write it."""
        return {name: round(self.mean, digits), f"{name}_ci95": [round(self.low, digits), round(self.high, digits)]}


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent values, normal approximation. Raises ValueError without values."""
    n = len(values)
    if n == 0:
        raise ValueError("no values to take the mean of")
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else 0.0
    half = Z95 * math.sqrt(variance / n)
    return Estimate(mean, mean - half, mean + half)


def proportion_estimate(right: float, n: float) -> Estimate:
    """A share of n independent yes-or-no trials with Wilson's score interval (Wilson 1927).

    n need not be whole: trials that are not independent are worth fewer (`clustered_estimate`).
    """
    if n == 0:
        raise ValueError("no trials to take the share of")
    share = right / n
    centre = (share + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def clustered_estimate(groups: Sequence[Sequence[float]]) -> Estimate:
    """The mean of values from 0 to 1 that come in independent groups: Wilson's interval on the effective sample size.

    n values that vary from group to group with variance V of their mean are worth p (1 - p) / V independent trials
    (Kish 1965: n over the design effect), at most n. Where the groups show no difference, as where all is right or
    there is one group, a group counts as one trial. Raises ValueError without values.
    """
    n = sum(map(len, groups))
    found = ratio_estimate([math.fsum(group) for group in groups], [float(len(group)) for group in groups])
    share, variance = min(1.0, found.mean), ((found.high - found.low) / (2 * Z95)) ** 2
    if variance < NO_VARIANCE:
        effective = float(sum(1 for group in groups if group))
    else:
        effective = min(n, share * (1 - share) / variance)
    return proportion_estimate(share * effective, effective)


def sign_test(differences: Sequence[float]) -> float:
    """The two-sided p-value of as many or more differences of one sign, were both signs as likely; zeros don't count.

    Of items that are right or wrong it is McNemar's exact test. 1.0 without differences.
    """
    more, less = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    n, fewer = more + less, min(more, less)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """sum(numerators) / sum(denominators) over independent groups (documents), by the delta method."""
    n = len(numerators)
    if n == 0 or math.fsum(denominators) == 0:
        raise ValueError("no groups to take the ratio of")
    whole = math.fsum(denominators)
    ratio = math.fsum(numerators) / whole
    if n == 1:
        return Estimate(ratio, ratio, ratio)
    spread = math.fsum((a - ratio * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    half = Z95 * math.sqrt(n / (n - 1) * spread) / whole
    return Estimate(ratio, ratio - half, ratio + half)
