"""Packing: the conversations of a forward pass laid end to end in few rows, isolated from each other, not padded.

Positions begin anew in each conversation, which tells transformers' attention masks to keep them apart, as long as no
cache is used and no attention mask given. So the loss and its gradient are what they are without packing.

Legend: R rows of a forward pass, T tokens of the longest one.
"""

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import RecipeError

IGNORED = -100  # the label of a token that is not learned


def fitted(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which items stand in each row of at most `room`: best fit decreasing (Johnson 1973), at most 11/9 of the least.

    The longest item comes first; each goes into the fullest row that has room for it, or begins a new one.
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room, row), sorted
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        if lengths[item] > room:
            raise ValueError(f"an item of {lengths[item]} doesn't fit into rows of {room}")
        place = bisect.bisect_left(left, (lengths[item], -1))
        if place == len(left):
            rows.append([])
            left.append((room, len(rows) - 1))
        free, row = left.pop(place)
        rows[row].append(item)
        bisect.insort(left, (free - lengths[item], row))
    return rows


class PackingCollator:
    """Puts rows of `input_ids` and `labels` into tensors [R, T], packed."""

    def __init__(self, room: int, pad: int) -> None:
        self._room, self._pad = room, pad

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `labels`, and `position_ids`, which begin anew in each conversation and in the padding."""
        rows = fitted([len(example["input_ids"]) for example in examples], self._room)
        found: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in rows:
            ids, labels, positions = list[int](), list[int](), list[int]()
            for item in row:
                ids += examples[item]["input_ids"]
                # nothing stands before the first token that it could be foretold from
                labels += [IGNORED, *examples[item]["labels"][1:]]
                positions += range(len(examples[item]["input_ids"]))
            found["input_ids"].append(ids)
            found["labels"].append(labels)
            found["position_ids"].append(positions)
        longest = max(map(len, found["input_ids"]))
        padding = {"input_ids": [self._pad] * longest, "labels": [IGNORED] * longest, "position_ids": range(longest)}
        return {
            name: torch.tensor([[*row, *padding[name][: longest - len(row)]] for row in values])
            for name, values in found.items()
        }


@torch.no_grad()
def check_isolation(model: PreTrainedModel, key: str) -> None:
    """Raises RecipeError, naming the key, where a model lets packed conversations see each other.

    Tried out on three short ones: what it says to each must be what it says to it alone.
    """
    known = min(model.config.vocab_size, 250)
    texts = [[(7 * place + 3 * length) % known for place in range(length)] for length in (5, 4, 8)]
    packed = PackingCollator(room=9, pad=0)([{"input_ids": ids, "labels": ids} for ids in texts])
    was_training = model.training
    model.eval()
    together = _logits(model, packed["input_ids"], packed["position_ids"])
    # the rows are [8, padding] and [5, 4]
    found = {8: together[0, :8], 5: together[1, :5], 4: together[1, 5:9]}
    alone = {len(ids): _logits(model, torch.tensor([ids]), None)[0] for ids in texts}
    model.train(was_training)
    for length, logits in alone.items():
        if not torch.allclose(found[length], logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
            raise RecipeError(
                f"{key}: {type(model).__name__} lets packed conversations see each other; leave it out (batches of "
                "like length need little padding anyway)"
            )


def _logits(model: PreTrainedModel, ids: Tensor, positions: Tensor | None) -> Tensor:
    places = {} if positions is None else {"position_ids": positions.to(model.device)}
    return model(input_ids=ids.to(model.device), use_cache=False, **places).logits.float().cpu()
