"""What an engine is given and what it returns."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Drawing(NamedTuple):
    """How tokens are drawn. The order is: ban on end tokens, temperature, top-k, top-p."""

    max_tokens: int  # longest response, the end token included
    temperature: float = 1.0  # divides the logits
    top_k: int = 0  # only so many most likely tokens can be drawn, and those as likely as the last of them; 0: all
    top_p: float = 1.0  # only the fewest most likely tokens that together reach this share can be drawn
    min_tokens: int = 1  # a response can't end before it has so many tokens, the last included
    stop: tuple[str, ...] = ()  # texts that end a response, as an end token does

    @property
    def restricted(self) -> bool:
        """Whether only a part of the vocabulary can be drawn."""
        return self.top_k > 0 or self.top_p < 1.0


class Response(NamedTuple):
    """What a model answered.

    The log-probabilities are those of the distribution that was really sampled from. Its support is `kept` where top-k
    or top-p is on. Elsewhere it is the whole vocabulary, but that no end token can be drawn at the places t (from 0)
    with t < min_tokens - 1.
    """

    ids: list[int]  # the end token, or the token that completes a stop string, included
    logprobs: list[float]  # nats, one a token
    ended: bool  # by an end token or a stop string, and not by its length
    kept: list[np.ndarray] | None = None  # of each token, the ids that could be drawn in its place: int32, rising


class Engine(Protocol):
    """Whatever draws responses."""

    def generate(self, prompts: Sequence[list[int]], uniforms: np.ndarray) -> list[Response]:
        """A response to each prompt of token ids.

        `uniforms`, float64 [prompts, max_tokens] in [0, 1), decide the draws: the token at place t of response i is the
        one at which the cumulative probability, in the order of the ids, passes uniforms[i, t].
        """
        ...


def uniforms(seed: int, round_number: int, episodes: Sequence[int], max_tokens: int) -> np.ndarray:
    """Numbers in [0, 1), float64 [episodes, max_tokens]: row e depends on (seed, round, episode e) alone.

    Philox is a counter-based generator: each episode has a stream of its own, the same on every machine.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, round_number], counter=[0, 0, 0, episode])).random(max_tokens)
        for episode in episodes
    ]
    return np.stack(rows) if rows else np.zeros((0, max_tokens))
