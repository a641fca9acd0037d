"""A model's forward passes: over a group of prompts at once, then over a token of every row, with a cache of slots.

Legend: G rows of a group of prompts, P tokens of the longest, A tokens of a beginning that they share, B rows of a
step, C columns that are looked at, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from rlhf.rollout.beginning import Behind
from rlhf.rollout.masks import Masks
from rlhf.rollout.slots import KeysValues, SlotCache


class Decoder:
    """A model with slots for rows. Whether it can be run so, rlhf.rollout.fit says."""

    def __init__(self, model: PreTrainedModel, most_slots: int, columns: int, cache_bytes: int) -> None:
        """`columns` is how many tokens a row has at most; slots beyond the first take `cache_bytes` at most."""
        self._model, self.device, self._columns = model, model.device, columns
        self._masks = Masks(model)
        self._cache: SlotCache | None = None
        _, layers = self.prefill([[0]])
        self.token_bytes = sum(states.numel() * states.element_size() for layer in layers for states in layer)
        self.slots = max(1, min(most_slots, cache_bytes // (self.token_bytes * max(1, columns))))

    def prefill(
        self, prompts: Sequence[list[int]], beginning: Sequence[KeysValues] = ()
    ) -> tuple[Tensor, list[KeysValues]]:
        """Logits [G, V] behind prompts, and of every layer keys and values [G, H, A + P, D], each row from the left.

        `beginning` is what this gave for the tokens, all alike, that stand before these, [1, H, A, D].
        """
        cache = Behind(beginning, keep=True)
        before, longest = cache.tokens, max(map(len, prompts))
        # padding stands on the left, so that the logits that are wanted all stand in the last column
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device)
        padding = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=self.device)
        columns = torch.arange(longest, device=self.device)
        here = before + (columns - padding).clamp(min=0)
        first = torch.arange(before, device=self.device).expand(len(prompts), -1)
        own = (columns <= columns[:, None]) & (columns >= padding[:, :, None])
        masks = self._masks(own, here, torch.cat((first, here), 1))
        logits = self._forward(ids, here, masks, cache)
        places = torch.cat((first, before + (columns + padding) % longest), 1)
        return logits, [(_taken(keys, places), _taken(values, places)) for keys, values in cache.seen]

    def join(self, layers: Sequence[KeysValues], rows: Sequence[int], slots: Sequence[int]) -> None:
        """Puts rows of a prefilled group into slots."""
        if self._cache is None:
            self._cache = SlotCache(layers, self.slots, self._columns)
        self._cache.join(layers, *self._indices(rows, slots))

    def step(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """Logits [B, V] behind one token a row, int64 [B], at `positions`, int64 [B], all below `width`."""
        assert self._cache is not None, "rows join before they step"
        self._cache.begin_step(positions, width)
        positions = positions.unsqueeze(1)
        columns = torch.arange(width, device=self.device).unsqueeze(0)
        masks = self._masks(columns.unsqueeze(1) <= positions.unsqueeze(2), positions, columns)
        return self._forward(tokens.unsqueeze(1), positions, masks, self._cache)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies rows to other slots."""
        assert self._cache is not None, "rows join before they move"
        self._cache.move(*self._indices(sources, targets))

    def _forward(self, ids: Tensor, positions: Tensor, masks: Tensor | dict[str, Tensor], cache: Cache) -> Tensor:
        logits: Tensor = self._model(
            input_ids=ids,
            attention_mask=masks,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def _indices(self, *numbers: Sequence[int]) -> list[Tensor]:
        return [torch.tensor(each, device=self.device) for each in numbers]


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """Of states [G, H, P, D] the columns `places` [G, P]."""
    return states.gather(2, places[:, None, :, None].expand_as(states))
