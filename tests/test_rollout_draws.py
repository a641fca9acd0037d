"""Drawing tokens and finding stop strings, against naive loops and constants."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from rlhf.rollout import Drawing, cut_at_stop, uniforms
from rlhf.rollout.draws import BLOCK, draw_tokens, restrict
from rlhf.rollout.stop import StopWatch


def test_the_draws_of_an_episode_do_not_depend_on_its_neighbours() -> None:
    whole = uniforms(7, 2, range(10), 6)
    np.testing.assert_array_equal(uniforms(7, 2, [4], 6)[0], whole[4])
    np.testing.assert_array_equal(uniforms(7, 2, [9, 1], 6), whole[[9, 1]])
    assert not np.array_equal(uniforms(7, 3, [4], 6)[0], whole[4])
    assert not np.array_equal(uniforms(8, 2, [4], 6)[0], whole[4])
    assert whole.min() >= 0.0
    assert whole.max() < 1.0
    assert uniforms(7, 2, [], 6).shape == (0, 6)


def test_tokens_are_drawn_in_proportion_to_their_probability() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    n = 100_000
    draws = torch.from_numpy(np.random.default_rng(0).random(n))
    tokens, logprobs, _ = draw_tokens(logits.expand(n, -1), draws, Drawing(1, temperature=0.5))
    expected = (logits / 0.5).softmax(-1)
    share = torch.bincount(tokens, minlength=4) / n
    torch.testing.assert_close(share, expected, atol=0.005, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


@pytest.mark.parametrize("vocabulary", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_a_draw_is_the_token_at_which_the_cumulative_probability_passes_it(vocabulary: int) -> None:
    random = np.random.default_rng(vocabulary)
    logits = torch.from_numpy(random.normal(0, 3, (60, vocabulary)).astype(np.float32))
    draws = random.random(60)
    tokens, logprobs, _ = draw_tokens(logits, torch.from_numpy(draws), Drawing(1))
    for row, draw, token, logprob in zip(logits.double(), draws, tokens.tolist(), logprobs.tolist(), strict=True):
        shares = [math.exp(x) for x in row.tolist()]
        reached = np.cumsum(shares) / math.fsum(shares)
        assert token == int(np.sum(reached <= draw))
        assert logprob == pytest.approx(math.log(shares[token] / math.fsum(shares)), abs=1e-5)


@pytest.mark.parametrize("draw", [0.0, 0.3, 0.5, 1.0 - 1e-12, 1.0 - 2.0**-53])
def test_a_token_of_probability_zero_is_never_drawn(draw: float) -> None:
    for places in ([1, 3], [0], [2 * BLOCK + 5], [BLOCK - 1, BLOCK], [7, 3 * BLOCK - 1]):
        logits = torch.full((1, 4 * BLOCK), float("-inf"))
        logits[0, places] = torch.linspace(0, 1, len(places))
        token, logprob, _ = draw_tokens(logits, torch.tensor([draw], dtype=torch.float64), Drawing(1))
        assert token.item() in places
        assert logprob.item() > -2


def test_neighbours_in_the_batch_change_no_draw() -> None:
    random = np.random.default_rng(3)
    logits = torch.from_numpy(random.normal(0, 2, (33, 1000)).astype(np.float32))
    draws = torch.from_numpy(random.random(33))
    whole = draw_tokens(logits, draws, Drawing(1, top_p=0.9))
    for rows in ([5], [32, 0, 7]):
        alone = draw_tokens(logits[rows], draws[rows], Drawing(1, top_p=0.9))
        assert torch.equal(alone.tokens, whole.tokens[rows])
        assert torch.equal(alone.logprobs, whole.logprobs[rows])


def test_bfloat16_logits_give_float32_logprobs_and_float64_ones_float64() -> None:
    draws = torch.tensor([0.4], dtype=torch.float64)
    for given_, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        drawn = draw_tokens(torch.tensor([[1.0, 2.0, 0.5]], dtype=given_), draws, Drawing(1))
        assert drawn.logprobs.dtype == expected
        total = math.fsum(math.exp(x) for x in (1.0, 2.0, 0.5))
        assert float(drawn.logprobs) == pytest.approx(2.0 - math.log(total), abs=1e-6)


def test_a_ban_holds_in_its_rows_alone() -> None:
    logits = torch.tensor([[5.0, 0.0, 1.0], [5.0, 0.0, 1.0]])
    ban = torch.tensor([True, False]), torch.tensor([0])
    tokens, logprobs, _ = draw_tokens(logits, torch.tensor([0.9, 0.9], dtype=torch.float64), Drawing(1), ban)
    assert tokens.tolist() == [2, 0]
    expected = [-math.log(1 + math.exp(-1)), -math.log(1 + math.exp(-5) + math.exp(-4))]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-6)
    assert logits[0, 0] == 5.0  # the model's own are left as they are


# What can be drawn


def naive_support(scores: Sequence[float], top_k: int, top_p: float) -> set[int]:
    """The most likely tokens one by one, and those as likely as the last."""
    order = sorted((i for i, x in enumerate(scores) if x > -math.inf), key=lambda i: -scores[i])
    if top_k:
        order = order[:top_k]
    top = scores[order[0]]
    weights = [math.exp(scores[i] - top) for i in order]
    reached, count = 0.0, 0
    while count < len(order) and (count == 0 or top_p == 1.0 or reached < top_p):
        reached += weights[count] / math.fsum(weights)
        count += 1
    return {i for i, x in enumerate(scores) if x >= scores[order[count - 1]] and x > -math.inf}


@given(
    st.lists(st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 0.3, 1.0, 1.7, 4.0]), min_size=1, max_size=12),
    st.integers(0, 14),
    st.sampled_from([0.05, 0.33, 0.61, 0.92, 1.0]),
)
def test_the_support_is_that_of_a_naive_loop(scores: list[float], top_k: int, top_p: float) -> None:
    if max(scores) == -math.inf:
        scores[0] = 0.0
    found = restrict(torch.tensor([scores], dtype=torch.float64), top_k, top_p)
    assert set(found[0].nonzero()[:, 0].tolist()) == naive_support(scores, top_k, top_p)


def test_top_k_and_top_p_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    assert restrict(scores, 2, 1.0).tolist() == [[False, True, False, True]]
    assert restrict(scores, 0, 0.69).tolist() == [[False, True, False, True]]
    assert restrict(scores, 0, 0.71).tolist() == [[False, True, True, True]]
    assert restrict(scores, 3, 0.44).tolist() == [[False, True, False, False]]  # 0.4 is 0.444 of the three
    assert restrict(scores, 0, 1e-9).tolist() == [[False, True, False, False]]


def test_logprobs_normalise_over_what_can_be_drawn() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    drawing = Drawing(1, top_k=3)
    for draw, token, share in ((0.0, 1, 4 / 9), (0.5, 2, 2 / 9), (0.99, 3, 3 / 9)):
        drawn = draw_tokens(logits, torch.tensor([draw], dtype=torch.float64), drawing)
        assert drawn.tokens.item() == token
        assert float(drawn.logprobs) == pytest.approx(math.log(share), abs=1e-6)


# Stop strings


def test_cut_at_stop_takes_what_stands_before_the_first() -> None:
    assert cut_at_stop("one\nUser: two", ["User:", "\n"]) == "one"
    assert cut_at_stop("one User: two\n", ["\n", "User:"]) == "one "
    assert cut_at_stop("nothing", ["User:"]) == "nothing"
    assert cut_at_stop("User:", ["User:"]) == ""
    assert cut_at_stop("all", []) == "all"


def found_at(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: list[str]) -> list[bool]:
    """After each token, by decoding everything."""
    texts = [tokenizer.decode(ids[: end + 1], skip_special_tokens=True) for end in range(len(ids))]
    return [any(each in text for each in stop) for text in texts]


TEXTS = ["the answer is 你好 and héllo — 🙂 done\n\nUser: what", "aaaaaaaaaaaaaaaaaaaaaaaaaaaab", "你" * 20 + "好 ok"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", [["User:"], ["好"], ["好 a", "ok"], ["🙂"], ["ab"], ["\n\n"], ["é"], ["nowhere"]])
def test_a_stop_string_is_found_with_the_token_that_completes_it(
    tokenizer: PreTrainedTokenizerBase, text: str, stop: list[str]
) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    watch = StopWatch(tokenizer, stop)
    assert [watch.add(token) for token in ids] == found_at(tokenizer, ids, stop)


@given(st.lists(st.integers(0, 383), min_size=1, max_size=120), st.integers(0, 100), st.integers(1, 6))
def test_a_stop_string_is_found_among_any_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, length: int
) -> None:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    begin = start % max(len(text), 1)
    stop = text[begin : begin + length].replace("\ufffd", "") or "x"  # half a character is no text
    watch = StopWatch(tokenizer, [stop])
    assert [watch.add(token) for token in ids] == found_at(tokenizer, ids, [stop])


def test_the_work_for_a_token_does_not_grow(tokenizer: PreTrainedTokenizerBase) -> None:
    watch = StopWatch(tokenizer, ["never this"])
    ids = tokenizer("many words, " * 200, add_special_tokens=False)["input_ids"]
    longest = 0
    for token in ids:
        watch.add(token)
        longest = max(longest, len(watch._window))
    assert longest < 60 < len(ids)
