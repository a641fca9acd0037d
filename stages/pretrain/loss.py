"""A causal LM and its loss as one module: what wraps it (DDP, FSDP2, ZeRO-3) sees one forward pass for a backward pass.

Legend: B rows, L tokens of a row, N = B L, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf.functional.masked import widened
from rlhf.likelihood import head_stands_apart
from rlhf.model import accelerator_bytes

LOGITS_BYTES = 2**30  # of float32 logits that are held at a time; on a GPU:
LOGITS_SHARE = 1 / 6  # of its memory


class Loss(NamedTuple):
    """Scalars, at least float32, nats per token."""

    objective: Tensor  # what is minimised
    nats: Tensor  # the cross-entropy in it, without gradient


class TokenLoss(nn.Module):
    """Mean cross-entropy of the next tokens, plus `z_loss` times the mean squared log of the softmax's denominator.

    The second term keeps logits from drifting (PaLM: Chowdhery et al. 2022, arXiv:2204.02311, section 5). Where the
    logits of a pass are larger than a part of the memory, they are made and read in parts, twice.
    """

    def __init__(self, model: PreTrainedModel, z_loss: float) -> None:
        super().__init__()
        self.model, self._z_loss = model, z_loss
        self._head: list[nn.Module] = [model.get_output_embeddings()] if _reads_in_parts(model) else []  # no child

    def forward(self, inputs: Tensor, targets: Tensor, positions: Tensor | None = None) -> Loss:
        """The loss of inputs and targets [B, L]; `positions` [B, L] where documents are not to see each other."""
        at_once = self._tokens_at_once(inputs)
        if not self._head or inputs.numel() <= at_once:
            logits = self.model(input_ids=inputs, position_ids=positions, use_cache=False).logits
            objective, nats = self._summed(logits.flatten(0, 1), targets.flatten())
        else:
            body = self.model.base_model
            states = body(input_ids=inputs, position_ids=positions, use_cache=False).last_hidden_state.flatten(0, 1)
            parts = [
                checkpoint(self._part, state, target, use_reentrant=False, preserve_rng_state=False)
                for state, target in zip(states.split(at_once), targets.flatten().split(at_once), strict=True)
            ]
            objective, nats = (torch.stack(column).sum() for column in zip(*parts, strict=True))
        return Loss(objective / targets.numel(), nats.detach() / targets.numel())

    def _tokens_at_once(self, inputs: Tensor) -> int:
        limit = accelerator_bytes(inputs.device, LOGITS_SHARE) or LOGITS_BYTES
        return max(1, limit // (4 * int(self.model.config.get_text_config().vocab_size)))

    def _part(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self._summed(self._head[0](states), targets)

    def _summed(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and cross-entropy of logits [N, V], added up over the tokens."""
        wide = widened(logits)
        nats = cross_entropy(wide, targets, reduction="sum")
        if not self._z_loss:
            return nats, nats
        return nats + self._z_loss * wide.logsumexp(-1).square().sum(), nats


def _reads_in_parts(model: PreTrainedModel) -> bool:
    with torch.no_grad():
        return head_stands_apart(model)


def positions_in_documents(ids: Tensor, begin: int) -> Tensor:
    """How far each token [B, L] stands from the beginning of its document, or of the row where that is nearer.

    Positions that begin anew tell transformers to mask what is before, as long as no cache is used.
    """
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return places - torch.where(ids == begin, places, 0).cummax(1).values
