"""When a training's loss has jumped. Plain floats."""

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple

RECENT = 20  # losses, the last ones: what is usual now
NORMAL = 1.4826  # a normal distribution's standard deviation, in medians of its distance from 0


class Usual(NamedTuple):
    """What the losses of the last steps were like, in nats, and above which the next one is a spike."""

    median: float  # of the last 20
    deviation: float  # standard deviation from step to step
    limit: float


def usual_loss(losses: Sequence[float], deviations: float, rise: float) -> Usual:
    """The limit lies above the median by so many deviations, and by `rise` nats at least. Needs two losses.

    The deviation is told from the differences of losses that follow each other, whose variance is twice that of a
    loss, so that a falling curve isn't taken for a wide one; and from their median, so that outliers change little.
    """
    middle = median(list(losses)[-RECENT:])
    deviation = NORMAL * median(abs(after - before) for before, after in pairwise(losses)) / 2**0.5
    return Usual(middle, deviation, middle + max(rise, deviations * deviation))
