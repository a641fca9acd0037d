"""Which documents are removed for what they are: Gopher's rules (Rae et al. 2021, arXiv:2112.11446, A.1.1), and ours.

A rule measures a document and has a limit; the first rule in the order of RULES that a document breaks removes it. The
paper's rules were made for web pages of 50 words or more in languages that put spaces between words, so here

- shorter documents are judged by the first three rules alone (`from_words`);
- in Chinese, Japanese, Thai and the like, where the words that are counted are signs, two of them make one of the
  paper's words, and no mean length of words is judged;
- code, told by its lines, is not judged by rules on words, signs and repeated words;
- elsewhere a word is what stands between blanks, as in the paper, but for lone punctuation, so that text whose
  punctuation was set apart for a tokenizer is not taken for a table.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rlhf.data.pieces import pieces
from rlhf.data.prepare.repetition import NAMES, repeated_shares

PIECE = 2**20  # characters; a longer document is measured in pieces, its repeated words within each
NO_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)
LOST = re.compile("\ufffd|锟斤拷")  # the second is what becomes of it when UTF-8 is read as GBK
ELLIPSES = re.compile(r"\.{3,}|…+")
PUNCTUATION = re.compile(r"[.,;:!?'\"()\[\]\-–—“”‘’„«»…@=]+")  # `@-@` and `=` as wikitext sets them
BULLET = re.compile(r"[•●○▪‣⁃·\-*–—]\s")
STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
CODE_LINE = re.compile(  # how a line of code begins or ends, or what only code has inside
    r"^\s*(?:(?:def|class|import|from|return|if|elif|else|for|while|try|except|with|public|private|protected|static|void|"
    r"int|const|var|let|function|func|fn|struct|enum|package|using|namespace|end|raise|throw|case)\b.*[:;{(=)]|"
    r"#\s*(?:include|define|ifn?def|endif|pragma)|//|/\*|\*/|\}|</?[a-zA-Z][^>]*>\s*$|@\w+$)"
    r"|[;{}]\s*(?://.*)?$|\)\s*:\s*$|\w\(.*\)\s*[;,]?\s*$|\w\s*(?:=|==|!=|\+=|-=|:=|<-|=>)\s*\S.*[\w\])}\"'],?$|::\w"
)
CODE_SHARE, CODE_LINES = 0.4, 3  # from which share of lines on, and how many, a document is code
SIGNS = 2  # of a script without spaces, in a word
NO_SPACES_SHARE = 0.2  # of the characters, from which on words have no length


class Rule(NamedTuple):
    """A rule: a document is removed whose measure lies beyond the limit."""

    name: str  # as in the recipe
    measure: str
    least: bool  # whether the limit is the least that is kept, or the most
    short: bool = False  # whether it judges documents of few words
    code: bool = True  # whether it judges code
    no_spaces: bool = True  # whether it judges text without spaces between words


RULES = (
    Rule("min_words", "words", True, short=True),
    Rule("max_words", "words", False, short=True),
    Rule("replacement_characters", "replacement_characters", False, short=True),
    Rule("min_mean_word_length", "mean_word_length", True, code=False, no_spaces=False),
    Rule("max_mean_word_length", "mean_word_length", False, code=False, no_spaces=False),
    Rule("hashes", "hashes", False, code=False),
    Rule("ellipses", "ellipses", False, code=False),
    Rule("bullet_lines", "bullet_lines", False),
    Rule("ellipsis_lines", "ellipsis_lines", False),
    Rule("min_alphabetic", "alphabetic", True, code=False),
    Rule("stop_words", "stop_words", True, code=False),
    Rule("duplicate_lines", "duplicate_lines", False),
    Rule("duplicate_paragraphs", "duplicate_paragraphs", False),
    Rule("duplicate_line_characters", "duplicate_line_characters", False),
    Rule("duplicate_paragraph_characters", "duplicate_paragraph_characters", False),
    *(Rule(name, name, False, code=False) for name in NAMES),
)
Limits = Mapping[str, float]  # of the rules that are on


class Verdict(NamedTuple):
    """Why a document is removed."""

    rule: str
    value: float  # what was measured


Words = Sequence[list[str]]  # of a document: those of each of its pieces, as rlhf.data.words has them


def judge(documents: Sequence[str], words: Sequence[Words], limits: Limits, from_words: int) -> list[Verdict | None]:
    """The rule that each document breaks, None for those that are kept; the documents' words are known already."""
    verdicts: list[Verdict | None] = []
    waiting: dict[str, list[int]] = {"spaces": [], "no_spaces": []}  # for what is faster for many at a time
    for number, (text, found) in enumerate(zip(documents, words, strict=True)):
        count = sum(map(len, found))
        lost = len(LOST.findall(text)) / max(len(text), 1) if not text.isascii() else 0.0
        kind = _kind(text, count, from_words)
        verdict = _first(RULES, {"words": count, "replacement_characters": lost}, limits, kind)
        if not verdict and "short" not in kind:
            verdict = _first(RULES, _measured(text, found), limits, kind)
            if not verdict and "code" not in kind:
                waiting["no_spaces" if "no_spaces" in kind else "spaces"].append(number)
        verdicts.append(verdict)
    if limits.keys() & set(NAMES):
        for unit, numbers in ((1, waiting["spaces"]), (SIGNS, waiting["no_spaces"])):
            measured = _repetition([words[number] for number in numbers], unit)
            for number, shares in zip(numbers, measured, strict=True):
                verdicts[number] = _first(RULES, shares, limits, set())
    return verdicts


def _first(rules: Iterable[Rule], measures: Mapping[str, float], limits: Limits, kind: set[str]) -> Verdict | None:
    """The first of the rules that judges this kind of document, knows its measure, and is broken."""
    for rule in rules:
        value, limit = measures.get(rule.measure), limits.get(rule.name)
        if value is None or limit is None:
            continue
        excused = (
            ("short" in kind and not rule.short)
            or ("code" in kind and not rule.code)
            or ("no_spaces" in kind and not rule.no_spaces)
        )
        if not excused and (value < limit if rule.least else value > limit):
            return Verdict(rule.name, value)
    return None


def _kind(text: str, words: int, from_words: int) -> set[str]:
    if words < from_words:
        return {"short"}
    kind = {"code"} if is_code(text) else set()
    if has_no_spaces(text):
        kind |= {"no_spaces", "short"} if words < SIGNS * from_words else {"no_spaces"}
    return kind


def has_no_spaces(text: str) -> bool:
    """Whether a good part of the text is in a script that puts no spaces between words."""
    if text.isascii():
        return False
    return sum(map(len, NO_SPACES.findall(text))) >= NO_SPACES_SHARE * len(text)


def is_code(text: str) -> bool:
    """Whether the text is code rather than prose, by its lines; of a long one its beginning decides."""
    lines = [line for line in text[:PIECE].split("\n") if line and not line.isspace()]
    found = sum(CODE_LINE.search(line[:200]) is not None for line in lines)
    return found >= CODE_LINES and found >= CODE_SHARE * len(lines)


class _Kinds(dict[str, int]):
    """What a word is made of: twice its length, 0 for lone punctuation, and 1 more where it holds a letter."""

    def __missing__(self, word: str) -> int:
        if len(self) >= 2**18:
            self.clear()
        letter = any(map(str.isalpha, word))
        kind = self[word] = (2 * len(word) if letter or not PUNCTUATION.fullmatch(word) else 0) + letter
        return kind


_kinds = _Kinds()


def _measured(text: str, words: Words) -> dict[str, float]:
    """The measures of words, signs, lines and paragraphs."""
    characters = count = alphabetic = hashes = ellipses = 0
    stop_words: set[str] = set()
    for piece, known in zip(pieces(text, PIECE), words, strict=True):
        found = known if has_no_spaces(piece) else piece.split()
        kinds = np.fromiter(map(_kinds.__getitem__, found), dtype=np.int64, count=len(found))
        characters += int((kinds >> 1).sum())
        count += int((kinds > 1).sum())
        alphabetic += int((kinds & 1).sum())
        hashes += piece.count("#")
        ellipses += len(ELLIPSES.findall(piece))
        stop_words |= STOP_WORDS.intersection(known)
    in_all = max(sum(map(len, words)), 1)
    return {
        "mean_word_length": characters / max(count, 1),
        "hashes": hashes / in_all,
        "ellipses": ellipses / in_all,
        "alphabetic": alphabetic / max(count, 1),
        "stop_words": len(stop_words),
        **_lines(text),
    }


def _lines(text: str) -> dict[str, float]:
    """The measures of lines and paragraphs. A line without a letter or digit (a brace, a rule) repeats nothing."""
    lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
    bullets = sum(BULLET.match(line) is not None for line in lines)
    ends = sum(line.endswith(("...", "…")) for line in lines)
    paragraphs = [stripped for part in re.split(r"\n\s*\n", text) if (stripped := part.strip())]
    return {
        "bullet_lines": bullets / max(len(lines), 1),
        "ellipsis_lines": ends / max(len(lines), 1),
        **_duplicates([line for line in lines if any(map(str.isalnum, line))], "line"),
        **_duplicates(paragraphs, "paragraph"),
    }


def _duplicates(parts: Sequence[str], name: str) -> dict[str, float]:
    seen: set[str] = set()
    again = characters = 0
    for part in parts:
        if part in seen:
            again, characters = again + 1, characters + len(part)
        seen.add(part)
    return {
        f"duplicate_{name}s": again / max(len(parts), 1),
        f"duplicate_{name}_characters": characters / max(sum(map(len, parts)), 1),
    }


def _repetition(documents: Sequence[Words], unit: int) -> list[dict[str, float]]:
    """The measures of repeated words; of a document in several pieces the mean over their words."""
    parts = [(number, piece) for number, found in enumerate(documents) for piece in found]
    totals = [max(sum(map(len, found)), 1) for found in documents]
    measures = [dict.fromkeys(NAMES, 0.0) for _ in documents]
    for batch in _batches(parts, most=2**18):
        shares = repeated_shares([piece for _, piece in batch], unit)
        for (number, piece), row in zip(batch, shares.tolist(), strict=True):
            for name, share in zip(NAMES, row, strict=True):
                measures[number][name] += share * len(piece) / totals[number]
    return measures


def _batches(parts: Sequence[tuple[int, list[str]]], most: int) -> Iterator[list[tuple[int, list[str]]]]:
    """The parts in batches of about so many words, so that no document needs more memory than a chunk of others."""
    batch: list[tuple[int, list[str]]] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part[1])
        if size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
