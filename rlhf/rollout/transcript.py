"""What has been drawn for each prompt so far: engines hand logits in, the transcript draws and knows what is over.

B rows of a batch, V vocabulary; an episode is a prompt's place among those given to the engine.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.errors import StageFailed
from rlhf.rollout.draws import draw_tokens
from rlhf.rollout.protocol import Drawing, Response
from rlhf.rollout.stop import StopWatch


class Ends:
    """What ends a response: end tokens, and stop strings. A stop string that is a special token is found as its id."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: list[int], stop: tuple[str, ...]) -> None:
        special = {text: number for number, text in _special_tokens(tokenizer).items()}
        self.banned = sorted(end_ids)  # before min_tokens
        self.ids = np.array(sorted({*end_ids, *(special[text] for text in stop if text in special)}), dtype=np.int64)
        self._texts = [text for text in stop if text not in special]
        self._tokenizer = tokenizer

    def watches(self, responses: int) -> list[StopWatch] | None:
        """One for each response; None where only tokens end them."""
        return [StopWatch(self._tokenizer, self._texts) for _ in range(responses)] if self._texts else None


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    added = tokenizer.added_tokens_decoder.items()
    return {number: token.content for number, token in added if token.special}


class Transcript:
    """The responses to some prompts while they grow."""

    def __init__(self, drawing: Drawing, ends: Ends, prompts: Sequence[list[int]], uniforms: np.ndarray) -> None:
        """`uniforms` [prompts, max_tokens] in [0, 1) decide the draws. Raises ValueError where the two don't agree."""
        episodes = len(prompts)
        if uniforms.shape != (episodes, drawing.max_tokens):
            raise ValueError(f"uniforms are {uniforms.shape}, not {(episodes, drawing.max_tokens)}")
        if not all(prompts):
            raise ValueError(f"prompt {next(i for i in range(episodes) if not prompts[i])} has no token")
        self._drawing, self._uniforms = drawing, uniforms
        self._banned = torch.tensor(ends.banned, dtype=torch.int64)
        self._end_ids, self._watches = ends.ids, ends.watches(episodes)
        self._counts = np.zeros(episodes, dtype=np.int64)
        self._ids = np.zeros((episodes, drawing.max_tokens), dtype=np.int64)
        self._logprobs = np.zeros((episodes, drawing.max_tokens), dtype=np.float32)
        self._ended = np.zeros(episodes, dtype=np.bool_)
        self.over = 0  # how many responses are
        self._kept: list[list[np.ndarray]] | None = [[] for _ in range(episodes)] if drawing.restricted else None

    def draw(self, logits: Tensor, episodes: np.ndarray, living: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The next token of each row, int64 [B], and whether its response is over now, bool [B].

        `logits` [B, V]; `episodes`, int64 [B], says whose row it is. What is drawn in a row that is not `living`, bool
        [B], is thrown away. Raises StageFailed where the logits are no numbers.
        """
        places = np.minimum(self._counts[episodes], self._drawing.max_tokens - 1)
        draws = torch.from_numpy(self._uniforms[episodes, places]).to(logits.device)
        drawn = draw_tokens(logits, draws, self._drawing, self._ban(places, logits.device))
        tokens, logprobs = torch.stack((drawn.tokens.double(), drawn.logprobs.double())).cpu().numpy()
        tokens = tokens.astype(np.int64)
        if not np.isfinite(logprobs[living]).all():
            raise StageFailed("the model's logits are not finite: its weights are damaged, or training has diverged")
        mine = episodes[living]
        self._ids[mine, places[living]] = tokens[living]
        self._logprobs[mine, places[living]] = logprobs[living]
        self._counts[mine] += 1
        if self._kept is not None and drawn.support is not None:
            for episode, kept in zip(mine.tolist(), _ids_of(drawn.support, living), strict=True):
                self._kept[episode].append(kept)
        return tokens, self._over(tokens, episodes, living)

    def responses(self) -> list[Response]:
        """All of them, once they are over."""
        return [
            Response(
                self._ids[episode, :count].tolist(),
                self._logprobs[episode, :count].tolist(),
                bool(self._ended[episode]),
                self._kept[episode] if self._kept is not None else None,
            )
            for episode, count in enumerate(self._counts.tolist())
        ]

    def _ban(self, places: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor] | None:
        if places.min() >= self._drawing.min_tokens - 1:
            return None
        rows = torch.from_numpy(places < self._drawing.min_tokens - 1)
        return rows.to(device), self._banned.to(device)

    def _over(self, tokens: np.ndarray, episodes: np.ndarray, living: np.ndarray) -> np.ndarray:
        ended = (tokens[:, None] == self._end_ids).any(1)
        if self._watches is not None:
            for row in living.nonzero()[0].tolist():
                ended[row] |= self._watches[episodes[row]].add(int(tokens[row]))
        counts = self._counts[episodes]
        ended &= living & (counts >= self._drawing.min_tokens)
        self._ended[episodes[ended]] = True
        over: np.ndarray = living & (ended | (counts >= self._drawing.max_tokens))
        self.over += int(over.sum())
        return over


def _ids_of(support: Tensor, living: np.ndarray) -> list[np.ndarray]:
    """The ids that could be drawn in each living row."""
    rows = support[torch.from_numpy(living).to(support.device)]
    ids = rows.nonzero()[:, 1].to(torch.int32).cpu().numpy()
    return np.split(ids, rows.sum(1).cumsum(0).cpu().numpy())[:-1]
