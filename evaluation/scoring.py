"""Log-probabilities of given continuations under a causal LM: what perplexity and few-shot accuracy are made of.

What requests have in common is read once. The beginning that all contexts of a call share (a task's instruction and
demonstrations) goes through the model alone, and its keys and values serve every row behind it; the continuations of
one context (an item's choices) are branches of one row:

    shared   The news is about   |  row 1   sport :  A   |  branch 1  war ma   (of "war machine": the last token
                                 |                       |  branch 2  peace     is only predicted, not read)
                                 |  row 2   art :  B     |  ...

Rows are sorted by length, padded on the right and batched by a budget of tokens; logits are made where a token is
predicted, nowhere else. Legend: B rows, L tokens of a row, P tokens of the shared beginning, N tokens to be predicted.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from evaluation.branches import Branches, Row, branched_states, read_beginning, why_not
from rlhf.errors import StageFailed
from rlhf.likelihood import TokenReader
from rlhf.rollout.beginning import common_beginning

TOKEN_BUDGET = 8192  # positions of one forward pass, padding included
PAIRS_BUDGET = 2**23  # of a position and another that it looks at, in one forward pass with masks of our own
LONGEST_BRANCH = 16  # tokens, behind a shorter context
MOST_BRANCHED = 32  # tokens in the branches of a row, or twice those before them: branches don't look at each other
BROKEN = "the model's log-probabilities are not numbers: its weights are broken"
LEAST_SAVED = 64  # tokens: for less, a beginning is not read apart


def length_batches(lengths: list[int], budget: int, beginning: int = 0) -> Iterator[list[int]]:
    """Indices in batches of like length; rows x longest length stays within the budget where one row does.

    Behind a `beginning` of so many tokens the pairs of positions stay within theirs as well.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest, rows = lengths[batch[0]] if batch else 0, len(batch) + 1
        if batch and (rows * longest > budget or rows * longest * (beginning + longest) > PAIRS_BUDGET):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class Request(NamedTuple):
    """The tokens to be predicted, and those before them; at least one each."""

    context: Sequence[int]
    continuation: Sequence[int]


class Scorer:
    """Answers requests with one model."""

    def __init__(self, model: PreTrainedModel, *, budget: int = TOKEN_BUDGET, share: bool = True) -> None:
        """`budget`: positions of one forward pass at most. Without `share` each continuation is a row of its own."""
        self.model, self._budget, self._reader = model, budget, TokenReader(model)
        self.why_not_shared = why_not(model, self._reader) if share else "not asked for"
        self._shares = not self.why_not_shared

    @torch.inference_mode()
    def logprobs(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[float]:
        """The summed log-probability, in nats, of each continuation after its context; sums are in float64.

        `progress` is told how many requests are answered.
        """
        beginning, batches = self.batches(requests)
        kept = read_beginning(self.model, self._reader, beginning) if beginning else []
        found = [0.0] * len(requests)
        answered = 0
        for chosen in batches:
            states = branched_states(self.model, self._reader, chosen, kept)
            places = [(row, place) for row, each in enumerate(chosen) for place in each.places]
            targets = torch.tensor([token for each in chosen for token in each.targets], device=states.device)
            index = torch.tensor(places, device=states.device)
            logprobs = self._reader.logprobs(states[index[:, 0], index[:, 1]], targets).double().tolist()
            owners = [owner for each in chosen for owner in each.owners]
            if any(map(math.isnan, logprobs)):
                raise StageFailed(BROKEN)
            for owner, value in zip(owners, logprobs, strict=True):
                found[owner] += value
            answered += len(set(owners))
            if progress:
                progress(answered)
        return found

    def batches(self, requests: Sequence[Request]) -> tuple[list[int], list[list[Row]]]:
        """What all requests begin with, and the rows behind it, as many together as are read at a time."""
        beginning = shared_beginning(requests) if self._shares else []
        rows = self._rows(requests, len(beginning))
        lengths = [len(row.ids) for row in rows]
        return beginning, [
            [rows[number] for number in batch] for batch in length_batches(lengths, self._budget, len(beginning))
        ]

    @torch.inference_mode()
    def matches(self, requests: Sequence[Request]) -> list[int]:
        """How many tokens of each continuation, from its first on, are the likeliest ones after those before them.

        A continuation of which all are is what greedy decoding writes.
        """
        rows = [[*context, *continuation[:-1]] for context, continuation in requests]
        found = [0] * len(requests)
        for batch in length_batches([len(row) for row in rows], self._budget):
            longest = max(len(rows[number]) for number in batch)
            ids = torch.tensor(
                [rows[number] + [0] * (longest - len(rows[number])) for number in batch], device=self.model.device
            )
            states = self._reader.states(ids)
            for row, number in enumerate(batch):
                context, continuation = requests[number]
                places = states[row, len(context) - 1 : len(rows[number])]
                likeliest = self._reader.likeliest(places)
                if bool((likeliest < 0).any()):
                    raise StageFailed(BROKEN)
                right = likeliest == torch.tensor(continuation, device=places.device)
                found[number] = int(right.long().cumprod(0).sum())
        return found

    def _rows(self, requests: Sequence[Request], beginning: int) -> list[Row]:
        """A row for each context, several where it has many continuations; one for each that is longer than that."""
        trunks: dict[tuple[int, ...], list[Branches]] = {}
        for owner, (context, continuation) in enumerate(requests):
            short = len(continuation) <= max(LONGEST_BRANCH, len(context) - beginning)
            trunk = tuple(context) if self._shares and short else (*context, *continuation[:-1])
            rows = trunks.setdefault(trunk, [])
            if not rows or rows[-1].branched + len(continuation) > max(MOST_BRANCHED, 2 * (len(trunk) - beginning)):
                rows.append(Branches(beginning, trunk[beginning:]))
            rows[-1].add(owner, len(context), continuation)
        return [row.finished() for rows in trunks.values() for row in rows]


def shared_beginning(requests: Sequence[Request]) -> list[int]:
    """The tokens with which all contexts begin, less the last token of the shortest; none where it saves little."""
    contexts = {tuple(request.context) for request in requests}
    rows = max(len(contexts), sum(len(request.continuation) for request in requests) // MOST_BRANCHED)
    shared = common_beginning(contexts)
    return shared if len(shared) * (rows - 1) >= LEAST_SAVED else []
