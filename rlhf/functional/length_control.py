"""How often one side would win if both wrote equally long: a logistic regression of wins on the difference of lengths.

The idea of AlpacaEval's length control (Dubois et al. 2024, arXiv:2404.04475, section 3), P(win) = sigmoid(theta + phi
f(d)), with d the difference of lengths and f linear up to some typical differences. Departures:

- f(d) = 3 tanh(d / 3s), with s the root mean square of d: with their tanh(d / s) what is typical is at the ceiling
  already, and with their s, the standard deviation, differences that are all alike would be none at all.
- The terms for the difficulty of a prompt, which need the wins of many other models, are left out.
- Pairs of the *same* side's responses are read as well, with a slope of their own and no theta. They say how much the
  judge likes length where one side's responses are nearly always the longer ones. Between the sides the slope is
  mostly flatter, since one of them is better on some prompts and the other on others; so it is only drawn towards the
  other slope.

Legend: N pairs, S samples of the bootstrap.
"""

from typing import NamedTuple

import numpy as np

# standard deviations of normal priors: weak, but they keep separable wins finite
THETA_SCALE, PHI_SCALE, APART_SCALE = 3.0, 30.0, 3.0
CEILING = 3.0  # typical differences
STEPS = 60
LARGEST_STEP = 3.0


class LengthControl(NamedTuple):
    """The fit, one number for each sample of weights."""

    theta: np.ndarray  # [S] log-odds of a win at equal lengths
    phi: np.ndarray  # [S] log-odds that a typical difference of length between the sides is worth
    phi_within: np.ndarray  # [S] the same between two responses of one side
    deviation: np.ndarray  # [S] of theta, from the curvature there

    @property
    def win_rate(self) -> np.ndarray:
        """Share of wins at equal lengths [S]."""
        return 0.5 + 0.5 * np.tanh(0.5 * self.theta)


def scaled(differences: np.ndarray) -> np.ndarray:
    """f(d) [N] of differences of length d [N]: about 1 for a typical one."""
    typical = float(np.sqrt(np.mean(differences**2)))
    return CEILING * np.tanh(differences / (CEILING * typical)) if typical > 0 else np.zeros(len(differences))


def prior_precision() -> np.ndarray:
    """Of (theta, phi, phi_within) [3, 3]: theta and phi_within are near 0, phi is near phi_within."""
    apart = 1 / APART_SCALE**2
    return np.array([[1 / THETA_SCALE**2, 0, 0], [0, apart, -apart], [0, -apart, apart + 1 / PHI_SCALE**2]])


def fit_length_control(
    wins: np.ndarray, differences: np.ndarray, between: np.ndarray, weights: np.ndarray
) -> LengthControl:
    """The posterior mode for each sample of weights, by Newton's method.

    `wins` [N] is 1, 0 or 0.5 for the first response of each pair, `differences` [N] its length less the second's,
    `between` bool [N] False where both are the same side's, `weights` float64 [S, N] how much each pair counts.
    """
    x = scaled(differences)
    design = np.stack([between.astype(np.float64), x * between, x * ~between], axis=1)  # [N, 3]
    products = (design[:, :, None] * design[:, None, :]).reshape(-1, 9)
    prior = prior_precision()
    found = np.zeros((len(weights), 3))
    for _ in range(STEPS):
        p = 0.5 + 0.5 * np.tanh(0.5 * (found @ design.T))
        gradient = (weights * (wins - p)) @ design - found @ prior
        curvature = ((weights * p * (1 - p)) @ products).reshape(-1, 3, 3) + prior
        step = np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        found = found + step / np.maximum(1.0, np.abs(step).max(1, keepdims=True) / LARGEST_STEP)
        if np.abs(step).max() < 1e-9:
            break
    deviation = np.sqrt(np.linalg.inv(curvature)[:, 0, 0])
    return LengthControl(found[:, 0], found[:, 1], found[:, 2], deviation)
