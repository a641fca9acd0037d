"""How a judge reads: the model that is trained or taken, its own tokenizer, and comparisons as its token ids."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.rows import Comparison
from rlhf.errors import DataError, UserError
from rlhf.job import Job
from rlhf.model import check_vocabulary, load_scorer, resize_for, use_special_tokens
from rlhf.recipe import RewardSection, TooLong
from rlhf.runtime import derive_seed, device, log
from rlhf.templates import Messages
from rlhf.tokenizer import PAD, encode_chat, encode_prompt, prepare_for_chat
from stages.common import Start, check_chats, context_of, named_model

Ids = np.ndarray  # int32: a list of ids takes ten times the memory


class Judge(NamedTuple):
    """The model of the stage, with the tokenizer that it reads with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    shares_tokens: bool  # whether it reads the very ids that the reference draws
    fresh_head: bool  # whether it was no classifier before
    untrained: list[int]  # ids of tokens that its tokenizer was given here, and that it has never seen


def chat_tokenizer(reference: Start) -> PreTrainedTokenizerBase:
    """The tokenizer of the model that the stage stands on. Raises UserError where that is no chat model."""
    tokenizer = reference.tokenizer()
    check_chats(reference.name, tokenizer)
    return tokenizer


def open_judge(
    job: Job,
    settings: RewardSection,
    reference: Start,
    shared: PreTrainedTokenizerBase,
    quantised: BitsAndBytesConfig | None = None,
    put: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model.to(device()),
) -> Judge:
    """The judge that the recipe takes (`from`), or what one is trained from; `shared` is the reference's tokenizer.

    What is trained gets a chat template if it has none, and a pad token that isn't the end token: at a pad, no score is
    read. An existing judge is read as it was trained; one without chat template is refused. `put` puts its model on a
    device.
    """
    start = named_model(job.recipe, settings.from_ or settings.start or reference.name)
    tokenizer = start.tokenizer()
    torch.manual_seed(derive_seed(job.recipe.seed, "reward", "head"))
    model = load_scorer(
        start.name,
        fresh_head=not settings.from_,
        heads=settings.heads,
        remote_code=start.remote_code,
        attention=start.attention,
        quantised=quantised,
    )
    check_vocabulary(model, tokenizer, start.name)
    same = tokenizer.get_vocab() == shared.get_vocab() and tokenizer.chat_template == shared.chat_template
    untrained = prepared(settings, start.name, tokenizer)
    if not settings.from_:
        model.config.score_mean = 0.0  # what one that was a judge before has there holds no longer
    resize_for(model, tokenizer)
    use_special_tokens(model, tokenizer)
    was_classifier = any("SequenceClassification" in kind for kind in model.config.architectures or [])
    return Judge(put(model), tokenizer, same, not was_classifier, untrained)


def prepared(settings: RewardSection, name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Gives a judge's tokenizer what it lacks for conversations; the ids that the judge has never seen.

    Raises UserError where an existing judge has no chat template.
    """
    if not settings.from_:
        if not tokenizer.chat_template:
            log(f"reward: {name} has no chat template and gets ours")
        return prepare_for_chat(tokenizer, "rlhf").untrained
    if not tokenizer.chat_template:
        raise UserError(f"reward.from: {name} has no chat template, so it can't be told how a conversation looks")
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return []


class Pair(NamedTuple):
    """A comparison with what the judge reads of it."""

    comparison: Comparison
    chosen: Ids
    rejected: Ids
    prompt_tokens: int  # how many of the ids are the prompt's


def check_some(pairs: Sequence[Pair], split: str, reading: "Reading") -> None:
    """Raises DataError where a judge can read none of a split's comparisons."""
    if not pairs:
        raise DataError(f"reward.{split}: no comparison of at most {reading.longest} tokens that the judge can read")


class Reading:
    """Conversations as a judge's token ids, none longer than it may read.

    `counts` says what was done about longer ones: "dropped" or "truncated", in pairs; and how many pairs or
    conversations were left out since the chat template doesn't show a response that is blank: "blank".
    """

    def __init__(self, judge: Judge, settings: RewardSection) -> None:
        self._tokenizer = judge.tokenizer
        self.longest = min(settings.max_tokens, context_of(judge.model))
        self._too_long = settings.too_long
        self._known: dict[tuple[str, str], Ids] = {}
        self._prompt_tokens: dict[str, int] = {}
        self.counts: Counter[str] = Counter()

    def know(self, prompt: Messages, response: str, ids: Sequence[int]) -> None:
        """Has a response read as the ids that were drawn: from its text others may come, which nobody sampled."""
        self._known.setdefault((json.dumps(prompt), response), np.asarray(ids, dtype=np.int32))

    def pair(self, comparison: Comparison) -> Pair | None:
        """A comparison as ids, None where it is too long and to be dropped.

        Raises UserError where the chat template refuses it, and DataError where it is too long and that is an error.
        """
        prompt_tokens = self._tokens_of(comparison.prompt)
        both = [self._ids(comparison.prompt, text) for text in (comparison.chosen, comparison.rejected)]
        fit = self._fit(prompt_tokens, both, self._too_long)
        if fit is None:
            return None
        return Pair(comparison, fit[0], fit[1], prompt_tokens - (len(both[0]) - len(fit[0])))

    def drawn_pair(self, comparison: Comparison) -> Pair | None:
        """`pair` of responses that a model drew; None also where a blank one can't be shown."""
        prompt, *both = comparison[:3]
        if not all(self._shows(prompt, text) for text in both):
            self.counts["blank"] += 1
            return None
        return self.pair(comparison)

    def conversation(self, prompt: Messages, response: str, ids: Sequence[int] | None) -> Ids | None:
        """A conversation as ids, those that were drawn where they are given; None where it is too long and not to be
        truncated, or where a blank response can't be shown.
        """
        if ids is None and not self._shows(prompt, response):
            self.counts["blank"] += 1
            return None
        drawn = self._ids(prompt, response) if ids is None else np.asarray(ids, dtype=np.int32)
        too_long: TooLong = "truncate" if self._too_long == "truncate" else "drop"
        fit = self._fit(self._tokens_of(prompt), [drawn], too_long)
        return fit[0] if fit else None

    def _tokens_of(self, prompt: Messages) -> int:
        key = json.dumps(prompt)
        if key not in self._prompt_tokens:
            self._prompt_tokens[key] = len(encode_prompt(self._tokenizer, prompt))
        return self._prompt_tokens[key]

    def _ids(self, prompt: Messages, response: str) -> Ids:
        key = (json.dumps(prompt), response)
        if key not in self._known:
            messages = [*prompt, {"role": "assistant", "content": response}]
            self._known[key] = np.asarray(encode_chat(self._tokenizer, messages).ids, dtype=np.int32)
        return self._known[key]

    def _shows(self, prompt: Messages, response: str) -> bool:
        """Whether a response can be laid out; a chat template may leave out one that is blank."""
        if response.strip():
            return True
        try:
            self._ids(prompt, response)
        except UserError:
            return False
        return True

    def _fit(self, prompt_tokens: int, rows: list[Ids], too_long: TooLong) -> list[Ids] | None:
        """Conversations with one prompt, cut by the same number of the prompt's oldest tokens where one is too long.

        BOS stays: every judge reads it first.
        """
        longest = max(map(len, rows))
        over = longest - self.longest
        if over <= 0:
            return rows
        if too_long == "error":
            raise DataError(
                f"prompt and response have {longest} tokens, more than the {self.longest} that the judge may read "
                "(reward.max_tokens and its context; reward.too_long: drop or truncate)"
            )
        begins = int(rows[0][0] == self._tokenizer.bos_token_id)
        if too_long == "drop" or over > prompt_tokens - begins:
            self.counts["dropped"] += 1
            return None
        self.counts["truncated"] += 1
        return [np.concatenate([row[:begins], row[begins + over :]]) for row in rows]


def evenly(items: Sequence[Any], n: int) -> list[Any]:
    """At most n of the items, evenly spaced over all."""
    if len(items) <= n:
        return list(items)
    return [items[place * len(items) // n] for place in range(n)]
