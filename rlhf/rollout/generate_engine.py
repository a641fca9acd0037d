"""The second engine: transformers.generate, for architectures whose state is more than keys and values.

The draws are ours, so it gives the same responses as our own engine, ties within rounding aside; it is slower.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from rlhf.rollout.base import BaseEngine
from rlhf.rollout.modes import evaluating
from rlhf.rollout.transcript import Transcript


class GenerateEngine(BaseEngine):
    """For any model with transformers' `generate`. Only prompts of one length share a batch: none is ever padded."""

    @torch.no_grad()
    def _fill(self, transcript: Transcript, prompts: Sequence[list[int]]) -> None:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        with evaluating(self._model), _nothing_inherited(self._model):
            for _, group in groupby(order, key=lambda i: len(prompts[i])):
                same = np.array(list(group))
                for start in range(0, len(same), self._batch_size):
                    self._batch(prompts, same[start : start + self._batch_size], transcript)
                    if self._progress:
                        self._progress(transcript.over)

    def _batch(self, prompts: Sequence[list[int]], episodes: np.ndarray, transcript: Transcript) -> None:
        ids = torch.tensor([prompts[episode] for episode in episodes], device=self._model.device)
        chooser = _Chooser(transcript, episodes)
        self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=self._drawing.max_tokens, do_sample=False, pad_token_id=self._pad
            ),
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([_AllOver(chooser)]),
        )


class _Chooser(LogitsProcessor):
    """Draws the next tokens, and leaves the model no other choice."""

    def __init__(self, transcript: Transcript, episodes: np.ndarray) -> None:
        self._transcript, self._episodes = transcript, episodes
        self.living = np.ones(len(episodes), dtype=np.bool_)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, over = self._transcript.draw(scores, self._episodes, self.living)
        self.living &= ~over
        chosen = torch.from_numpy(tokens).to(scores.device).unsqueeze(1)
        return torch.full_like(scores, float("-inf")).scatter_(1, chosen, 0.0)


class _AllOver(StoppingCriteria):
    """Tells generate which rows are over."""

    def __init__(self, chooser: _Chooser) -> None:
        self._chooser = chooser

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return torch.from_numpy(~self._chooser.living).to(input_ids.device)


@contextmanager
def _nothing_inherited(model: PreTrainedModel) -> Iterator[None]:
    """The model without its own generation configuration: generate fills what it isn't given from there.

    So a saved repetition penalty, or an end token that the user has not asked for, would change the draws.
    """
    wrapped = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT hands its own on
    own = [(each, each.generation_config) for each in (model, wrapped)]
    model.generation_config = GenerationConfig()
    wrapped.generation_config = model.generation_config
    try:
        yield
    finally:
        for each, configuration in own:
            each.generation_config = configuration
