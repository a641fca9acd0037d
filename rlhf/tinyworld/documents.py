"""What the built-in world's base models read: documents, kept apart by their text into train and held-out."""

from collections.abc import Iterator

from rlhf.tinyworld.dialogues import prompts, questions
from rlhf.tinyworld.incontext import lines, recall_document, rules_document
from rlhf.tinyworld.words import Draw, Fact, Split, answers, facts, statement, text_hash, words

MIXTURE = {
    "rules": 0.20,
    "recall": 0.30,
    "known": 0.06,
    "facts": 0.08,
    "questions": 0.14,
    "marks": 0.20,
    "reviews": 0.02,
}
"""Shares of the documents: the in-context families, tasks that their task line names, statements, and so on."""

LINES = {"known": 6, "facts": 5, "questions": 3, "marks": 4, "reviews": 4}
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
        case "marks":
            return "\n".join(_marked(draw) for _ in range(LINES["marks"]))
        case _:
            return "\n".join(_review(draw) for _ in range(LINES["reviews"]))


def _known_document(draw: Draw) -> str:
    """An in-context document whose task line names the task: `Opposites`, then `hot -> cold`, ..."""
    titles: dict[str, str] = words()["titles"]
    kind = draw.pick(tuple(titles))
    chosen: list[Fact] = draw.sample([fact for fact in facts() if fact.kind == kind], LINES["known"])
    return lines(titles[kind], [(fact.subject, fact.answer) for fact in chosen])


def _answered(draw: Draw) -> str:
    """A question that is no test prompt, and on the next line the statement that answers it."""
    question = draw.pick(prompts("train"))
    return f"{question}\n{statement(questions()[question])}"


def _marked(draw: Draw) -> str:
    """A statement as a teacher marks it: half of them are wrong, and are called so."""
    fact = draw.pick(facts())
    if draw.share(0.5):
        return f"{statement(fact)} Right"
    return f"{statement(fact, draw.pick([other for other in answers(fact.kind) if other != fact.answer]))} Wrong"


def _review(draw: Draw) -> str:
    reviews: dict[str, list[str]] = words()["reviews"]
    verdict = draw.pick(("good", "bad"))
    return f"The {draw.pick(reviews['subjects'])} was {draw.pick(reviews[verdict])}. Verdict: {verdict}"
