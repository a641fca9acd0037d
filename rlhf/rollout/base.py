"""What the engines have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.rollout.protocol import Drawing, Response
from rlhf.rollout.transcript import Ends, Transcript

LEAST_SHARED = 32  # tokens


class BaseEngine(ABC):
    """An Engine that lets a model fill a transcript.

    `least_shared`: what all prompts of a call begin with is read once for all where it is at least so many tokens, by
    an engine that can.
    """

    least_shared = LEAST_SHARED

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        drawing: Drawing,
        *,
        end_ids: Sequence[int],
        batch_size: int = 256,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """`end_ids` end a response; no more than `batch_size` are drawn at a time.

        `progress` is told how many are over, whenever there are more.
        """
        self._model, self._drawing, self._batch_size, self._progress = model, drawing, batch_size, progress
        self._ends, self._pad = Ends(tokenizer, list(end_ids), drawing.stop), tokenizer.pad_token_id

    def generate(self, prompts: Sequence[list[int]], uniforms: np.ndarray) -> list[Response]:
        """See Engine. A response has at least one token and at most `max_tokens`."""
        transcript = Transcript(self._drawing, self._ends, prompts, uniforms)
        self._fill(transcript, prompts)
        return transcript.responses()

    @abstractmethod
    def _fill(self, transcript: Transcript, prompts: Sequence[list[int]]) -> None:
        """Draws token after token for every prompt until all responses are over."""
