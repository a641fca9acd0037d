"""Our engine: a loop over a KV cache of slots that returns log-probabilities on the way.

Prompts are prefilled once, in groups sorted by length, so that little is padded, and what all of them begin with (a
task's demonstrations) is read once for all. A row whose response is over gives its place to the next prompt (continuous
batching: Yu et al. 2022, "Orca"), and when none is left, the batch shrinks. The randomness of a token depends on its
place in `uniforms` alone, so a response does not depend on what is drawn beside it, ties within rounding aside.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from rlhf.model import accelerator_bytes
from rlhf.rollout.base import BaseEngine
from rlhf.rollout.beginning import common_beginning
from rlhf.rollout.decoder import Decoder
from rlhf.rollout.modes import evaluating, without_inference_tensors
from rlhf.rollout.slots import KeysValues
from rlhf.rollout.transcript import Transcript

PREFILL_TOKENS = 16384  # of one forward pass, padding included
CACHE_BYTES = 2**29  # of keys and values; on an accelerator:
CACHE_SHARE = 1 / 4  # of its memory
IDLE_SHARE = 1 / 8  # rows that are over are replaced or leave once they are so many of the batch


class CacheEngine(BaseEngine):
    """For decoder-only models whose cache is keys and values."""

    def _fill(self, transcript: Transcript, prompts: Sequence[list[int]]) -> None:
        with without_inference_tensors(self._model), evaluating(self._model), torch.inference_mode():
            columns = max(map(len, prompts), default=0) + self._drawing.max_tokens
            bytes_ = accelerator_bytes(self._model.device, CACHE_SHARE) or CACHE_BYTES
            decoder = Decoder(self._model, min(self._batch_size, len(prompts)), columns, bytes_)
            shared = common_beginning(prompts)
            shared = shared if len(prompts) > 1 and len(shared) >= self.least_shared else []
            batch = _Batch(decoder, prompts, shared, transcript, bytes_ // 4 // decoder.token_bytes)
            while batch.going:
                before = transcript.over
                batch.advance()
                if self._progress and transcript.over > before:
                    self._progress(transcript.over)


class _Batch:
    """The rows that are being drawn, each in its slot. The arrays are int64 or bool, [slots]."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[list[int]],
        shared: list[int],
        transcript: Transcript,
        kept_tokens: int,
    ) -> None:
        """`shared` is what all prompts begin with; of `kept_tokens` keys and values are held beside the slots."""
        self._decoder, self._prompts, self._transcript, slots = decoder, prompts, transcript, decoder.slots
        self._shared, self._kept_tokens = len(shared), kept_tokens
        self._beginning = decoder.prefill([shared])[1] if shared else []
        self._waiting = deque(sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i)))
        self._episodes, self._tokens, self._positions = np.zeros((3, slots), dtype=np.int64)
        self._living = np.zeros(slots, dtype=np.bool_)
        self._group: list[KeysValues] = []  # keys and values of prompts that have been prefilled
        self._ready: deque[tuple[int, int, int]] = deque()  # of those without a place: row, episode, first token

    @property
    def going(self) -> bool:
        """Whether any response is not over."""
        return bool(self._waiting or self._ready or self._living.any())

    def advance(self) -> None:
        """One token more for every row, after those that are over have been replaced or have left."""
        idle = len(self._living) - int(self._living.sum())
        if idle and idle >= IDLE_SHARE * len(self._living):
            if not self._ready and self._waiting:
                self._prefill()
            if self._ready:
                self._join()
            elif not self._waiting:
                self._shrink()
        if self._living.any():
            self._step()

    def _prefill(self) -> None:
        """Draws the first tokens of the next prompts; they take places as these become free."""
        episodes = [self._waiting.popleft()]
        while self._waiting and len(episodes) < self._decoder.slots:
            longest, rows = len(self._prompts[self._waiting[0]]), len(episodes) + 1
            if (longest - self._shared) * rows > PREFILL_TOKENS or longest * rows > self._kept_tokens:
                break
            episodes.append(self._waiting.popleft())
        rests = [self._prompts[episode][self._shared :] for episode in episodes]
        logits, self._group = self._decoder.prefill(rests, self._beginning)
        tokens, over = self._transcript.draw(logits, np.array(episodes), np.ones(len(episodes), dtype=np.bool_))
        self._ready.extend((row, episodes[row], int(tokens[row])) for row in (~over).nonzero()[0].tolist())

    def _join(self) -> None:
        free = (~self._living).nonzero()[0][: len(self._ready)]
        rows, episodes, tokens = zip(*(self._ready.popleft() for _ in free), strict=True)
        self._decoder.join(self._group, rows, free.tolist())
        self._episodes[free], self._tokens[free], self._living[free] = episodes, tokens, True
        self._positions[free] = [len(self._prompts[episode]) for episode in episodes]

    def _shrink(self) -> None:
        """Lets the rows that are over go: the last living ones move to their places."""
        left = int(self._living.sum())
        targets, sources = (~self._living[:left]).nonzero()[0], left + self._living[left:].nonzero()[0]
        if len(sources):
            self._decoder.move(sources.tolist(), targets.tolist())
        for array in (self._episodes, self._tokens, self._positions, self._living):
            array[targets] = array[sources]
        self._episodes, self._tokens = self._episodes[:left], self._tokens[:left]
        self._positions, self._living = self._positions[:left], self._living[:left]

    def _step(self) -> None:
        inputs = torch.from_numpy(np.stack((self._tokens, self._positions))).to(self._decoder.device)
        logits = self._decoder.step(inputs[0], inputs[1], int(self._positions.max()) + 1)
        self._tokens, over = self._transcript.draw(logits, self._episodes, self._living)
        self._living = self._living & ~over
        self._positions = np.where(self._living, self._positions + 1, 0)
