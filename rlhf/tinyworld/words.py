"""The words and facts of the built-in world, read from words.yaml, and the draws that everything is made with."""

import hashlib
import random
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple, TypeVar

import yaml

T = TypeVar("T")
Split = Literal["train", "validation", "test"]

MISTAKES = 2  # wrong answers to a fact that people give


class Fact(NamedTuple):
    """One thing that is true: `kind` names the question, `subject` is asked about, `answer` is the only right word."""

    kind: str
    subject: str
    answer: str


class Draw:
    """Seeded choices that are the same on every machine and Python version.

    Only `random.Random.random` is used: of Python's generator, it alone promises the same sequence for ever.
    """

    def __init__(self, *seed: object) -> None:
        self._random = random.Random("/".join(map(str, seed)))

    def share(self, probability: float) -> bool:
        """True with the given probability."""
        return self._random.random() < probability

    def below(self, n: int) -> int:
        """A whole number in [0, n)."""
        return int(self._random.random() * n)

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def weighted(self, weights: dict[T, float]) -> T:
        """One of the keys, in proportion to its weight."""
        point = self._random.random() * sum(weights.values())
        for item, weight in weights.items():
            point -= weight
            if point < 0:
                return item
        return item

    def sample(self, items: Sequence[T], n: int) -> list[T]:
        """`n` different items in random order."""
        pool = list(items)
        for i in range(n):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:n]

    def random(self) -> float:
        """A number in [0, 1)."""
        return self._random.random()


def text_hash(*parts: str) -> float:
    """A number in [0, 1) that depends on the text alone: decides, without any list, what is kept out of training."""
    digest = hashlib.sha256("\x00".join(parts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


@cache
def words() -> dict[str, Any]:
    """The contents of words.yaml."""
    return yaml.safe_load((files("rlhf.tinyworld") / "words.yaml").read_text(encoding="utf-8"))


@cache
def facts() -> tuple[Fact, ...]:
    """Every fact of the world."""
    w = words()
    found = [Fact("opposite", a, b) for pair in w["opposites"] for a, b in (pair, pair[::-1])]
    found += [Fact("chinese", english, chinese) for english, chinese in w["chinese"].items()]
    found += [Fact("english", chinese, english) for english, chinese in w["chinese"].items()]
    found += [Fact("colour", x, y) for x, y in w["colours"].items()]
    found += [Fact("sound", x, y) for x, y in w["sounds"].items()]
    found += [Fact("capital", x, y) for x, y in w["capitals"].items()]
    found += [Fact("sum", f"{a} plus {b}", str(a + b)) for a in range(1, 7) for b in range(1, 7)]
    return tuple(found)


@cache
def answers(kind: str) -> tuple[str, ...]:
    """Every answer that some fact of this kind has, sorted: one is right, the others are plausible and wrong."""
    return tuple(sorted({fact.answer for fact in facts() if fact.kind == kind}))


@cache
def mistakes(fact: Fact) -> tuple[str, ...]:
    """The wrong answers that people give when asked for this fact: always the same few."""
    others = [answer for answer in answers(fact.kind) if answer != fact.answer]
    return tuple(Draw("mistakes", fact.kind, fact.subject).sample(others, MISTAKES))


def topic(fact: Fact) -> str:
    """What a question about the fact asks for: `opposite of hot`."""
    return words()["kinds"][fact.kind]["topic"].format(x=fact.subject)


def statement(fact: Fact, answer: str | None = None) -> str:
    """The sentence that states the fact, or a wrong answer to it."""
    return f"The {topic(fact)} is {answer or fact.answer}."
