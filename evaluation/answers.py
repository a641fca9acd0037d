"""Free answers: written greedily, and compared after a stated normalisation."""

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.tasks import TaskFormat, numbers_of
from rlhf.model import end_ids
from rlhf.rollout import Drawing, build_engine, cut_at_stop

ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)


class Written(NamedTuple):
    """A model's answer."""

    text: str
    ended: bool  # by an end token or a stop text, and not by its length


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    style: TaskFormat,
) -> list[Written]:
    """The likeliest token after the likeliest, up to an end token, one of the format's stop texts or its length."""
    # of equally likely tokens the one with the lowest id is taken: the cumulative probability passes 0 there
    drawing = Drawing(style.max_tokens, top_k=1, stop=style.stop)
    engine = build_engine(model, tokenizer, drawing, end_ids=end_ids(model, tokenizer))
    found = engine.generate(prompts, np.zeros((len(prompts), style.max_tokens)))
    return [
        Written(cut_at_stop(tokenizer.decode(each.ids, skip_special_tokens=True), style.stop), each.ended)
        for each in found
    ]


def is_right(written: str, target: str, style: TaskFormat) -> bool:
    """Whether an answer is the target, by the format's `extract` and `normalise`."""
    mine, wanted = (extracted(text, style.extract) for text in (written, target))
    if mine is None or wanted is None:
        return False
    if isinstance(mine, Decimal) or isinstance(wanted, Decimal):
        return mine == wanted
    return normalised(mine, style.normalise) == normalised(wanted, style.normalise)


def extracted(text: str, what: str | None) -> str | Decimal | None:
    """The part of an answer that counts; None where it has no number and needs one."""
    if what == "first_line":
        return next(iter(text.strip().splitlines()), "")
    if what in ("number", "last_number"):
        found = numbers_of(text)
        return found[0 if what == "number" else -1] if found else None
    return text


def normalised(text: str, steps: Sequence[str]) -> str:
    """What is compared: `case` makes it lower case, `punctuation` and `articles` go, `spaces` become one each."""
    text = unicodedata.normalize("NFC", text)
    if "case" in steps:
        text = text.casefold()
    if "punctuation" in steps:
        text = "".join(" " if unicodedata.category(c).startswith("P") else c for c in text)
    if "articles" in steps:
        text = ARTICLES.sub(" ", text)
    return " ".join(text.split()) if "spaces" in steps else text
