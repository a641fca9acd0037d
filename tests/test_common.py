"""The order of training: every pass complete, rows of like length together, the same for everyone."""

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from stages.common import BUCKET, training_order


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 40), st.integers(0, 9))
def test_an_order_fills_every_step_and_uses_each_row_equally_often(
    lengths: list[int], rows: int, steps: int, seed: int
) -> None:
    order = training_order(lengths, rows, steps, seed)
    assert len(order) == rows * steps
    counts = Counter(order)
    assert set(counts) <= set(range(len(lengths)))
    uses = [counts[row] for row in range(len(lengths))]
    assert max(uses) - min(uses) <= 1
    assert order == training_order(lengths, rows, steps, seed)


def test_rows_of_like_length_come_in_one_step() -> None:
    lengths = random.Random(5).choices(range(1, 101), k=BUCKET * 8 * 3)
    order = training_order(lengths, 8, BUCKET * 3, seed=1)
    padded = sum(8 * max(lengths[row] for row in order[i : i + 8]) for i in range(0, len(order), 8))
    assert sum(lengths) <= padded < 1.1 * sum(lengths)  # in a random order it would be about 1.8 times


def test_steps_of_a_bucket_are_not_sorted_by_length() -> None:
    order = training_order(list(range(BUCKET * 4)), 4, BUCKET, seed=3)
    firsts = order[::4]
    assert firsts != sorted(firsts)
    assert sorted(order) == list(range(BUCKET * 4))


def test_another_seed_gives_another_order() -> None:
    assert training_order([1] * 50, 5, 10, seed=1) != training_order([1] * 50, 5, 10, seed=2)
