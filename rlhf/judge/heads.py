"""Reward models of ours: sequence classifiers with one output, or one of each head of an ensemble."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from rlhf.errors import UserError
from rlhf.functional.scores import score_of_heads
from rlhf.judge.batches import Row, batched_logits
from rlhf.judge.protocol import Conversation, Scores, check_usable
from rlhf.model import score_heads


class RewardModelJudge:
    """A reward model that shares the policy's tokenizer: it scores the very ids that were drawn.

    Of an ensemble, the score is the mean over its heads less `uncertainty_penalty` times their spread, and the spread
    is a further figure.
    """

    def __init__(self, model: PreTrainedModel, uncertainty_penalty: float = 0.0) -> None:
        self.model = model.eval()
        self._penalty = checked_penalty(f"the reward model {model.name_or_path}", model, uncertainty_penalty)

    def scores(self, conversations: Sequence[Conversation]) -> Scores:
        """See Judge."""
        logits = head_scores(self.model, [c.ids for c in conversations])
        return scores_of(self.model, logits, self._penalty)


def checked_penalty(name: str, model: PreTrainedModel, penalty: float) -> float:
    """The penalty. Raises UserError where there is one but no ensemble, whose heads alone have a spread."""
    if penalty and score_heads(model.config) == 1:
        raise UserError(f"{name}: `uncertainty_penalty` is for ensembles; this model has no heads to disagree")
    return penalty


def scores_of(model: PreTrainedModel, logits: Sequence[Sequence[float]], penalty: float) -> Scores:
    """The scores that a reward model's raw outputs mean, and the spread where it has several heads."""
    means = score_means(model)
    rows = torch.tensor(logits, dtype=torch.float64).reshape(-1, len(means))
    found = score_of_heads(rows, torch.tensor(means, dtype=torch.float64), penalty)
    values = found.scores.tolist()
    check_usable(f"the reward model {model.name_or_path}", values)
    return Scores(values, {"spread": found.spread.tolist()} if len(means) > 1 else {})


def score_means(model: PreTrainedModel) -> list[float]:
    """The mean of each head, which the reward stage kept in the model's configuration: the head has no bias for it.

    `score_mean` in the configuration is a number, or a list of one for each head; without it the means are 0.
    """
    kept = getattr(model.config, "score_mean", None) or 0.0
    heads = score_heads(model.config)
    return [float(mean) for mean in kept] if isinstance(kept, list | tuple) else [float(kept)] * heads


def head_scores(model: PreTrainedModel, sequences: Sequence[list[int]]) -> list[list[float]]:
    """Every head's raw output at the last token of each sequence of ids, float64, in the order given."""
    return batched_logits(model, [Row(ids) for ids in sequences])
