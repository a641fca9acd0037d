"""When a training's loss has jumped. Plain floats."""

from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

NORMAL = 1.4826  # a normal distribution's standard deviation, in median absolute deviations


class Usual(NamedTuple):
    """What the losses of the last steps were like, in nats, and above which the next one is a spike."""

    median: float
    deviation: float  # standard deviation, from the median absolute deviation: one outlier doesn't change it
    limit: float


def usual_loss(losses: Sequence[float], deviations: float, rise: float) -> Usual:
    """The limit lies above the median by so many deviations, and by `rise` nats at least. Needs a loss."""
    middle = median(losses)
    deviation = NORMAL * median(abs(loss - middle) for loss in losses)
    return Usual(middle, deviation, middle + max(rise, deviations * deviation))
