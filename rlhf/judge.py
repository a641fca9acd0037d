"""Judges: whatever gives PPO its scores. One Protocol, conversations in, scores out."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from rlhf.tokenizer import Messages

TOKEN_BUDGET = 8192


class Conversation(NamedTuple):
    """A prompt with a response: as text, and as the ids that the policy really read and drew."""

    prompt: Messages
    response: str
    ids: list[int]


class Judge(Protocol):
    """Scores conversations."""

    def scores(self, conversations: Sequence[Conversation]) -> list[float]:
        """One score for each conversation; higher is better."""
        ...


class RewardModelJudge:
    """A reward model that shares the policy's tokenizer: it scores the very ids that were drawn."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model.eval()
        self._mean = score_mean(model)

    def scores(self, conversations: Sequence[Conversation]) -> list[float]:
        """See Judge."""
        return [score - self._mean for score in raw_scores(self._model, [c.ids for c in conversations])]


def score_mean(model: PreTrainedModel) -> float:
    """The mean that the reward stage kept in the model's configuration: the head has no bias that could hold it."""
    return float(getattr(model.config, "score_mean", 0.0))


@torch.inference_mode()
def raw_scores(model: PreTrainedModel, sequences: Sequence[list[int]], budget: int = TOKEN_BUDGET) -> list[float]:
    """The head's output at the last token of each sequence of ids, float64, in the order given."""
    pad = model.config.pad_token_id
    found = [0.0] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i]), i))
    start = 0
    while start < len(order):
        longest = len(sequences[order[start]])
        batch = order[start : start + max(1, budget // longest)]
        start += len(batch)
        ids = torch.full((len(batch), longest), pad)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, index in enumerate(batch):
            ids[row, : len(sequences[index])] = torch.tensor(sequences[index])
            mask[row, : len(sequences[index])] = 1
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
        for index, value in zip(batch, logits[:, 0].double().tolist(), strict=True):
            found[index] = value
    return found
