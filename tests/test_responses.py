"""Behaviour of responses by hand; win rates and length control on judges whose nature is known."""

import numpy as np
import pytest
import torch

from evaluation.responses import Response, _verdict, behaviour, compare_behaviour, distinct, repetition, win_rate
from rlhf.functional.intervals import Estimate
from rlhf.functional.length_control import APART_SCALE, PHI_SCALE, THETA_SCALE, fit_length_control


def test_behaviour_by_hand() -> None:
    answers = [
        [Response("a b c d a b c d", 9, True, 1.0, 0.5), Response("a b", 3, False, 3.0, 0.5)],
        [Response("", 1, True, 2.0, 1.0), Response("x y z", 3, True, 2.0, 0.0)],
        [],  # a prompt that didn't fit
    ]
    found = behaviour(answers)
    assert (found["prompts"], found["responses"], found["empty"]) == (3, 4, 1)
    assert (found["ended"], found["tokens"], found["tokens_median"]) == (0.75, 4.0, 3.0)
    assert (found["score"], found["gold"]) == (2.0, 0.5)
    assert found["repetition"] == pytest.approx((1 - 4 / 5) / 4)  # abcd bcda cdab dabc abcd: one of five again
    assert (found["distinct_1"], found["distinct_2"]) == (4 / 8, round(4 / 7, 4))  # of the first responses alone
    assert repetition("a b c") == 0.0 and distinct([[]], 2) == 1.0


def test_behaviours_are_compared_prompt_by_prompt() -> None:
    def side(*lengths: int, gold: float | None) -> list[list[Response]]:
        return [[Response("x", n, True, float(n), gold), Response("x", n + 2, False, 0.0, 1.0)] for n in lengths]

    found = compare_behaviour([*side(4, 6, 11, gold=None), []], side(1, 3, 8, 5, gold=1.0))
    assert (found["tokens"], found["tokens_ci95"]) == (3.0, [3.0, 3.0])  # the same for every prompt
    assert (found["prompts"], found["ended"], found["score"]) == (3, 0.0, 1.5)
    assert "gold" not in found  # not known of all


def test_win_rate_by_hand() -> None:
    first = [[Response("aa", 1, True, 1.0)], [Response("aa", 1, True, 1.0)], [Response("a", 1, True, 0.0)], []]
    second = [[Response("bb", 1, True, 0.0)], [Response("bb", 1, True, 1.0)], [Response("b", 1, True, 5.0)]]
    found = win_rate(first, [*second, [Response("b", 1, True, 0.0)]])
    assert (found["prompts"], found["pairs"], found["ties"], found["win_rate"]) == (3, 3, 1, 0.5)
    assert found["longer_preferred"] is None  # all are equally long
    assert found["length_controlled_win_rate"] == pytest.approx(0.5, abs=0.01)
    assert found["verdict"] == "no clear difference"


def simulated(
    quality: float,
    liking: float,
    longer: float,
    prompts: int = 150,
    noise: float = 1.0,
    seed: int = 0,
    responses: int = 2,
    uneven: float = 0.0,
) -> tuple[list[list[Response]], list[list[Response]]]:
    """Two models: the first is better by `quality` and writes `longer` more; 20 characters are worth `liking`.

    By how much it is better differs from prompt to prompt by a standard deviation of `uneven`.
    """
    generator = np.random.default_rng(seed)
    sides = []
    for better, length in (
        (quality + uneven * np.random.default_rng([seed, 1]).normal(size=prompts), 60 + longer),
        (np.zeros(prompts), 60),
    ):
        side = []
        for at in better:
            sizes = np.maximum(1, generator.normal(length, 20, responses)).astype(int)
            scores = at + liking * sizes / 20 + noise * generator.logistic(size=responses)
            side.append([Response("x" * n, n, True, float(s)) for n, s in zip(sizes, scores, strict=True)])
        sides.append(side)
    return sides[0], sides[1]


def test_a_judge_that_likes_length_is_caught() -> None:
    for noise in (0.0, 1.0):
        found = win_rate(*simulated(0, liking=1, longer=40, noise=noise))
        assert found["win_rate_ci95"][0] > 0.65
        low, high = found["length_controlled_win_rate_ci95"]
        assert low < 0.5 < high
        assert found["longer_preferred"] > 0.65
        assert found["verdict"].endswith("length explains the difference; the judge prefers longer responses")


def test_quality_survives_length_control() -> None:
    """A better model that writes more, and a judge that doesn't care: the win rate stays, nobody is accused."""
    found = win_rate(*simulated(1.5, liking=0, longer=40))
    assert found["length_controlled_win_rate"] == pytest.approx(found["win_rate"], abs=0.06)
    assert found["longer_preferred_ci95"][0] < 0.5 < found["longer_preferred_ci95"][1]
    assert found["verdict"] == "preferred"
    assert win_rate(*simulated(-1.5, liking=0, longer=40))["verdict"] == "not preferred"


def test_what_length_hides_is_found() -> None:
    found = win_rate(*simulated(2.0, liking=1, longer=-44))
    assert found["win_rate"] < 0.6
    assert found["length_controlled_win_rate_ci95"][0] > 0.7
    hidden = "no clear difference as it is, preferred at equal lengths: length hides the difference"
    assert found["verdict"] == f"{hidden}; the judge prefers longer responses"


def test_a_liking_for_length_is_told_from_quality_with_one_response_to_a_prompt() -> None:
    """Where the better model is the longer one, most pairs are won by the longer response, whatever the judge likes."""
    for longer in (20, -20, 0):
        fair = win_rate(*simulated(2.0, liking=0, longer=longer, responses=1, prompts=400, seed=1))
        low, high = fair["longer_preferred_ci95"]
        assert low < 0.5 < high and fair["verdict"] == "preferred"
        taken = win_rate(*simulated(2.0, liking=1, longer=longer, responses=1, prompts=400, seed=1))
        assert taken["longer_preferred_ci95"][0] > 0.5
        assert taken["verdict"].endswith("the judge prefers longer responses")
    always = win_rate(*simulated(0, liking=1, longer=300, responses=1))
    assert always["win_rate"] == 1.0 and always["longer_preferred"] is None  # nobody knows


def test_differences_of_length_that_are_all_alike_may_be_all_there_is() -> None:
    """A judge that counts characters, and a model that always writes ten more."""
    first, second = ([[Response("x" * n, n, True, float(n))] for _ in range(50)] for n in (30, 20))
    found = win_rate(first, second)
    low, high = found["length_controlled_win_rate_ci95"]
    assert found["win_rate"] == 1.0 and low < 0.5 < high
    told = "preferred as it is, no clear difference at equal lengths: too few responses to tell length from quality"
    assert found["verdict"] == told


@pytest.mark.parametrize(
    ("rate", "controlled", "longer", "verdict"),
    [
        (0.9, 0.8, 0.9, "preferred; the judge prefers longer responses"),
        (0.1, 0.2, 0.2, "not preferred; the judge prefers shorter responses"),
        (0.9, 0.5, 0.9, "length explains the difference; the judge prefers longer responses"),
        (0.9, 0.1, 0.9, "preferred as it is, not preferred at equal lengths: length explains the difference"),
        (0.5, 0.1, 0.9, "no clear difference as it is, not preferred at equal lengths: length hides the difference"),
        (0.9, 0.5, 0.5, "too few responses to tell length from quality"),
        (0.9, 0.5, None, "too few responses to tell length from quality"),
        (0.62, 0.65, 0.9, "no clear difference at equal lengths: too few responses to tell length from quality"),
    ],
)
def test_the_verdict_in_words(rate: float, controlled: float, longer: float | None, verdict: str) -> None:
    """With intervals of 0.1 to both sides; at 0.62 and equal lengths of 0.2."""
    half = 0.2 if rate == 0.62 else 0.1
    found = _verdict(
        Estimate(rate, rate - 0.1, rate + 0.1),
        Estimate(controlled, controlled - half, controlled + half),
        Estimate(longer, longer - 0.1, longer + 0.1) if longer is not None else None,
    )
    assert verdict in found


def test_nothing_can_be_said_where_every_win_may_be_length() -> None:
    found = win_rate(*simulated(0, liking=1, longer=200, noise=0.0))
    low, high = found["length_controlled_win_rate_ci95"]
    assert found["win_rate"] == 1.0 and low < 0.1 and high > 0.9


def test_the_interval_covers_the_truth() -> None:
    """Of 60 worlds in which the judge likes length and both models are equally good, about 95 % hold 0.5."""
    covered = 0
    for seed in range(60):
        low, high = win_rate(*simulated(0, liking=0.5, longer=20, prompts=60, seed=seed))[
            "length_controlled_win_rate_ci95"
        ]
        covered += low <= 0.5 <= high
    assert covered >= 52  # less than 1 in 1,000 with 95 %


def test_models_that_are_better_on_different_prompts_are_not_pushed_apart() -> None:
    """Their wins hang less on length than those of two responses of one model, whose slope is steeper."""
    shares = [
        win_rate(*simulated(0, liking=3, longer=40, uneven=4, prompts=100, seed=seed))["length_controlled_win_rate"]
        for seed in range(20)
    ]
    assert abs(np.mean(shares) - 0.5) < 0.05  # of one such world 0.08; with one slope for all it was 0.09 off


def test_the_fit_is_the_optimum_that_torch_finds() -> None:
    generator = np.random.default_rng(1)
    n = 80
    longer, between = generator.normal(5, 20, n), generator.random(n) < 0.6
    wins = generator.choice([0.0, 0.5, 1.0], n)
    weights = generator.integers(0, 4, (3, n)).astype(float)
    fitted = fit_length_control(wins, longer, between, weights)
    size = 3 * (longer**2).mean() ** 0.5
    x, one, won = (torch.tensor(values, dtype=torch.float64) for values in (3 * np.tanh(longer / size), between, wins))
    for row in range(3):
        weight = torch.tensor(weights[row])

        def loss(at: torch.Tensor, weight: torch.Tensor = weight) -> torch.Tensor:
            logits = torch.where(one == 1, at[0] + at[1] * x, at[2] * x)
            each = torch.nn.functional.binary_cross_entropy_with_logits(logits, won, weight, reduction="sum")
            apart = (at[0] / THETA_SCALE, at[2] / PHI_SCALE, (at[1] - at[2]) / APART_SCALE)
            return each + sum(distance**2 / 2 for distance in apart)

        at = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [at], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
        )

        def closure(at: torch.Tensor = at, optimiser: torch.optim.LBFGS = optimiser) -> float:
            optimiser.zero_grad()
            value = loss(at)
            value.backward()
            return float(value.detach())

        optimiser.step(closure)
        assert [column[row] for column in fitted[:3]] == pytest.approx(at.tolist(), abs=1e-6)
        curvature = torch.autograd.functional.hessian(loss, at.detach())
        assert fitted.deviation[row] == pytest.approx(float(curvature.inverse()[0, 0]) ** 0.5, rel=1e-6)
