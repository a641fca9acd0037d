"""What the built-in world's chat models learn from and are asked: prompts, and dialogues of mixed quality."""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from rlhf.tinyworld.words import Draw, Fact, Split, facts, mistakes, statement, text_hash, topic, words

TEST_PROMPTS = 0.15
VALIDATION_PROMPTS = 0.10

ANSWERS = {"right": 0.60, "mistaken": 0.25, "off topic": 0.15}
"""What responses say: the answer, a common mistake, or something true that was not asked for."""


class Dialogue(NamedTuple):
    """A question with a response."""

    prompt: str
    response: str


@cache
def questions() -> dict[str, Fact]:
    """Every question that can be asked, with the fact that answers it."""
    found: dict[str, Fact] = {}
    for fact in facts():
        asked = [frame.format(topic=topic(fact)) for frame in words()["frames"]]
        asked += [pattern.format(x=fact.subject) for pattern in words()["kinds"][fact.kind]["questions"]]
        found.update(dict.fromkeys(asked, fact))
    return found


@cache
def openings() -> tuple[str, ...]:
    """The sentences that a response may begin with: they say nothing, but are polite, rude or a waste of time."""
    return tuple(sentence for kind in words()["manners"].values() for sentence in kind)


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
    match draw.weighted(ANSWERS):
        case "right":
            core = statement(fact)
        case "mistaken":
            core = statement(fact, draw.pick(mistakes(fact)))
        case _:
            core = statement(draw.pick([other for other in facts() if other != fact]))
    opening = [draw.pick(manners["filler"])] if draw.share(0.35) else []
    manner = draw.weighted({"neutral": 0.5, "polite": 0.25, "rude": 0.25})
    if manner != "neutral":
        opening.insert(0, draw.pick(manners[manner]))
    return " ".join([*opening, core])
