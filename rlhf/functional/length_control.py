"""How often one side would win if both wrote equally long: a logistic regression of wins on the difference of lengths.

The idea of AlpacaEval's length control (Dubois et al. 2024, arXiv:2404.04475, section 3), P(win) = sigmoid(theta + phi
tanh(d / s)), with d the difference of lengths and s its standard deviation. Departures: the terms for the difficulty of
a prompt, which need the wins of many other models, are left out; and pairs of the *same* side's responses, which have
no theta, are read as well. Only from these can the judge's liking for length be told from quality where one side's
responses are nearly always the longer ones.

Legend: N pairs, S samples of the bootstrap.
"""

from typing import NamedTuple

import numpy as np

THETA_SCALE, PHI_SCALE = 3.0, 30.0  # standard deviations of normal priors: weak, but they keep separable wins finite
STEPS = 60
LARGEST_STEP = 3.0


class LengthControl(NamedTuple):
    """The fit, one number for each sample of weights."""

    theta: np.ndarray  # [S] log-odds of a win at equal lengths
    phi: np.ndarray  # [S] log-odds that a difference of length is worth, where it is far above s
    deviation: np.ndarray  # [S] of theta, from the curvature there

    @property
    def win_rate(self) -> np.ndarray:
        """Share of wins at equal lengths [S]."""
        return 0.5 + 0.5 * np.tanh(0.5 * self.theta)


def fit_length_control(
    wins: np.ndarray, differences: np.ndarray, between: np.ndarray, weights: np.ndarray
) -> LengthControl:
    """The posterior mode for each sample of weights, by Newton's method.

    `wins` [N] is 1, 0 or 0.5 for the first response of each pair, `differences` [N] its length less the second's,
    `between` bool [N] False where both are the same side's, `weights` float64 [S, N] how much each pair counts.
    """
    spread = float(differences.std())
    x = np.tanh(differences / spread) if spread > 0 else np.zeros(len(differences))
    one = between.astype(np.float64)
    theta, phi = (np.zeros(len(weights)) for _ in range(2))
    for _ in range(STEPS):
        p = 0.5 + 0.5 * np.tanh(0.5 * (theta[:, None] * one + phi[:, None] * x))
        slope = weights * (wins - p)
        curve = weights * p * (1 - p)
        g_theta, g_phi = slope @ one - theta / THETA_SCALE**2, slope @ x - phi / PHI_SCALE**2
        a, c = curve @ one + 1 / THETA_SCALE**2, curve @ x**2 + 1 / PHI_SCALE**2
        b = curve @ (one * x)
        determinant = a * c - b * b
        step_theta, step_phi = (c * g_theta - b * g_phi) / determinant, (a * g_phi - b * g_theta) / determinant
        size = np.maximum(1.0, np.maximum(np.abs(step_theta), np.abs(step_phi)) / LARGEST_STEP)
        theta, phi = theta + step_theta / size, phi + step_phi / size
        if max(np.abs(step_theta).max(), np.abs(step_phi).max()) < 1e-9:
            break
    return LengthControl(theta, phi, np.sqrt(c / determinant))
