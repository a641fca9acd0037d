"""What a causal LM says of given tokens: log-probabilities and entropies, with logits only where they are needed.

Legend: N tokens, H width of a hidden state, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf.footprint import is_traced
from rlhf.functional.masked import widened
from rlhf.model import accelerator_bytes

LOGITS_AT_ONCE = 2**22  # numbers, 16 MiB as float32: more tokens than that are read in parts; on an accelerator:
LOGITS_AT_ONCE_THERE = 2**27
OWN_SCALES = ("final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling")  # behind the head
SPLIT_TOLERANCE = 1e-5  # both are the same product of the same states

Hide = Callable[[Tensor, int], Tensor]  # (logits of the tokens from a place on, the place) -> with some at -inf


class Likelihood(NamedTuple):
    """Of N tokens, at least float32, nats."""

    logprobs: Tensor  # [N]
    entropy: Tensor  # [N] of the distribution that each token stands in


class TokenReader:
    """Reads tokens' log-probabilities from a causal LM in two steps: states of all positions, then logits of some."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._head: nn.Module | None = model.get_output_embeddings() if head_stands_apart(model) else None

    @property
    def apart(self) -> bool:
        """Whether what `states` gives are hidden states."""
        return self._head is not None

    def states(self, ids: Tensor, use_cache: bool = False, **more: Any) -> Tensor:
        """Hidden states [B, L, H] of ids [B, L] with any padding on the right; logits where no head stands apart.

        `more` goes to the model: masks, positions, a cache.
        """
        if self._head is None:
            logits: Tensor = self._model(input_ids=ids, use_cache=use_cache, **more).logits
            return logits
        states: Tensor = self._model.base_model(input_ids=ids, use_cache=use_cache, **more).last_hidden_state
        return states

    def logprobs(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities of tokens [N] at the states [N, ...] before them, without gradients; at least float32."""
        with torch.no_grad():
            return self._in_parts(
                lambda part, some: self._logits(part).log_softmax(-1).gather(-1, some.unsqueeze(-1))[:, 0],
                states,
                tokens,
            )

    def likeliest(self, states: Tensor) -> Tensor:
        """The likeliest token after each of the states [N, ...]; of equal ones the first; -1 where a logit is NaN."""

        def best(part: Tensor) -> Tensor:
            found = self._logits(part).max(-1)
            return torch.where(found.values.isnan(), -1, found.indices)

        with torch.no_grad():
            return self._in_parts(best, states)

    def _in_parts(self, f: Callable[..., Tensor], *columns: Tensor) -> Tensor:
        """f of some rows of the columns at a time, in a tensor that is made before: what a part leaves behind would
        stand between the logits of this one and those of the next, so that their memory could not be used again.
        """
        found: Tensor | None = None
        start, step = 0, self._at_once(columns[0])
        for part in zip(*(column.split(step) for column in columns), strict=True):
            values = f(*part)
            if found is None:
                found = values.new_empty(len(columns[0]))
            found[start : start + len(values)] = values
            start += len(values)
        assert found is not None
        return found

    def read(self, states: Tensor, tokens: Tensor, temperature: float = 1.0, hide: Hide | None = None) -> Likelihood:
        """Likelihood of tokens [N] at the states [N, ...] before them.

        Where gradients are taken, the logits of each part are made again for the backward pass instead of being held.
        """
        step = self._at_once(states)
        if len(states) <= step:
            return Likelihood(*self._part(states, tokens, 0, temperature, hide))
        found = []
        for start in range(0, len(states), step):
            part = (states[start : start + step], tokens[start : start + step], start, temperature, hide)
            again = torch.is_grad_enabled()
            found.append(
                checkpoint(self._part, *part, use_reentrant=False, preserve_rng_state=False)
                if again
                else self._part(*part)
            )
        return Likelihood(*(torch.cat(column) for column in zip(*found, strict=True)))

    def _at_once(self, states: Tensor) -> int:
        """The tokens whose logits are held at a time."""
        size = self._model.config.get_text_config().vocab_size
        there = accelerator_bytes(states.device, 1.0) > 0
        return max(1, (LOGITS_AT_ONCE_THERE if there else LOGITS_AT_ONCE) // size)

    def _logits(self, states: Tensor) -> Tensor:
        return widened(states if self._head is None else self._head(states))

    def _part(
        self, states: Tensor, tokens: Tensor, start: int, temperature: float, hide: Hide | None
    ) -> tuple[Tensor, Tensor]:
        logits = self._logits(states) / temperature
        if hide:
            logits = hide(logits, start)
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        real = torch.where(logits == float("-inf"), 0.0, logprobs) if hide else logprobs  # p log p is 0 where p is
        return chosen, -(logprobs.exp() * real).sum(-1)


@torch.no_grad()
def head_stands_apart(model: PreTrainedModel) -> bool:
    """Whether the logits are the output head of the last hidden states and nothing else: tried on a few tokens.

    Some models cap or scale their logits behind the head; those are read whole. Of a model that has no numbers (a
    plan's) the configuration is asked.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        return False
    if is_traced(head.weight):
        return not any(getattr(model.config.get_text_config(), name, None) for name in OWN_SCALES)
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    try:
        apart = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        whole = model(input_ids=ids, use_cache=False).logits
    except (TypeError, AttributeError):
        return False
    if apart.shape != whole.shape:
        return False
    return torch.allclose(apart.double(), whole.double(), rtol=SPLIT_TOLERANCE, atol=SPLIT_TOLERANCE)
