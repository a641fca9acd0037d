"""Rows with branches behind a shared beginning: forward passes with masks and positions of our own.

Legend: B rows, L tokens of a row, P tokens of the shared beginning, H heads, D size of a head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.footprint import is_traced
from rlhf.functional.masked import widened
from rlhf.likelihood import TokenReader
from rlhf.rollout.beginning import Behind
from rlhf.rollout.fit import COARSE_TOLERANCE, not_keys_and_values
from rlhf.rollout.masks import Masks
from rlhf.rollout.slots import KeysValues

TRUNK, PADDING = 0, -1
TOLERANCE = 1e-3  # nats, of float32 and float64 on made-up tokens; a wrong mask or position is far off


class Row(NamedTuple):
    """The tokens that are read, and what is predicted where."""

    ids: list[int]
    positions: list[int]  # in the whole sequence
    branches: list[int]  # TRUNK, or the number of a branch: it sees the trunk and what stands before it in itself
    places: list[int]  # of the state that predicts
    targets: list[int]  # the token that is predicted
    owners: list[int]  # whose it is

    @property
    def plain(self) -> bool:
        """Whether it has no branch."""
        return self.branches[-1] == TRUNK


class Branches:
    """A row that grows."""

    def __init__(self, beginning: int, trunk: Sequence[int]) -> None:
        """`trunk` stands behind a beginning of so many tokens."""
        self._beginning, self._trunk = beginning, list(trunk)
        self._asked: list[tuple[int, int, Sequence[int]]] = []
        self.branched = 0  # tokens in branches, at most

    def add(self, owner: int, context: int, continuation: Sequence[int]) -> None:
        """A continuation behind the first `context` tokens of the whole sequence."""
        self._asked.append((owner, context - self._beginning, continuation))
        self.branched += len(continuation) - 1

    def finished(self) -> Row:
        """The row. A continuation that is alone, or whose tokens stand in the trunk, needs no branch."""
        trunk = list(self._trunk)
        if len(self._asked) == 1:
            _, start, continuation = self._asked[0]
            trunk = trunk[:start] + list(continuation[:-1])
        row = Row(list(trunk), [], [TRUNK] * len(trunk), [], [], [])
        positions = list(range(len(trunk)))
        branch = TRUNK
        for owner, start, continuation in self._asked:
            read = list(continuation[:-1])
            if trunk[start : start + len(read)] == read:
                places = list(range(start - 1, start + len(read)))
            else:
                branch += 1
                first = len(row.ids)
                places = [start - 1, *range(first, first + len(read))]
                row.ids.extend(read)
                row.branches.extend([branch] * len(read))
                positions.extend(range(start, start + len(read)))
            row.places.extend(places)
            row.targets.extend(continuation)
            row.owners.extend([owner] * len(continuation))
        return row._replace(positions=[self._beginning + position for position in positions])


def read_beginning(model: PreTrainedModel, reader: TokenReader, ids: Sequence[int]) -> list[KeysValues]:
    """The keys and values, [1, H, P, D] each layer, of the tokens that all rows share."""
    cache = Behind((), keep=True)
    positions = torch.arange(len(ids), device=model.device).unsqueeze(0)
    seen = _seen(torch.zeros(1, len(ids), dtype=torch.long, device=model.device))
    reader.states(
        torch.tensor([list(ids)], device=model.device),
        attention_mask=Masks(model)(seen, positions, positions),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return cache.seen


def branched_states(
    model: PreTrainedModel, reader: TokenReader, rows: Sequence[Row], beginning: Sequence[KeysValues]
) -> Tensor:
    """What `reader` reads logits from, [B, L, ...], for every token of the rows behind the beginning, if any."""
    longest = max(len(row.ids) for row in rows)

    def padded(column: str, filler: int) -> Tensor:
        lists = [getattr(row, column) for row in rows]
        return torch.tensor([each + [filler] * (longest - len(each)) for each in lists], device=model.device)

    ids = padded("ids", 0)
    if not beginning and all(row.plain for row in rows):
        return reader.states(ids)  # padding stands on the right, where no real token looks
    cache = Behind(beginning)
    before = cache.tokens
    positions, branches = padded("positions", before), padded("branches", PADDING)
    first = torch.arange(before, device=model.device).expand(len(rows), -1)
    masks = Masks(model)(_seen(branches), positions, torch.cat((first, positions), 1))
    return reader.states(
        ids,
        attention_mask=masks,
        position_ids=positions,
        past_key_values=cache if beginning else None,
        use_cache=bool(beginning),
    )


def _seen(branches: Tensor) -> Tensor:
    """Which of its row's tokens a token sees, bool [B, L, L], from the branches of these, [B, L]."""
    length = branches.shape[1]
    mine, others = branches.unsqueeze(2), branches.unsqueeze(1)
    earlier = torch.ones(length, length, dtype=torch.bool, device=branches.device).tril()
    return earlier & ((others == TRUNK) | (others == mine))


# Whether a model can be read so

PROBE_BEGINNING = [3, 1, 4, 1, 5]
PROBE: dict[tuple[int, ...], list[tuple[int, ...]]] = {
    (2, 6): [(5, 3), (5,), (2, 4, 6)],
    (4,): [(3, 3), (6, 1)],
}  # behind it: contexts with continuations


@torch.inference_mode()
def why_not(model: PreTrainedModel, reader: TokenReader) -> str | None:
    """Why the model can't be read in branches behind a beginning; None where it can: it is tried on made-up tokens.

    Of a model that has no numbers (a plan's) the configuration is asked.
    """
    reason = not_keys_and_values(model)
    if reason or is_traced(next(model.parameters())):
        return reason
    try:
        beginning = read_beginning(model, reader, PROBE_BEGINNING)
        for context, continuations in PROBE.items():
            growing = Branches(len(PROBE_BEGINNING), context)
            for owner, continuation in enumerate(continuations):
                growing.add(owner, len(PROBE_BEGINNING) + len(context), continuation)
            row = growing.finished()
            states = branched_states(model, reader, [row], beginning)[0, row.places]
            found = reader.logprobs(states, torch.tensor(row.targets, device=model.device)).tolist()
            for continuation in continuations:
                whole = torch.tensor([[*PROBE_BEGINNING, *context, *continuation]], device=model.device)
                logits = widened(model(input_ids=whole, use_cache=False).logits[0, -len(continuation) - 1 : -1])
                expected = logits.log_softmax(-1).gather(1, whole[0, -len(continuation) :, None]).squeeze(1).tolist()
                off = max(abs(a - b) for a, b in zip(found, expected, strict=False))
                del found[: len(continuation)]
                if off > (TOLERANCE if model.dtype in (torch.float32, torch.float64) else COARSE_TOLERANCE):
                    return f"its log-probabilities come out wrong, by {off:.2g} nats"
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model raises that takes other arguments or asks more of a cache
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return None
