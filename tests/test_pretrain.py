"""Pretraining's parts against naive ones."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from rlhf.data.tokens import PackedTokens, pack
from rlhf.model import build_causal_lm, causal_lm_config, decay_groups
from stages.pretrain import _step_gradient, learning_rate_at, positions_in_documents

VOCABULARY, BEGIN = 50, 1


class OneProcess:
    """An Accelerator's face for one process."""

    device = torch.device("cpu")

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def no_sync(self, _: Any) -> Any:
        from contextlib import nullcontext

        return nullcontext()


def make_model(architecture: str, sliding: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    config = causal_lm_config(
        architecture,
        vocab_size=VOCABULARY,
        layers=2,
        width=32,
        heads=2,
        kv_heads=None,
        mlp_width=None,
        context=64,
        rope_theta=1e4,
        initializer_range=0.2,
        sliding_window=3 if sliding else None,
        sliding_layers=(0,) if sliding else (),
        tie_embeddings=True,
        special={"bos_token_id": BEGIN, "eos_token_id": 2, "pad_token_id": 0},
    )
    return build_causal_lm(config, "wide").eval()


@pytest.fixture
def packed(tmp_path: Path) -> PackedTokens:
    rng = np.random.default_rng(0)
    documents = ([BEGIN, *map(int, rng.integers(3, VOCABULARY, n))] for n in rng.integers(3, 12, 60))
    pack(((ids, len(ids)) for ids in documents), tmp_path / "tokens.bin", VOCABULARY)
    return PackedTokens(tmp_path / "tokens.bin", VOCABULARY, 16, seed=3)


def test_learning_rate_by_hand() -> None:
    # 10 steps, peak 1, 20 % warm-up = 2 steps, floor 0.1; step 6 is halfway down the cosine: 0.1 + 0.9 / 2
    rates = [learning_rate_at(step, 10, 1.0, 0.2, 0.1) for step in range(10)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.55)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0.1 < rates[9] < 0.15


def test_positions_begin_anew_with_each_document() -> None:
    ids = torch.tensor([[7, 8, BEGIN, 5, 6, BEGIN, 9], [BEGIN, 4, 4, 4, BEGIN, BEGIN, 3]])
    assert positions_in_documents(ids, BEGIN).tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 0, 1]]


@pytest.mark.parametrize(("architecture", "sliding"), [("llama", False), ("qwen3", True), ("gpt2", False)])
def test_an_isolated_document_has_the_logits_it_has_alone(architecture: str, sliding: bool) -> None:
    model = make_model(architecture, sliding)
    first, second = torch.tensor([[BEGIN, 5, 6, 7, 8]]), torch.tensor([[BEGIN, 9, 10, 11]])
    row = torch.cat([first, second], 1)
    with torch.no_grad():
        isolated = model(input_ids=row, position_ids=positions_in_documents(row, BEGIN), use_cache=False).logits
        together = model(input_ids=row, use_cache=False).logits
        torch.testing.assert_close(isolated[:, :5], model(first, use_cache=False).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(isolated[:, 5:], model(second, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert (together[:, 5:] - isolated[:, 5:]).abs().max() > 0.01


@pytest.mark.parametrize("begin", [None, BEGIN])
def test_a_steps_gradient_is_that_of_the_mean_over_its_tokens(packed: PackedTokens, begin: int | None) -> None:
    accelerator: Any = OneProcess()
    found = []
    for size in (1, 2, 4):
        model = make_model("llama").double()
        loss = _step_gradient(model, packed, range(8, 12), size, begin, accelerator)
        found.append((float(loss), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    naive = make_model("llama").double()
    inputs, targets = packed.batch(range(8, 12))
    total = torch.zeros((), dtype=torch.float64)
    for row, target in zip(inputs, targets, strict=True):
        starts = [0, *[i for i in range(1, 16) if begin is not None and row[i] == begin], 16]
        for start, end in pairwise(starts):  # every document on its own
            logits = naive(input_ids=row[start:end].unsqueeze(0), use_cache=False).logits[0]
            total = total + cross_entropy(logits, target[start:end], reduction="sum")
    (total / targets.numel()).backward()
    mean = float(total.detach()) / targets.numel()
    expected = [p.grad for p in naive.parameters() if p.grad is not None]
    for loss_value, gradients in found:
        assert loss_value == pytest.approx(mean, rel=1e-6)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = make_model("gpt2")
    decayed, free = decay_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
