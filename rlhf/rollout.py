"""Sampling responses: a hand-written loop over the Hugging Face KV cache that returns log-probabilities on the way.

Prompts are sorted by length and prefilled in batches; finished rows leave the batch. The randomness of a token depends
on (seed, round, episode, position) alone, so a response does not depend on which others are drawn beside it.

Legend: B rows of a batch, P prompt positions (padded on the left), V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

COMPACT_BELOW = 0.75  # finished rows leave once fewer than this share of the batch is still going


class Response(NamedTuple):
    """What a model answered: the ids (the end token included), their log-probabilities, whether it ended by itself."""

    ids: list[int]
    logprobs: list[float]  # nats, of the distribution that was really sampled from
    ended: bool


class Engine(Protocol):
    """Whatever draws responses."""

    def generate(self, prompts: Sequence[list[int]], uniforms: np.ndarray) -> list[Response]:
        """A response to each prompt of token ids; `uniforms` [prompts, max_tokens] in [0, 1) decide the draws."""
        ...


def uniforms(seed: int, round_number: int, episodes: Sequence[int], max_tokens: int) -> np.ndarray:
    """Numbers in [0, 1), float64 [episodes, max_tokens]: row e depends on (seed, round, episode e) alone.

    Philox is a counter-based generator: each episode has a stream of its own, the same on every machine.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, round_number], counter=[0, 0, 0, episode])).random(max_tokens)
        for episode in episodes
    ]
    return np.stack(rows) if rows else np.zeros((0, max_tokens))


class CacheEngine:
    """Our engine, for decoder-only models with a dynamic KV cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        end_ids: Sequence[int],
        pad_id: int,
        max_tokens: int,
        temperature: float,
        batch_size: int = 256,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._model, self._end_ids, self._pad_id = model, list(end_ids), pad_id
        self._max_tokens, self._temperature, self._batch_size = max_tokens, temperature, batch_size
        self._progress = progress

    @torch.inference_mode()
    def generate(self, prompts: Sequence[list[int]], uniforms: np.ndarray) -> list[Response]:
        """See Engine. A response has at least one token and at most `max_tokens`."""
        was_training = self._model.training
        self._model.eval()
        responses: list[Response | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            for index, response in zip(batch, self._batch([prompts[i] for i in batch], uniforms[batch]), strict=True):
                responses[index] = response
            if self._progress:
                self._progress(start + len(batch))
        self._model.train(was_training)
        return [response for response in responses if response is not None]

    def _batch(self, prompts: list[list[int]], draws: np.ndarray) -> list[Response]:
        device = self._model.device
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._pad_id)
        mask = torch.zeros(len(prompts), longest + self._max_tokens, dtype=torch.long)
        mask[:, longest:] = 1
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) : longest] = 1
        ids, mask = ids.to(device), mask.to(device)
        all_draws = torch.from_numpy(draws).to(device)
        ends = torch.tensor(self._end_ids, device=device)
        positions = (mask[:, :longest].cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)

        tokens: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        rows = torch.arange(len(prompts), device=device)  # which prompt each row of the batch belongs to
        alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
        inputs = ids
        for t in range(self._max_tokens):
            logits = self._model(
                input_ids=inputs,
                attention_mask=mask[:, : longest + t],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            chosen, logprob = draw_tokens(logits, all_draws[rows, t], self._temperature)
            finished = torch.isin(chosen, ends)
            for row, going, token, value, end in zip(
                rows.tolist(), alive.tolist(), chosen.tolist(), logprob.tolist(), finished.tolist(), strict=True
            ):
                if going:
                    tokens[row].append(token)
                    logprobs[row].append(value)
                    ended[row] = end
            alive = alive & ~finished
            left = int(alive.sum())
            if left == 0:
                break
            inputs, positions = chosen.unsqueeze(1), positions[:, -1:] + 1
            if left < COMPACT_BELOW * len(rows):
                keep = alive.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, alive, mask = rows[keep], alive[keep], mask[keep]
                inputs, positions = inputs[keep], positions[keep]
        return [Response(*row) for row in zip(tokens, logprobs, ended, strict=True)]


def draw_tokens(logits: Tensor, draws: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens [B] drawn from logits [B, V] by inverting the cumulative distribution at `draws` [B] in [0, 1).

    Returns the tokens, int64, and their log-probabilities at this temperature, float32.
    """
    logprobs = (logits.float() / temperature).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    target = (draws.double() * cumulative[:, -1]).unsqueeze(1)
    tokens = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1)
