"""Intervals by resampling (Efron 1979): percentiles of the figure over samples that are drawn with replacement."""

import math
from collections.abc import Sequence

import numpy as np

from rlhf.functional.intervals import Estimate

SAMPLES = 2000
AT_ONCE = 2**22  # numbers


def bootstrap_estimate(values: Sequence[float], samples: int = SAMPLES, seed: int = 0) -> Estimate:
    """The mean of independent values with the 2.5th and 97.5th percentiles of resampled means.

    Raises ValueError without values.
    """
    if not values:
        raise ValueError("no values to take the mean of")
    means = np.sort(_resampled_means(np.asarray(values, dtype=np.float64), samples, seed))
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(math.fsum(values) / len(values), float(low), float(high))


def paired_estimate(first: Sequence[float], second: Sequence[float], samples: int = SAMPLES, seed: int = 0) -> Estimate:
    """The mean of first - second, item by item, with its interval. Raises ValueError where their numbers differ."""
    return bootstrap_estimate([a - b for a, b in zip(first, second, strict=True)], samples, seed)


def _resampled_means(values: np.ndarray, samples: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    step = max(1, AT_ONCE // len(values))
    parts = []
    for start in range(0, samples, step):
        places = generator.integers(0, len(values), size=(min(step, samples - start), len(values)))
        parts.append(values[places].mean(1))
    return np.concatenate(parts)
