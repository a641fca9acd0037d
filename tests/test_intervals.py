"""Means and shares with their sampling error, against published values, exact sums and arithmetic by hand."""

import math
from statistics import NormalDist

import pytest

from rlhf.functional.intervals import (
    Estimate,
    clustered_estimate,
    mean_estimate,
    proportion_estimate,
    ratio_estimate,
    sign_test,
)

Z = NormalDist().inv_cdf(0.975)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (1, 1, 0.2065, 1),
    ],
)
def test_wilson_intervals_of_the_literature(right: int, n: int, low: float, high: float) -> None:
    assert proportion_estimate(right, n) == pytest.approx((right / n, low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "n"), [(3, 7), (0.5, 4), (199, 200)])
def test_wilsons_bounds_are_the_shares_that_the_score_test_just_accepts(right: float, n: int) -> None:
    for bound in proportion_estimate(right, n)[1:]:
        assert abs(right / n - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / n), rel=1e-9)


@pytest.mark.parametrize(("n", "truth"), [(50, 0.3), (200, 0.9), (30, 0.5)])
def test_wilsons_interval_covers_the_truth_about_95_times_in_100(n: int, truth: float) -> None:
    covered = math.fsum(
        math.comb(n, k) * truth**k * (1 - truth) ** (n - k)
        for k in range(n + 1)
        if proportion_estimate(k, n).low <= truth <= proportion_estimate(k, n).high
    )
    assert 0.93 <= covered <= 0.97


def test_a_share_never_leaves_0_to_1() -> None:
    for n in range(1, 60):
        for right in range(n + 1):
            found = proportion_estimate(right, n)
            assert 0.0 <= found.low <= found.mean + 1e-12
            assert found.mean - 1e-12 <= found.high <= 1.0


def test_mean_by_hand() -> None:
    # 1, 2, 3, 6: mean 3; squared deviations 4 + 1 + 0 + 9 = 14, variance 14/3, standard error sqrt(14/12) = 1.0801
    assert mean_estimate([1, 2, 3, 6]) == pytest.approx((3.0, 3 - 1.959964 * 1.0801234, 3 + 1.959964 * 1.0801234))


def test_ratio_by_hand() -> None:
    # (1 + 5) / (1 + 2) = 2; residuals 1 - 2*1 = -1 and 5 - 2*2 = 1; sqrt(2/1 * (1 + 1)) / 3 = 2/3
    assert ratio_estimate([1, 5], [1, 2]) == pytest.approx((2.0, 2 - 1.959964 * 2 / 3, 2 + 1.959964 * 2 / 3))


def test_a_ratio_divides_the_sums_and_does_not_average_the_ratios() -> None:
    assert ratio_estimate([1.0, 30.0], [1.0, 10.0]).mean == pytest.approx(31 / 11)


def test_groups_that_all_have_the_same_ratio_leave_no_doubt() -> None:
    assert ratio_estimate([2, 4, 10], [1, 2, 5]) == pytest.approx((2.0, 2.0, 2.0))


def test_a_group_without_weight_changes_nothing_about_the_ratio() -> None:
    assert ratio_estimate([1, 5, 0], [1, 2, 0]).mean == 2.0


def test_values_that_are_the_same_in_each_group_count_once_a_group() -> None:
    # k of m groups right, two alike in each: the mean's variance is p (1 - p) / (m - 1)
    assert clustered_estimate([[1, 1]] * 15 + [[0, 0]] * 5) == pytest.approx(proportion_estimate(14.25, 19))
    for right in (0, 1):  # no variance is seen; each group is a trial
        assert clustered_estimate([[right] * 2] * 30) == pytest.approx(proportion_estimate(30 * right, 30))


def test_groups_of_one_are_worth_a_trial_less_than_single_values() -> None:
    assert clustered_estimate([[1]] * 6 + [[0]] * 4) == pytest.approx(proportion_estimate(5.4, 9))


def test_an_interval_of_few_groups_is_never_empty() -> None:
    for groups in ([[1]], [[0, 0, 0]], [[1, 1, 0]], [[1, 1], [1]], [[1, 1, 0], [1, 0, 1]], [[0.5], [0.5, 0.5]]):
        found = clustered_estimate(groups)
        assert 0 <= found.low < found.mean + 1e-12
        assert found.mean - 1e-12 < found.high <= 1
        assert found.high - found.low > 0.5, groups


@pytest.mark.parametrize("truth", [0.5, 0.7, 0.95])
def test_a_clustered_interval_covers_the_truth_about_95_times_in_100(truth: float) -> None:
    """Groups of four that are all alike, 40 of them: as if each were thrown once."""
    covered = math.fsum(
        math.comb(40, k) * truth**k * (1 - truth) ** (40 - k)
        for k in range(41)
        for found in [clustered_estimate([[1] * 4] * k + [[0] * 4] * (40 - k))]
        if found.low <= truth <= found.high
    )
    assert 0.92 <= covered <= 0.985


def test_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean_estimate([])
    with pytest.raises(ValueError, match="no trials"):
        proportion_estimate(0, 0)
    with pytest.raises(ValueError, match="no groups"):
        ratio_estimate([], [])
    with pytest.raises(ValueError, match="no groups"):
        ratio_estimate([1.0], [0.0])


def test_summaries_have_the_figure_and_its_interval() -> None:
    found = Estimate(0.123456, 0.1, 0.15).as_keys("accuracy", 4)
    assert found == {"accuracy": 0.1235, "accuracy_ci95": [0.1, 0.15]}


def test_the_sign_test_by_hand() -> None:
    assert sign_test([]) == sign_test([0.0, 0.0]) == sign_test([1.0, -1.0]) == 1.0
    assert sign_test([1.0, 1.0, 1.0, 0.0]) == 0.25  # two of the eight ways in which three coins fall
    assert sign_test([1.0] * 9 + [-1.0]) == sign_test([-1.0] * 9 + [1.0]) == pytest.approx(22 / 1024)
