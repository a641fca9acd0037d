"""A beginning that many rows share: read once, its keys and values stand before every row.

Legend: B rows, L tokens of a row, P tokens of the beginning, H heads, D size of a head.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import Cache

from rlhf.rollout.slots import KeysValues


def common_beginning(sequences: Iterable[Sequence[int]]) -> list[int]:
    """The tokens with which all sequences begin, less the last token of the shortest: something is left of each."""
    different = {tuple(sequence) for sequence in sequences}
    if not different:
        return []
    first, last = min(different), max(different)  # what these two share in the order of tokens, all between them share
    most = min(map(len, different)) - 1
    return list(first[: next((place for place in range(most) if first[place] != last[place]), most)])


class Behind(Cache):
    """The cache of one forward pass over rows behind a beginning, [1, H, P, D] each layer; it stays as it is."""

    def __init__(self, beginning: Sequence[KeysValues], *, keep: bool = False) -> None:
        """Without layers there is no beginning. `keep`: whether `seen` is wanted afterwards."""
        super().__init__(layers=[])
        self._beginning, self._keep = list(beginning), keep
        self.tokens = beginning[0][0].shape[2] if beginning else 0
        self.seen: list[KeysValues] = []  # of each layer, the beginning's and the rows' own, [B, H, P + L, D]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> KeysValues:
        """What a layer's attention looks at: the beginning and the rows' own, [B, H, P + L, D]."""
        found = key_states, value_states
        if self._beginning:
            keys, values = self._beginning[layer_idx]
            found = _behind(keys, key_states), _behind(values, value_states)
        if self._keep:
            self.seen.append(found)
        return found

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """P."""
        return self.tokens


def _behind(kept: Tensor, states: Tensor) -> Tensor:
    return torch.cat((kept.expand(states.shape[0], -1, -1, -1), states), 2)
