"""Log-probabilities of given tokens under a causal LM: what perplexity and few-shot accuracy are made of.

Sequences are sorted by length, padded on the right and batched by a budget of tokens; a causal model's real positions
never see the padding. Legend: B rows, L positions, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from transformers import PreTrainedModel

TOKEN_BUDGET = 8192  # positions of one forward pass, padding included


def length_batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices in batches of like length; rows x longest length stays within the budget where one row does."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def continuation_logprobs(
    model: PreTrainedModel,
    contexts: list[list[int]],
    continuations: list[list[int]],
    *,
    budget: int = TOKEN_BUDGET,
    progress: Callable[[int], None] | None = None,
) -> list[float]:
    """The summed log-probability, in nats (float64 sums), of each continuation after its context.

    Requests that need the same forward pass share it: all one-token continuations of a context are read off once.
    `contexts` and `continuations` hold at least one token each. `progress` is told how many requests are answered.
    """
    passes: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        passes.setdefault((*context, *continuation[:-1]), []).append(index)
    sequences = list(passes)
    found = [0.0] * len(contexts)
    answered = 0
    pad = model.config.pad_token_id or 0
    for batch in length_batches([len(sequence) for sequence in sequences], budget):
        longest = len(sequences[batch[0]])
        ids = torch.full((len(batch), longest), pad, dtype=torch.long)
        rows, positions, targets, owners = [], [], [], []
        for row, number in enumerate(batch):
            sequence = sequences[number]
            ids[row, : len(sequence)] = torch.tensor(sequence)
            for owner in passes[sequence]:
                first = len(contexts[owner]) - 1
                for offset, token in enumerate(continuations[owner]):
                    rows.append(row)
                    positions.append(first + offset)
                    targets.append(token)
                    owners.append(owner)
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        wanted = logits[torch.tensor(rows), torch.tensor(positions)].float()  # [requests' tokens, V]
        logprobs = wanted.log_softmax(-1).cpu()[torch.arange(len(rows)), torch.tensor(targets)].double()
        for owner, value in zip(owners, logprobs.tolist(), strict=True):
            found[owner] += value
        answered += sum(len(passes[sequences[number]]) for number in batch)
        if progress:
            progress(answered)
    return found
