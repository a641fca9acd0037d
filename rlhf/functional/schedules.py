"""Learning rates over a training's tokens. Plain floats.

Legend: a training of `total` tokens; a step reads those from `start` to `end`; the warm-up takes `warm` tokens.
"""

import math
from typing import Literal

ScheduleName = Literal["cosine", "linear", "wsd", "constant"]


def learning_rate_share(
    start: int, end: int, warm: int, total: int, schedule: ScheduleName, floor: float, decay: float = 0.2
) -> float:
    """The learning rate of a step as a share of its peak.

    Linear warm-up: the share of the warm-up's tokens that are read once the step is done. Then, with x from 0 to 1 the
    way from the warm-up to the end at which the step starts, down to `floor`:

        cosine     floor + (1 - floor) (1 + cos(pi x)) / 2        (Loshchilov and Hutter 2017, arXiv:1608.03983)
        linear     1 - (1 - floor) x
        wsd        1, and over the last `decay` of all tokens 1 - (1 - floor) sqrt(y), y from 0 to 1
                   (warmup-stable-decay, Hu et al. 2024, arXiv:2404.06395; the root: Haegele et al. 2024,
                   arXiv:2405.18392, section 3)
        constant   1
    """
    if start < warm:
        return min(1.0, end / warm)
    x = (start - warm) / max(1, total - warm)
    if schedule == "cosine":
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * x))
    if schedule == "linear":
        return 1.0 - (1.0 - floor) * x
    if schedule == "wsd":
        falling = max(warm, round((1.0 - decay) * total))
        y = (start - falling) / max(1, total - falling)
        return 1.0 - (1.0 - floor) * math.sqrt(max(0.0, y))
    return 1.0
