"""A classifier's outputs for rows of unequal length, each as if it had been read alone."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

TOKEN_BUDGET = 8192


class Row(NamedTuple):
    """What a classifier reads of one conversation."""

    ids: list[int]
    segments: list[int] | None = None  # token type ids, for a model that reads a pair of texts


@torch.inference_mode()
def batched_logits(model: PreTrainedModel, rows: Sequence[Row], budget: int = TOKEN_BUDGET) -> list[list[float]]:
    """The outputs for each row, float64, in the order given; about `budget` tokens, padding included, are read at once.

    Padding stands at the right and is masked, so that every token has the place that it has alone, whatever side the
    tokenizer pads on. A decoder takes its output at the last token that isn't its pad, of the row alone as of the
    padded one. One without a pad takes it at the very last token and reads one row at a time; here it is lent a pad
    that no row of the batch ends with.
    """
    found: list[list[float]] = [[] for _ in rows]
    config = model.config.get_text_config()
    own = getattr(config, "pad_token_id", None)
    known = own is not None and 0 <= own < config.vocab_size
    try:
        for batch in _batches([len(row.ids) for row in rows], budget):
            read = [rows[index] for index in batch]
            config.pad_token_id = own if known else _free_id(read)
            logits = model(**_inputs(model, read, config.pad_token_id)).logits
            for index, outputs in zip(batch, logits.double().tolist(), strict=True):
                found[index] = outputs
    finally:
        config.pad_token_id = own
    return found


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Which rows are read together: the longest first, as many as the budget has room for."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        batch = order[start : start + max(1, budget // lengths[order[start]])]
        start += len(batch)
        yield batch


def _free_id(rows: Sequence[Row]) -> int:
    """The smallest id that no row ends with."""
    ends = {row.ids[-1] for row in rows}
    return next(token for token in range(len(ends) + 1) if token not in ends)


def _inputs(model: PreTrainedModel, rows: Sequence[Row], pad: int) -> dict[str, Any]:
    """What the model's forward takes: rows of ids as tensors [B, L]."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    segments = torch.zeros_like(mask)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        mask[place, : len(row.ids)] = 1
        segments[place, : len(row.ids)] = torch.tensor(row.segments or [0])
    found: dict[str, Any] = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    taken = inspect.signature(model.forward).parameters
    if rows[0].segments is not None and "token_type_ids" in taken:
        found["token_type_ids"] = segments.to(model.device)
    if "use_cache" in taken:
        found["use_cache"] = False
    return found
