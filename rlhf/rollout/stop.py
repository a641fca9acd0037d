"""Stop strings: texts that end a response."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

SLACK = 4  # characters: as many as the bytes of one, which may be cut where the window begins


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string in it; the whole text where there is none."""
    places = [text.find(each) for each in stop]
    return text[: min((place for place in places if place >= 0), default=len(text))]


class StopWatch:
    """Reads a response token by token and says whether a stop string is in its text, special tokens left out.

    Only a window of the last tokens is decoded, long enough for every stop string, so that the work for a token does
    not grow with the response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._characters = max(map(len, stop)) + SLACK
        self._window: list[int] = []
        self._found = False

    def add(self, token: int) -> bool:
        """Whether a stop string is in the text so far, this token's included."""
        self._window.append(token)
        text = self._decode(self._window)
        self._found = self._found or any(each in text for each in self._stop)
        if len(text) > 2 * self._characters:
            later = self._window[len(self._window) // 2 :]
            if len(self._decode(later)) >= self._characters:
                self._window = later
        return self._found

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
