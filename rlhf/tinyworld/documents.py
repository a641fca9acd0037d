"""What the built-in world's base models read: documents, kept apart by their text into train and held-out."""

from collections.abc import Iterator

from rlhf.tinyworld.dialogues import openings, prompts, questions
from rlhf.tinyworld.incontext import lines, recall_document, rules_document
from rlhf.tinyworld.words import Draw, Fact, Split, facts, statement, text_hash, words

MIXTURE = {"rules": 0.26, "recall": 0.26, "known": 0.06, "facts": 0.06, "questions": 0.34, "reviews": 0.02}
"""Shares of the documents: the in-context families, tasks that their task line names, statements, and so on."""

LINES = {"known": 6, "facts": 5, "questions": 3, "reviews": 4}
"""How many items make a document: always as many, so that a held-out document is no part of a longer one."""

HELD_OUT = 0.05  # the share of all possible documents that is kept for validation, and again for test


def split_of(text: str) -> Split:
    """The split that a document belongs to, by its text alone: the same document is never in two."""
    point = text_hash("document", text)
    return "test" if point < HELD_OUT else "validation" if point < 2 * HELD_OUT else "train"


def documents(split: Split, seed: int) -> Iterator[str]:
    """An endless stream of this split's documents."""
    draw = Draw("documents", split, seed)
    while True:
        text = _document(draw)
        if split_of(text) == split:
            yield text


def _document(draw: Draw) -> str:
    match draw.weighted(MIXTURE):
        case "rules":
            return rules_document(draw)
        case "recall":
            return recall_document(draw)
        case "known":
            return _known_document(draw)
        case "facts":
            return " ".join(statement(fact) for fact in draw.sample(facts(), LINES["facts"]))
        case "questions":
            return "\n".join(_answered(draw) for _ in range(LINES["questions"]))
        case _:
            return "\n".join(_review(draw) for _ in range(LINES["reviews"]))


def _known_document(draw: Draw) -> str:
    """An in-context document whose task line names the task: `Opposites`, then `hot -> cold`, ..."""
    titles: dict[str, str] = words()["titles"]
    kind = draw.pick(tuple(titles))
    chosen: list[Fact] = draw.sample([fact for fact in facts() if fact.kind == kind], LINES["known"])
    return lines(titles[kind], [(fact.subject, fact.answer) for fact in chosen])


def _answered(draw: Draw) -> str:
    """A question that is no test prompt, and on the next line the statement that answers it, some with an opening."""
    question = draw.pick(prompts("train"))
    opening = [draw.pick(openings())] if draw.share(0.2) else []
    return "\n".join([question, " ".join([*opening, statement(questions()[question])])])


def _review(draw: Draw) -> str:
    reviews: dict[str, list[str]] = words()["reviews"]
    verdict = draw.pick(("good", "bad"))
    return f"The {draw.pick(reviews['subjects'])} was {draw.pick(reviews[verdict])}. Verdict: {verdict}"
