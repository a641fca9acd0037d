"""A KV cache of slots: each row of the batch keeps its place until its response is over, then another prompt takes it.

Keys carry their positions in themselves, so a row's tokens lie in its slot from the left, position p in column p,
whatever the other rows do. What lies right of a row's position is left over from earlier, and masked.

Legend: S slots, C columns of a slot, B rows of a forward pass, G rows of a group of prompts, P tokens of the longest,
H heads, D size of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

KeysValues = tuple[Tensor, Tensor]  # of one layer
SPARE_COLUMNS = 32  # so many more than needed when the slots grow, and half as many again


class SlotCache(Cache):
    """Keys and values of every layer, [S, H, C, D], written in place."""

    def __init__(self, like: Sequence[KeysValues], slots: int, most_columns: int) -> None:
        """Slots for layers of the kind of `like`. They have no columns yet; they grow up to so many."""
        super().__init__(layers=[])
        self._most_columns = most_columns
        self._columns = self._width = 0
        self._stored = [
            [states.new_zeros(slots, states.shape[1], 0, states.shape[3]) for states in layer] for layer in like
        ]
        # for each number of heads: where in [S * H * C] the lines of a slot begin, [S, H], and where a step's tokens go
        self._lines = {states.shape[1]: torch.empty(0) for layer in like for states in layer}
        self._places: dict[int, Tensor] = {}
        self._rows = 0

    def join(self, layers: Sequence[KeysValues], rows: Tensor, slots: Tensor) -> None:
        """Puts rows of a group, [G, H, P, D] each layer, into slots; both are int64 [rows]."""
        width = layers[0][0].shape[2]
        self._grow(width)
        for stored, layer in zip(self._stored, layers, strict=True):
            for into, states in zip(stored, layer, strict=True):
                into[slots, :, :width] = states[rows]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copies what is in some slots to others."""
        for layer in self._stored:
            for stored in layer:
                stored[targets, :, : self._width] = stored[sources, :, : self._width]

    def begin_step(self, positions: Tensor, width: int) -> None:
        """The next forward pass is over one token a row, at `positions`, int64 [B], all below `width`."""
        self._grow(width)
        self._rows, self._width = len(positions), width
        for heads, lines in self._lines.items():
            self._places[heads] = (lines[: self._rows] + positions.unsqueeze(1)).flatten()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> KeysValues:
        """Stores a layer's keys and values, [B, H, 1, D]; returns what its attention may look at, [B, H, width, D]."""
        keys, values = self._stored[layer_idx]
        return self._written(keys, key_states), self._written(values, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The columns before this step's, as far as any row reaches; the rows' own places are in their positions."""
        return self._width - 1

    def _written(self, stored: Tensor, states: Tensor) -> Tensor:
        size = states.shape[3]
        # under autocast keys and values may be of different precision, and the prefilled ones of the higher of the two
        lines = states.reshape(-1, size).to(stored.dtype)
        stored.view(-1, size).index_copy_(0, self._places[states.shape[1]], lines)
        return stored[: self._rows, :, : self._width]

    def _grow(self, columns: int) -> None:
        if columns <= self._columns:
            return
        before, self._columns = self._columns, min(columns + columns // 2 + SPARE_COLUMNS, self._most_columns)
        for layer in self._stored:
            for number, old in enumerate(layer):
                # zeros, and not what lies in memory: a masked column still counts with weight 0, and 0 x NaN is NaN
                layer[number] = old.new_zeros(*old.shape[:2], self._columns, old.shape[3])
                layer[number][:, :, :before] = old
        for heads in self._lines:
            lines = torch.arange(0, len(old) * heads * self._columns, self._columns, device=old.device)
            self._lines[heads] = lines.view(-1, heads)
