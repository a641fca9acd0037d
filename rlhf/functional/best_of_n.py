"""Best-of-n sampling: the best of n responses by score, as a yardstick for optimisation (Gao et al. 2022,
arXiv:2210.10760, section 2)."""

import math
from collections.abc import Sequence


def best_of_n_kl(n: int) -> float:
    """KL(best-of-n policy || the policy that draws), nats: ln n - (n - 1) / n (Stiennon et al. 2020, appendix G.3)."""
    return math.log(n) - (n - 1) / n


def best_of_n_mean(scores: Sequence[float], values: Sequence[float], n: int) -> float:
    """The expected value of the response with the highest score among n, from N >= n independent responses.

    Unbiased: the mean over all n of the N (Nakano et al. 2021, arXiv:2112.09332, appendix I), of which the response
    that has i - 1 below it is the best in C(i - 1, n - 1). Equal scores are taken in the order given.
    """
    order = sorted(range(len(scores)), key=lambda place: scores[place])
    sets = math.comb(len(scores), n)
    return math.fsum(math.comb(below, n - 1) / sets * values[place] for below, place in enumerate(order))
