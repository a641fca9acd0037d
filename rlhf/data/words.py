"""What counts as a word where texts of any language and any tokenizer are compared."""

import re
from collections.abc import Iterator, Sequence

_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W\u3400-\u9fff\uf900-\ufaff]+")  # a Chinese sign is a word


def words_of(text: str) -> list[str]:
    """The words of a text in lower case; each Chinese sign is one."""
    lower = text.lower()
    if len(lower) == len(text) and "Σ" not in text:  # as it is for each word by itself, and faster
        return _WORD.findall(lower)
    return [word.lower() for word in _WORD.findall(text)]


def ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    """All runs of n words; none where there are fewer."""
    return zip(*(words[start:] for start in range(n)), strict=False)
