"""What the built-in world's chat models learn from and are asked: prompts, and dialogues of mixed quality."""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from rlhf.tinyworld.words import Draw, Fact, Split, answers, facts, statement, text_hash, words

TEST_PROMPTS = 0.15
VALIDATION_PROMPTS = 0.10


class Dialogue(NamedTuple):
    """A question with a response."""

    prompt: str
    response: str


@cache
def questions() -> dict[str, Fact]:
    """Every question that can be asked, with the fact that answers it."""
    found: dict[str, Fact] = {}
    for fact in facts():
        for pattern in words()["kinds"][fact.kind]["questions"]:
            found.setdefault(pattern.format(x=fact.subject), fact)
    return found


def split_of_prompt(prompt: str) -> Split:
    """The split that a question belongs to, by its text alone."""
    point = text_hash("prompt", prompt)
    if point < TEST_PROMPTS:
        return "test"
    return "validation" if point < TEST_PROMPTS + VALIDATION_PROMPTS else "train"


@cache
def prompts(split: Split) -> tuple[str, ...]:
    """All questions of a split."""
    return tuple(prompt for prompt in questions() if split_of_prompt(prompt) == split)


def shuffled_prompts(split: Split, seed: int, n: int | None = None) -> list[str]:
    """`n` different questions of a split in random order (all of them where `n` is None or larger)."""
    pool = prompts(split)
    return Draw("prompts", split, seed).sample(pool, len(pool) if n is None else min(n, len(pool)))


def dialogues(split: Split, seed: int) -> Iterator[Dialogue]:
    """An endless stream of a split's questions with responses of mixed quality: right and wrong, polite and rude."""
    draw = Draw("dialogues", split, seed)
    pool = prompts(split)
    while True:
        prompt = draw.pick(pool)
        yield Dialogue(prompt, respond(questions()[prompt], draw))


def respond(fact: Fact, draw: Draw) -> str:
    """A response as people write them: right more often than not, in whatever manner and at whatever length."""
    manners: dict[str, list[str]] = words()["manners"]
    answer = fact.answer
    if draw.share(0.4):
        answer = draw.pick([other for other in answers(fact.kind) if other != fact.answer])
    core = f"It is {answer}." if draw.share(0.2) else statement(fact, answer)
    before: list[str] = []
    after: list[str] = []
    manner = draw.weighted({"neutral": 0.5, "polite": 0.25, "rude": 0.25})
    if manner != "neutral":
        after += draw.sample(manners[manner], 1 + draw.below(2))
    if draw.share(0.35):
        before += draw.sample(manners["filler"], 1 + draw.below(2))
    return " ".join([*before, core, *after])
