"""The engines against plain forward passes, whatever else is drawn beside a response."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.errors import StageFailed, UserError
from rlhf.rollout import CacheEngine, Drawing, Engine, Response, build_engine, uniforms
from rlhf.rollout.build import EngineKind

VOCABULARY = 384  # the tokenizer's
ENDS = (4, *range(300, 330))  # so many that responses end at different places
PROMPTS = [[1, 50, 60], [1, 90], [1, 70, 80, 90, 10, 11], [1, 200, 201, 202], [30]]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
WINDOW = {"sliding_window": 3}
MIXED = {**WINDOW, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "llama eager": {"model_type": "llama", **GROUPED, "attn_implementation": "eager"},
    "qwen3": {"model_type": "qwen3", **GROUPED},
    "qwen3 local": {"model_type": "qwen3", **GROUPED, **MIXED},
    "mistral": {"model_type": "mistral", **GROUPED, **WINDOW},  # local everywhere
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
HYBRID: dict[str, Any] = {
    "model_type": "qwen3_next",
    **GROUPED,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 0,
}
KINDS: tuple[EngineKind, ...] = ("cache", "generate")


def make(model_type: str, attn_implementation: str = "sdpa", **sizes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "pad_token_id": 2, "eos_token_id": 4, "bos_token_id": 1}
    config = AutoConfig.for_model(model_type, initializer_range=0.3, **common, **sizes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    return model.eval()


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make(**MODELS[request.param])


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make(**MODELS["llama"])


@pytest.fixture(scope="module")
def hybrid() -> PreTrainedModel:
    return make(**HYBRID)


class Build:
    """Engines with our tokenizer and end tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, model: PreTrainedModel, drawing: Drawing, kind: EngineKind = "cache", **more: Any) -> Engine:
        return build_engine(model, self.tokenizer, drawing, end_ids=ENDS, kind=kind, **more)


@pytest.fixture(scope="module")
def build(tokenizer: PreTrainedTokenizerBase) -> Build:
    return Build(tokenizer)


# A naive loop


def naive_kept(logits: Tensor, drawing: Drawing, banned: bool) -> tuple[list[int], list[float]]:
    """The ids that can be drawn, rising, and their probabilities: one after the other, the most likely first."""
    scores = {i: x / drawing.temperature for i, x in enumerate(logits.tolist()) if not (banned and i in ENDS)}
    order = sorted(scores, key=lambda i: -scores[i])[: drawing.top_k or None]
    weights = {i: math.exp(scores[i] - scores[order[0]]) for i in order}
    whole, reached, kept = math.fsum(weights.values()), 0.0, []
    for i in order:
        if reached < drawing.top_p or drawing.top_p == 1.0:
            kept.append(i)
        reached += weights[i] / whole
    total = math.fsum(weights[i] for i in kept)
    return sorted(kept), [weights[i] / total for i in sorted(kept)]


@torch.no_grad()
def naive(
    model: PreTrainedModel,
    prompt: list[int],
    draws: np.ndarray,
    drawing: Drawing,
    tokenizer: PreTrainedTokenizerBase,
) -> Response:
    """One prompt at a time, the whole sequence through the model for every token, no cache, no padding."""
    ids: list[int] = []
    logprobs: list[float] = []
    supports: list[np.ndarray] = []
    ended = False
    for place, draw in enumerate(draws.tolist()):
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1].double()
        kept, shares = naive_kept(logits, drawing, banned=place < drawing.min_tokens - 1)
        supports.append(np.array(kept, dtype=np.int32))
        chosen = next((n for n, reached in enumerate(np.cumsum(shares)) if draw < reached), len(kept) - 1)
        ids.append(kept[chosen])
        logprobs.append(math.log(shares[chosen]))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if len(ids) >= drawing.min_tokens and (ids[-1] in ENDS or any(stop in text for stop in drawing.stop)):
            ended = True
            break
    return Response(ids, logprobs, ended, supports if drawing.top_k or drawing.top_p < 1 else None)


def assert_alike(found: Response, expected: Response) -> None:
    assert found.ids == expected.ids
    assert found.ended == expected.ended
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert (found.kept is None) == (expected.kept is None)
    for mine, theirs in zip(found.kept or (), expected.kept or (), strict=True):
        assert mine.dtype == np.int32
        np.testing.assert_array_equal(mine, theirs)


DRAWINGS = {
    "plain": Drawing(12, temperature=0.8),
    "top-k": Drawing(12, temperature=1.3, top_k=20),
    "top-p": Drawing(12, top_p=0.7),
    "top-k and top-p": Drawing(12, top_k=30, top_p=0.8, min_tokens=3),
    "min_tokens": Drawing(12, min_tokens=7),
    "stop": Drawing(12, stop=("e", "th", "你")),
    "stop after min_tokens": Drawing(12, stop=("e", "a"), min_tokens=5),
}


@pytest.mark.parametrize("drawing", DRAWINGS.values(), ids=list(DRAWINGS))
def test_responses_equal_those_of_a_naive_loop(model: PreTrainedModel, build: Build, drawing: Drawing) -> None:
    prompts = PROMPTS * 2
    draws = uniforms(2, 0, range(len(prompts)), 12)  # of seed 1, one lies within rounding of the border of two tokens
    # three rows at a time, so that prompts wait and take the places of those that are over
    engines = [build(model, drawing, kind, batch_size=3).generate(prompts, draws) for kind in KINDS]
    for prompt, row, ours, theirs in zip(prompts, draws, *engines, strict=True):
        expected = naive(model, prompt, row, drawing, build.tokenizer)
        assert_alike(ours, expected)
        assert_alike(theirs, expected)


def test_a_model_with_other_states_than_keys_and_values_is_run_by_generate(
    hybrid: PreTrainedModel, build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing = Drawing(8, top_p=0.9)
    draws = uniforms(1, 0, range(5), 8)
    found = build(hybrid, drawing, "auto", batch_size=2).generate(PROMPTS, draws)
    for prompt, row, response in zip(PROMPTS, draws, found, strict=True):
        assert_alike(response, naive(hybrid, prompt, row, drawing, build.tokenizer))
    build(hybrid, drawing, "auto")
    said = capsys.readouterr().out
    assert said.count("LinearAttention") == 1  # once, and not for each engine
    with pytest.raises(UserError, match="engine `cache` can't run Qwen3Next"):
        build(hybrid, drawing, "cache")


def test_it_draws_under_autocast(model: PreTrainedModel, build: Build) -> None:
    drawing = Drawing(12)
    engine = build(model, drawing, "cache", batch_size=3)
    with torch.autocast("cpu", torch.bfloat16):
        found = engine.generate(PROMPTS, uniforms(3, 5, range(len(PROMPTS)), 12))
        for prompt, response in zip(PROMPTS, found, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + response.ids])).logits[0, len(prompt) - 1 : -1].float()
            expected = logits.log_softmax(-1)[range(len(response.ids)), response.ids]
            torch.testing.assert_close(torch.tensor(response.logprobs), expected, atol=0.15, rtol=0)


# What is drawn beside a response changes nothing


def test_batch_size_and_order_change_nothing(model: PreTrainedModel, build: Build) -> None:
    drawing = Drawing(12, temperature=0.8)
    prompts = PROMPTS * 3
    draws = uniforms(3, 5, range(len(prompts)), 12)
    whole = build(model, drawing, batch_size=64).generate(prompts, draws)
    for size in (1, 2, 4, 7):
        assert [r.ids for r in build(model, drawing, batch_size=size).generate(prompts, draws)] == [
            r.ids for r in whole
        ]
    order = list(reversed(range(len(prompts))))
    turned = build(model, drawing).generate([prompts[i] for i in order], draws[order])
    assert [r.ids for r in turned] == [whole[i].ids for i in order]
    few = build(model, drawing).generate([prompts[i] for i in (4, 9)], draws[[4, 9]])
    assert [r.ids for r in few] == [whole[4].ids, whole[9].ids]


class Passes:
    """Counts the forward passes of a model: rows and tokens of each."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.shapes: list[tuple[int, int]] = []
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    def __enter__(self) -> "Passes":
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def test_rows_that_are_over_give_their_places_to_waiting_prompts(llama: PreTrainedModel, build: Build) -> None:
    prompts = PROMPTS * 12
    engine = build(llama, Drawing(30), batch_size=8)
    with Passes(llama) as passes:
        found = engine.generate(prompts, uniforms(2, 0, range(60), 30))
    lengths = [len(response.ids) for response in found]
    assert len(set(lengths)) > 8  # ragged
    steps = [rows for rows, tokens in passes.shapes if tokens == 1]
    assert max(rows for rows, _ in passes.shapes) <= 8
    assert max(rows for rows, tokens in passes.shapes if tokens > 1) == 8
    work = sum(lengths) - len(lengths)  # the first tokens come from the prefill
    assert work <= sum(steps) <= 1.15 * work
    for response in found:
        assert response.ended == (response.ids[-1] in ENDS)
        assert not set(response.ids[:-1]) & set(ENDS)
        assert response.ended or len(response.ids) == 30


def test_what_all_prompts_begin_with_is_read_once(model: PreTrainedModel, build: Build) -> None:
    shared = [1, *(7 + 5 * n % 90 for n in range(33))]
    prompts = [[*shared, *prompt] for prompt in PROMPTS * 2]
    drawing = Drawing(8, temperature=0.8)
    draws = uniforms(2, 0, range(len(prompts)), 8)
    engine = build(model, drawing, batch_size=3)
    with Passes(model) as passes:
        found = engine.generate(prompts, draws)
    assert [rows for rows, tokens in passes.shapes if tokens >= len(shared)] == [1]
    for prompt, row, response in zip(prompts, draws, found, strict=True):
        assert_alike(response, naive(model, prompt, row, drawing, build.tokenizer))
    with Passes(model) as passes:  # too few to be worth it
        engine.generate([prompt[20:] for prompt in prompts], draws)
    assert (1, 14) not in passes.shapes
    with Passes(model) as passes:  # nobody to share it with
        engine.generate(prompts[:1], draws[:1])
    assert [tokens for _, tokens in passes.shapes if tokens > 1] == [len(prompts[0])]


def test_progress_is_told_how_many_are_over(llama: PreTrainedModel, build: Build) -> None:
    for kind in KINDS:
        told: list[int] = []
        build(llama, Drawing(20), kind, batch_size=4, progress=told.append).generate(
            PROMPTS * 4, uniforms(2, 0, range(20), 20)
        )
        assert told == sorted(set(told))
        assert told[-1] == 20
        assert len(told) > 3


def test_log_probabilities_are_those_of_one_plain_pass(model: PreTrainedModel, build: Build) -> None:
    drawing = Drawing(25, temperature=0.7, top_k=50, top_p=0.95)
    found = build(model, drawing, batch_size=4).generate(PROMPTS * 3, uniforms(4, 0, range(15), 25))
    for prompt, response in zip(PROMPTS * 3, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response.ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        for row, token, logprob, kept in zip(
            logits.double() / 0.7, response.ids, response.logprobs, response.kept or [], strict=True
        ):
            over_kept = row[kept.tolist()]
            assert float(over_kept.logsumexp(0)) < float(row.logsumexp(0))
            assert logprob == pytest.approx(float(row[token] - over_kept.logsumexp(0)), abs=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.3), (torch.float64, 1e-6)])
def test_other_precisions(build: Build, dtype: torch.dtype, tolerance: float) -> None:
    for name in ("qwen3 local", "gpt2"):
        model = make(**MODELS[name]).to(dtype)
        found = build(model, Drawing(12), batch_size=3).generate(PROMPTS, uniforms(1, 0, range(5), 12))
        for prompt, response in zip(PROMPTS, found, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response.ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            expected = logits.double().log_softmax(-1).gather(1, torch.tensor(response.ids)[:, None])[:, 0]
            assert response.logprobs == pytest.approx(expected.tolist(), abs=tolerance)


# The model is left as it was found


@pytest.mark.parametrize("kind", KINDS)
def test_modes_and_generation_configuration_are_left_alone(build: Build, kind: EngineKind) -> None:
    model = make(**{**MODELS["gpt2"], "resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5})
    model.generation_config.repetition_penalty = 5.0  # as some models are saved; the draws must not know
    model.generation_config.eos_token_id = 7
    own = model.generation_config
    draws = uniforms(1, 0, range(5), 12)
    expected = [
        naive(model, prompt, row, Drawing(12), build.tokenizer) for prompt, row in zip(PROMPTS, draws, strict=True)
    ]
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    found = build(model, Drawing(12), kind).generate(PROMPTS, draws)
    assert [module.training for module in model.modules()] == before
    assert model.generation_config is own
    for response, right in zip(found, expected, strict=True):
        assert_alike(response, right)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_run_with_their_base(build: Build, kind: EngineKind) -> None:
    base = make(**MODELS["llama"])
    own = base.generation_config
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    draws = uniforms(1, 0, range(5), 12)
    found = build(model, Drawing(12), kind, batch_size=2).generate(PROMPTS, draws)
    for prompt, row, response in zip(PROMPTS, draws, found, strict=True):
        assert_alike(response, naive(model, prompt, row, Drawing(12), build.tokenizer))
    assert base.generation_config is own


def tensors_of(model: PreTrainedModel) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_after_a_rollout(build: Build, kind: EngineKind) -> None:
    # its rotary embedding replaces a buffer of its own as soon as a sequence is longer than the context
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make(**MODELS["llama"], max_position_embeddings=16, rope_parameters=rope)
    build(model, Drawing(24), kind).generate(PROMPTS, uniforms(1, 0, range(5), 24))
    assert not any(tensor.is_inference() for tensor in tensors_of(model))
    model.train()
    loss = model(torch.tensor([PROMPTS[2]]), labels=torch.tensor([PROMPTS[2]])).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# What can't be done


def test_a_model_that_makes_local_masks_of_its_own_is_run_by_generate(build: Build) -> None:
    """GPT-Neo tells how far back a row looks from the cache's width: of rows at different places it is wrong."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 4, "max_position_embeddings": 64}
    neo = make("gpt_neo", **sizes, attention_types=[[["global", "local"], 1]], attn_implementation="eager")
    with pytest.raises(UserError, match=r"it makes masks of its own \(window_size\)"):
        build(neo, Drawing(4), "cache")
    prompts = [list(range(40, 60)), [50, 60], list(range(70, 82))]
    found = build(neo, Drawing(8), "auto").generate(prompts, uniforms(4, 0, range(3), 8))
    for prompt, response in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = neo(torch.tensor([prompt + response.ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(-1)[range(len(response.ids)), response.ids]
        assert response.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_what_no_engine_can_run_is_named(build: Build) -> None:
    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": VOCABULARY}
    t5 = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", decoder_start_token_id=0, **sizes))
    with pytest.raises(UserError, match=r"`cache` can't run T5.*; the engine `generate` can't run T5"):
        build(t5, Drawing(4), "auto")


def test_weights_that_are_no_numbers_stop_the_stage(build: Build) -> None:
    for kind in KINDS:
        model = make(**MODELS["llama"])
        engine = build(model, Drawing(4), kind)
        model.lm_head.weight.data[5] = float("nan")
        with pytest.raises(StageFailed, match="not finite"):
            engine.generate(PROMPTS, uniforms(1, 0, range(5), 4))
        with pytest.raises(StageFailed, match="not finite"):
            build(model, Drawing(4), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_and_draws_must_fit(llama: PreTrainedModel, build: Build, kind: EngineKind) -> None:
    engine = build(llama, Drawing(4), kind)
    with pytest.raises(ValueError, match="uniforms are"):
        engine.generate(PROMPTS, uniforms(1, 0, range(5), 3))
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        engine.generate([[1], []], uniforms(1, 0, range(2), 4))
    assert engine.generate([], uniforms(1, 0, [], 4)) == []


def test_a_stop_string_may_be_a_special_token(llama: PreTrainedModel, build: Build) -> None:
    special = build.tokenizer.convert_ids_to_tokens(5)
    drawing = Drawing(40, stop=(special,), temperature=3.0)
    engine = CacheEngine(llama, build.tokenizer, drawing, end_ids=())
    found = engine.generate(PROMPTS * 8, uniforms(1, 0, range(40), 40))
    assert any(response.ids[-1] == 5 and response.ended for response in found)
    assert not any(5 in response.ids[:-1] for response in found)


def lengths(responses: Sequence[Response]) -> list[int]:
    return [len(response.ids) for response in responses]


def test_without_end_tokens_every_response_is_as_long_as_can_be(llama: PreTrainedModel, build: Build) -> None:
    engine = build_engine(llama, build.tokenizer, Drawing(6), end_ids=())
    found = engine.generate(PROMPTS, uniforms(1, 0, range(5), 6))
    assert lengths(found) == [6] * 5
    assert not any(response.ended for response in found)
