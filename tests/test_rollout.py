"""The engine against plain forward passes, whatever else is drawn beside a response."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig, PreTrainedModel, Qwen3Config

from rlhf.model import build_causal_lm
from rlhf.rollout import CacheEngine, Response, draw_tokens, uniforms

VOCABULARY, END, PAD = 40, 3, 0
PROMPTS = [[1, 5, 6], [1, 9], [1, 7, 8, 9, 10, 11], [1, 20, 21, 22], [1, 30]]


@pytest.fixture(params=["llama", "qwen3", "qwen3 local", "gpt2"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": 1}
    if request.param == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, **common)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        kind = LlamaConfig if request.param == "llama" else Qwen3Config
        extra: dict[str, Any] = {} if request.param == "llama" else {"head_dim": 16}
        if request.param == "qwen3 local":
            extra |= {"use_sliding_window": True, "sliding_window": 3}
            extra["layer_types"] = ["sliding_attention", "full_attention"]
        config = kind(num_key_value_heads=2, initializer_range=0.3, **sizes, **common, **extra)
    return build_causal_lm(config).eval()


def engine(model: PreTrainedModel, batch_size: int = 8, max_tokens: int = 12, temperature: float = 0.8) -> CacheEngine:
    return CacheEngine(
        model, end_ids=[END], pad_id=PAD, max_tokens=max_tokens, temperature=temperature, batch_size=batch_size
    )


@torch.no_grad()
def naive(model: PreTrainedModel, prompt: list[int], draws: np.ndarray, temperature: float) -> Response:
    """One prompt at a time, the whole sequence through the model for every token, no cache, float64 sampling."""
    ids: list[int] = []
    logprobs: list[float] = []
    for draw in draws:
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1].double() / temperature
        probabilities = logits.softmax(-1)
        cumulative, token = 0.0, VOCABULARY - 1
        for candidate, probability in enumerate(probabilities.tolist()):
            cumulative += probability
            if draw < cumulative:
                token = candidate
                break
        ids.append(token)
        logprobs.append(float(probabilities[token].log()))
        if token == END:
            return Response(ids, logprobs, True)
    return Response(ids, logprobs, False)


def test_responses_equal_those_of_a_naive_loop(model: PreTrainedModel) -> None:
    draws = uniforms(1, 0, range(len(PROMPTS)), 12)
    found = engine(model).generate(PROMPTS, draws)
    for prompt, row, response in zip(PROMPTS, draws, found, strict=True):
        expected = naive(model, prompt, row, 0.8)
        assert response.ids == expected.ids
        assert response.ended == expected.ended
        assert response.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_some_responses_end_early_so_that_rows_really_leave_the_batch(model: PreTrainedModel) -> None:
    found = engine(model, max_tokens=30).generate(PROMPTS * 6, uniforms(2, 0, range(30), 30))
    assert len({len(response.ids) for response in found}) > 3
    for response in found:
        assert (END in response.ids) == response.ended
        assert END not in response.ids[:-1]
        assert response.ended or len(response.ids) == 30


def test_batch_size_and_order_change_nothing(model: PreTrainedModel) -> None:
    prompts = PROMPTS * 3
    draws = uniforms(3, 5, range(len(prompts)), 12)
    whole = engine(model, batch_size=64).generate(prompts, draws)
    for size in (1, 4):
        assert [r.ids for r in engine(model, batch_size=size).generate(prompts, draws)] == [r.ids for r in whole]
    order = list(reversed(range(len(prompts))))
    turned = engine(model).generate([prompts[i] for i in order], draws[order])
    assert [r.ids for r in turned] == [whole[i].ids for i in order]


def test_the_draws_of_an_episode_do_not_depend_on_its_neighbours() -> None:
    whole = uniforms(7, 2, range(10), 6)
    np.testing.assert_array_equal(uniforms(7, 2, [4], 6)[0], whole[4])
    np.testing.assert_array_equal(uniforms(7, 2, [9, 1], 6), whole[[9, 1]])
    assert not np.array_equal(uniforms(7, 3, [4], 6)[0], whole[4])
    assert not np.array_equal(uniforms(8, 2, [4], 6)[0], whole[4])
    assert whole.min() >= 0.0
    assert whole.max() < 1.0


def test_tokens_are_drawn_in_proportion_to_their_probability() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    n = 100_000
    tokens, logprobs = draw_tokens(logits.expand(n, -1), torch.from_numpy(np.random.default_rng(0).random(n)), 0.5)
    expected = (logits / 0.5).softmax(-1)
    share = torch.bincount(tokens, minlength=4) / n
    torch.testing.assert_close(share, expected, atol=0.005, rtol=0)
    torch.testing.assert_close(logprobs, expected.log()[tokens])


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(3, -1)
    tokens, _ = draw_tokens(logits, torch.tensor([0.0, 0.5, 1.0 - 1e-12], dtype=torch.float64), 1.0)
    assert set(tokens.tolist()) <= {1, 3}
