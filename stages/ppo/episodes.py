"""Episodes, one by one and as tensors.

Legend: B episodes, L positions of prompt and response, T positions of response.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.functional.ppo import Advantages
from rlhf.judge import Conversation
from rlhf.recipe import PpoSection, Recipe
from rlhf.rollout import Response, cut_at_stop
from rlhf.runtime import device
from rlhf.tokenizer import Messages, encode_prompt
from stages.common import context_of, fitting, open_data, report_faults


class Prompt(NamedTuple):
    """A prompt as messages and as the ids after which the policy answers."""

    messages: Messages
    ids: list[int]


class Vocabulary(NamedTuple):
    """Tokens and texts, as the policy has them."""

    tokenizer: PreTrainedTokenizerBase
    end_ids: list[int]
    stop: tuple[str, ...] = ()  # texts that end a response

    @property
    def pad_id(self) -> int:
        """The pad token's."""
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    def conversation(self, prompt: Prompt, response: Response) -> Conversation:
        """What a judge reads: messages, the response as text up to a stop string, without special tokens; the ids."""
        text = self.tokenizer.decode(response.ids, skip_special_tokens=True)
        return Conversation(prompt.messages, cut_at_stop(text, self.stop), prompt.ids + response.ids)


class Episode(NamedTuple):
    """A prompt with its response, and what the models say of it; a float for each of the response's tokens."""

    prompt: Prompt
    response: Response
    score: float  # the judge's, nothing done to it yet
    judged: dict[str, float]  # further figures of the judge
    gold: float | None
    reference: list[float]  # log-probabilities of the reference
    values: list[float]  # of the critic, before the update

    @property
    def tokens(self) -> int:
        """Of prompt and response."""
        return len(self.prompt.ids) + len(self.response.ids)


class Trajectory(NamedTuple):
    """The episodes of one update, rows of equal shape.

    Prompt and response stand at the left, padding at the right. `mask` is True for real response tokens, the end token
    included; behind it the other [B, T] tensors hold zeros.
    """

    ids: Tensor  # [B, L] int64
    prompt_lengths: Tensor  # [B] int64
    mask: Tensor  # [B, T] bool
    logprobs: Tensor  # [B, T] of the policy that drew the tokens
    reference: Tensor  # [B, T] log-probabilities of the reference
    values: Tensor  # [B, T] of the critic before the update
    advantages: Tensor  # [B, T] whitened
    returns: Tensor  # [B, T]
    kept: tuple[
        Sequence[np.ndarray] | None, ...
    ]  # of each episode: the ids that could be drawn at each token, None: all

    def rows(self, index: Tensor) -> "Trajectory":
        """The episodes at these places, cut to the longest of them."""
        mask, prompt_lengths = self.mask[index], self.prompt_lengths[index]
        longest, whole = int(mask.sum(1).max()), int((prompt_lengths + mask.sum(1)).max())

        def cut(field: Tensor) -> Tensor:
            return field[index, :longest]

        return Trajectory(
            self.ids[index, :whole],
            prompt_lengths,
            mask[:, :longest],
            cut(self.logprobs),
            cut(self.reference),
            cut(self.values),
            cut(self.advantages),
            cut(self.returns),
            tuple(self.kept[place] for place in index.tolist()),
        )

    def with_advantages(self, found: Advantages) -> "Trajectory":
        """The same episodes, with these advantages and returns."""
        return self._replace(advantages=found.advantages, returns=found.returns)

    @property
    def lengths(self) -> Tensor:
        """Real tokens of prompt and response, [B]."""
        return self.prompt_lengths + self.mask.sum(1)

    def places(self, offset: int) -> Tensor:
        """Positions [B, T] of the response's tokens, moved by `offset`; behind the mask they are some real place's."""
        steps = torch.arange(self.mask.shape[1], device=self.ids.device)
        return (self.prompt_lengths.unsqueeze(1) + steps + offset).clamp(max=self.ids.shape[1] - 1)

    def tokens(self) -> Tensor:
        """The response's token ids, [B, T]."""
        return self.ids.gather(1, self.places(0))

    def allowed(self) -> "Support | None":
        """Which tokens could be drawn at the real response positions, row after row; None: all of them everywhere."""
        if all(kept is None for kept in self.kept):
            return None
        return Support([ids for kept in self.kept if kept is not None for ids in kept])


class Support:
    """The ids that could be drawn at each of N tokens."""

    def __init__(self, kept: Sequence[np.ndarray]) -> None:
        self._kept = kept

    def hide_others(self, logits: Tensor, start: int) -> Tensor:
        """Logits [n, V] of the tokens from `start` on, minus infinity where nothing could be drawn."""
        kept = self._kept[start : start + len(logits)]
        rows = torch.from_numpy(np.repeat(np.arange(len(kept)), [len(ids) for ids in kept]))
        columns = torch.from_numpy(np.concatenate(kept).astype(np.int64))
        allowed = torch.zeros(logits.shape, dtype=torch.bool)
        allowed[rows, columns] = True
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))


def pack_episodes(episodes: Sequence[Episode], pad: int, like: PreTrainedModel) -> Trajectory:
    """The episodes as one Trajectory, on the device, whose advantages and returns are still zero."""
    dtype, where = torch.promote_types(like.dtype, torch.float32), device()
    responses = [episode.response for episode in episodes]
    prompts = [len(episode.prompt.ids) for episode in episodes]
    whole, longest = max(episode.tokens for episode in episodes), max(len(response.ids) for response in responses)
    ids = torch.full((len(episodes), whole), pad)
    mask = torch.zeros(len(episodes), longest, dtype=torch.bool)
    for row, episode in enumerate(episodes):
        ids[row, : episode.tokens] = torch.tensor(episode.prompt.ids + episode.response.ids)
        mask[row, : len(episode.response.ids)] = True

    def rows_of(values: Sequence[list[float]]) -> Tensor:
        rows = torch.zeros(mask.shape, dtype=dtype)
        for row, found in zip(rows, values, strict=True):
            row[: len(found)] = torch.tensor(found, dtype=dtype)
        return rows.to(where)

    return Trajectory(
        ids.to(where),
        torch.tensor(prompts, device=where),
        mask.to(where),
        rows_of([response.logprobs for response in responses]),
        rows_of([episode.reference for episode in episodes]),
        rows_of([episode.values for episode in episodes]),
        torch.zeros(mask.shape, dtype=dtype, device=where),
        torch.zeros(mask.shape, dtype=dtype, device=where),
        tuple(response.kept for response in responses),
    )


def microbatches_of(lengths: Sequence[int], tokens: int, most: int, ranks: int) -> list[list[int]]:
    """Rows of one forward pass of all ranks together: of like length, few enough for a budget on every rank.

    `lengths` are the rows' real tokens. A pass holds at most `tokens` tokens, padding included, and `most` rows on each
    rank, but at least one row.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    parts: list[list[int]] = []
    for row in order:
        part = parts[-1] if parts else []
        longest = lengths[part[0]] if part else 0
        mine = -(-(len(part) + 1) // ranks)  # rows of a rank, with this one
        if part and mine <= most and mine * longest <= tokens:
            part.append(row)
        else:
            parts.append([row])
    return parts


def read_prompts(
    recipe: Recipe,
    settings: PpoSection,
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    key: str,
) -> list[Prompt]:
    """The prompts of `ppo.KEY` that leave room for a response."""
    dataset: Any = open_data(recipe, "ppo", getattr(settings, key), "prompts", "test" if "test" in key else "train")
    found = [Prompt(messages, encode_prompt(tokenizer, messages)) for messages in dataset]
    report_faults(dataset)
    return fitting(
        found, lambda prompt: len(prompt.ids), context_of(policy), settings.sampling.max_tokens, f"ppo.{key}"
    )
