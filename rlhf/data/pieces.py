"""Long texts in pieces: cut behind a blank line, else a line, else a blank, else anywhere."""

from collections.abc import Iterator


def pieces(text: str, longest: int) -> Iterator[str]:
    """The text in pieces of at most `longest` characters, which together are the whole."""
    start = 0
    while len(text) - start > longest:
        end = cut_before(text, start, start + longest)
        yield text[start:end]
        start = end
    yield text[start:]


def cut_before(text: str, start: int, end: int) -> int:
    """The best place to cut in the second half of text[start:end]; `end` where there is none."""
    for mark in ("\n\n", "\n", " "):
        place = text.rfind(mark, start + (end - start) // 2, end)
        if place >= 0:
            return place + len(mark)
    return end
