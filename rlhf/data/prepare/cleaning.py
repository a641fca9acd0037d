"""Texts mended before they are learned from: encoding faults, line ends, control characters, Unicode, white space.

What a language model is to learn stays as it is: no case is folded, no word dropped, no run of spaces inside a line or
at its beginning touched (code and poems need them). Each step is counted by the documents that it changed.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping

import ftfy

# UTF-8 that was read as another encoding gives two or more of these in a row, a lone one of C1 is such a byte as well
_SUSPICIOUS = re.compile("[\x80-\x9f]|[\xa0-\u04ff\u2000-\u25ff]{2}")
_LINE_ENDS = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_TERMINAL = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\))")  # colours, titles
# but tab and LF; the rest is what Unicode has given up or what marks a file (as ftfy has it)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u206a-\u206f\ufeff\ufff9-\ufffc]")
_BLANKS = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f]")  # the ideographic space is a sign of its own
_BLANK_LINES = re.compile("\n{3,}")
_ENDS = " \t\u3000"


def _encoding(text: str) -> str:
    if text.isascii() or not _SUSPICIOUS.search(text):
        return text
    return "\n".join(ftfy.fix_encoding(line) if _SUSPICIOUS.search(line) else line for line in text.split("\n"))


def _line_ends(text: str) -> str:
    return _LINE_ENDS.sub("\n", text)


def _control_characters(text: str) -> str:
    if "\x1b" in text:
        text = _TERMINAL.sub("", text)
    return _CONTROL.sub("", text)


def _unicode(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _white_space(text: str) -> str:
    spaced = text if text.isascii() else _BLANKS.sub(" ", text)
    lines = (line.rstrip(_ENDS) for line in spaced.split("\n"))  # a pattern would need the square of a run's length
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")


STEPS: Mapping[str, Callable[[str], str]] = {  # in this order: C1 characters may be what is left of a wrong encoding
    "encoding": _encoding,
    "line_ends": _line_ends,
    "control_characters": _control_characters,
    "unicode": _unicode,
    "white_space": _white_space,
}


def clean(text: str, steps: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The text after these steps, and which of them changed it."""
    changed = []
    for name in steps:
        cleaned = STEPS[name](text)
        if cleaned != text:
            changed.append(name)
            text = cleaned
    return text, tuple(changed)
