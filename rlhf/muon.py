"""Muon: momentum whose update is orthogonalised, for the matrices inside a Transformer (Jordan et al. 2024).

Departures from torch.optim.Muon: float32 on a CPU, where bfloat16 is slow, and matrices of one shape together, which
takes about 0.6 of its time on a model of a million parameters. Of matrices that lie in rows (rlhf.pieces) every
process works out the whole update and takes its own part of it. The scale of the update is Moonshot's (Liu et al. 2025,
arXiv:2502.16982, equation 4): one learning rate then serves Muon and AdamW.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import PreTrainedModel

from rlhf.pieces import mine, shape_of, whole

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: steepest at 0, singular values end between 0.7 and 1.2
RMS = 0.2  # of AdamW's updates, about


class Muon(Optimizer):
    """W <- (1 - lr decay) W - lr 0.2 sqrt(max(n, m)) UV'; U S V' is the Nesterov momentum of W's gradient [n, m]."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay as they are."""
        assert closure is None
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in shapes.items():
                updates = orthogonalised(torch.stack([whole(self._momentum(matrix)) for matrix in matrices]))
                step = group["lr"] * RMS * max(shape) ** 0.5
                for matrix, update in zip(matrices, updates, strict=True):
                    local, rows = mine(matrix)
                    local.mul_(1 - group["lr"] * group["weight_decay"]).add_(update[rows], alpha=-step)

    def _momentum(self, matrix: nn.Parameter) -> Tensor:
        """Nesterov's, of the gradient."""
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(momentum, MOMENTUM)


def orthogonalised(matrices: Tensor) -> Tensor:
    """About UV' of each matrix U S V', [..., n, m], by five Newton-Schulz steps; bfloat16 on a GPU, else float32."""
    a, b, c = COEFFICIENTS
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def muon_with_adamw(
    model: PreTrainedModel, lr: float, weight_decay: float, betas: tuple[float, float], epsilon: float
) -> dict[str, Optimizer]:
    """Muon for the matrices of the layers; AdamW for embeddings, the output head and vectors, which don't decay."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    outer = {id(p) for module in [*tables, *([head] if head is not None else [])] for p in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inner = [parameter for parameter in trained if len(shape_of(parameter)) == 2 and id(parameter) not in outer]
    among = {id(parameter) for parameter in inner}
    others = [parameter for parameter in trained if id(parameter) not in among]
    adamw = AdamW(others, lr=lr, betas=betas, eps=epsilon, weight_decay=0.0, fused=True)
    return {"muon": Muon(inner, lr, weight_decay), "adamw": adamw} if inner else {"adamw": adamw}
