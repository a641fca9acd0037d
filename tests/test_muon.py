"""Muon against a singular value decomposition, torch's own Muon, and a step worked out by hand."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.muon import MOMENTUM, Muon, muon_with_adamw, orthogonalised


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16), (3, 32, 24)])
def test_the_update_is_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    """Its singular vectors are those of the matrix, its singular values near 1."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    update = orthogonalised(matrix)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ update @ vh.mT
    diagonal = inside.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.5 and diagonal.max() < 1.3
    torch.testing.assert_close(inside, torch.diag_embed(diagonal), atol=1e-3, rtol=0)


def test_many_together_are_as_each_alone() -> None:
    torch.manual_seed(1)
    matrices = torch.randn(4, 24, 16)
    torch.testing.assert_close(orthogonalised(matrices), torch.stack([orthogonalised(m) for m in matrices]))


def test_two_steps_by_hand() -> None:
    """A matrix with orthogonal columns whose gradient is itself: all happens along it."""
    torch.manual_seed(2)
    start = torch.linalg.qr(torch.randn(8, 8)).Q
    weight = nn.Parameter(start.clone())
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5)
    expected = start.clone()
    momentum = torch.zeros(8, 8)
    for gradient in (2.0 * start, -1.0 * start):
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        nesterov = (1 - MOMENTUM) * gradient + MOMENTUM * momentum
        sign = 1.0 if float((nesterov * start).sum()) > 0 else -1.0
        size = float(orthogonalised(start).norm() / math.sqrt(8))  # Newton-Schulz makes 1 of the singular values, about
        expected = (1 - 0.1 * 0.5) * expected - 0.1 * 0.2 * math.sqrt(8) * sign * size * start
        torch.testing.assert_close(weight.data, expected, atol=1e-5, rtol=1e-4)


def test_as_torchs_own_muon_but_for_its_precision() -> None:
    torch.manual_seed(3)
    mine, theirs = (nn.Parameter(torch.zeros(24, 40)) for _ in range(2))
    ours = Muon([mine], lr=0.01, weight_decay=0.0)
    peer = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.0, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        gradient = torch.randn(24, 40)
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        ours.step()
        peer.step()
    assert torch.nn.functional.cosine_similarity(mine.data.flatten(), theirs.data.flatten(), dim=0) > 0.999
    assert float(mine.data.norm() / theirs.data.norm()) == pytest.approx(1.0, abs=0.02)


def test_who_gets_which_optimiser(tiny_model: PreTrainedModel) -> None:
    """Every parameter exactly one; embeddings, head and vectors AdamW's, which don't decay."""
    model = copy.deepcopy(tiny_model)
    muon, adamw = muon_with_adamw(model, 1e-3, 0.1, (0.9, 0.95), 1e-8).values()
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    first, second = (
        [named[id(p)] for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adamw)
    )
    assert sorted([*first, *second]) == sorted(named.values())
    assert not any(part in name for name in first for part in ("embed", "wte", "wpe", "head", "norm", "ln_"))
    assert any("attn" in name for name in first)
    assert all(group["weight_decay"] == 0.0 for group in adamw.param_groups)
