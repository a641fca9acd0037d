"""Attention masks of our own, for models that are given positions and a cache that transformers knows nothing of.

Legend: B rows, L tokens that look, C tokens that are looked at.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer


def attention_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """The kinds of attention layers that a configuration makes, and how many tokens they see; None: all."""
    windows: dict[str, int | None] = {}
    for layer in DynamicCache(config=config).layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            windows["sliding_attention"] = layer.sliding_window
        else:
            windows["full_attention"] = None
    return windows


class Masks:
    """What a model's attention is told of who sees whom."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config(decoder=True)
        self._windows = attention_windows(config)
        self._by_kind = hasattr(config, "layer_types")  # such models take a mask for each kind of layer
        self._zero = torch.zeros((), dtype=model.dtype, device=model.device)
        self._hidden = torch.full_like(self._zero, torch.finfo(model.dtype).min)

    def __call__(self, seen: Tensor, here: Tensor, there: Tensor) -> Tensor | dict[str, Tensor]:
        """What is added to the attention, [B, 1, L, C], for each kind of layer where there are several.

        `seen`, bool [B, L, S], tells which of the last S tokens a token may look at, windows apart; it sees all before
        them. `here` [B, L] and `there` [B, C] are positions in the sequence. Where all rows are alike B may be 1.
        """
        masks = {}
        before = there.shape[1] - seen.shape[2]
        for kind, window in self._windows.items():
            if window is None:
                own = torch.where(seen, self._zero, self._hidden)
                masks[kind] = pad(own, (before, 0)).unsqueeze(1) if before else own.unsqueeze(1)
            else:
                near = here.unsqueeze(2) - there.unsqueeze(1) < window
                near[:, :, before:] &= seen
                masks[kind] = torch.where(near, self._zero, self._hidden).unsqueeze(1)
        return masks if self._by_kind else next(iter(masks.values()))
