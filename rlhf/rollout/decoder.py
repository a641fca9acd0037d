"""A model's forward passes: over a group of prompts at once, then over a token of every row, with a cache of slots.

Legend: G rows of a group of prompts, P tokens of the longest, B rows of a step, C columns that are looked at, V
vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from rlhf.rollout.slots import KeysValues, SlotCache


class Decoder:
    """A model with slots for rows. Whether it can be run so, rlhf.rollout.fit says."""

    def __init__(self, model: PreTrainedModel, most_slots: int, columns: int, cache_bytes: int) -> None:
        """`columns` is how many tokens a row has at most; slots beyond the first take `cache_bytes` at most."""
        self._model, self.device, self._columns = model, model.device, columns
        config = model.config.get_text_config(decoder=True)
        self._windows = attention_windows(config)
        self._by_kind = hasattr(config, "layer_types")  # such models take a mask for each kind of layer
        self._seen = torch.zeros((), dtype=model.dtype, device=self.device)
        self._unseen = torch.full_like(self._seen, torch.finfo(model.dtype).min)
        self._cache: SlotCache | None = None
        _, layers = self.prefill([[0]])
        self.token_bytes = sum(states.numel() * states.element_size() for layer in layers for states in layer)
        self.slots = max(1, min(most_slots, cache_bytes // (self.token_bytes * max(1, columns))))

    def prefill(self, prompts: Sequence[list[int]]) -> tuple[Tensor, list[KeysValues]]:
        """Logits [G, V] behind prompts, and of every layer keys and values [G, H, P, D], each row from the left."""
        longest = max(map(len, prompts))
        # padding stands on the left, so that the logits that are wanted all stand in the last column
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=self.device)
        padding = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=self.device)
        columns = torch.arange(longest, device=self.device)
        masks = self._masks(columns[:, None], longest, padding[:, None, None])
        cache = DynamicCache()  # told nothing of windows: it keeps all tokens
        logits = self._forward(ids, (columns - padding).clamp(min=0), masks, cache)
        places = (columns + padding) % longest
        return logits, [(_taken(layer.keys, places), _taken(layer.values, places)) for layer in cache.layers]

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
        masks = self._masks(positions[:, None, None], width)
        return self._forward(tokens.unsqueeze(1), positions, masks, self._cache)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copies rows to other slots."""
        assert self._cache is not None, "rows join before they move"
        self._cache.move(*self._indices(sources, targets))

    def _forward(self, ids: Tensor, positions: Tensor, masks: dict[str, Tensor], cache: Cache) -> Tensor:
        logits: Tensor = self._model(
            input_ids=ids,
            attention_mask=masks if self._by_kind else next(iter(masks.values())),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]

    def _masks(self, here: Tensor, width: int, first: Tensor | None = None) -> dict[str, Tensor]:
        """What is added to the attention of each kind of layer, [B or G, 1, tokens, C].

        Tokens in the columns `here`, [B or 1, 1, tokens, 1], look at the columns from `first`, [G, 1, 1, 1], to theirs.
        """
        columns = torch.arange(width, device=self.device)
        causal = columns <= here
        if first is not None:
            causal = causal & (columns >= first)
        masks = {}
        for kind, window in self._windows.items():
            seen = causal if window is None else causal & (columns > here - window)
            masks[kind] = torch.where(seen, self._seen, self._unseen)
        return masks

    def _indices(self, *numbers: Sequence[int]) -> list[Tensor]:
        return [torch.tensor(each, device=self.device) for each in numbers]


def attention_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """The kinds of attention layers that a configuration makes, and how many tokens they see; None: all."""
    windows: dict[str, int | None] = {}
    for layer in DynamicCache(config=config).layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            windows["sliding_attention"] = layer.sliding_window
        else:
            windows["full_attention"] = None
    return windows


def _taken(states: Tensor, places: Tensor) -> Tensor:
    """Of states [G, H, P, D] the columns `places` [G, P]."""
    return states.gather(2, places[:, None, :, None].expand_as(states))
