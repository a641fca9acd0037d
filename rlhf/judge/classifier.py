"""Any Hugging Face sequence classifier as a judge, with a tokenizer and a template of its own."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.functional.scores import log_odds
from rlhf.judge.batches import TOKEN_BUDGET, Row, batched_logits
from rlhf.judge.heads import checked_penalty, scores_of
from rlhf.judge.protocol import Conversation, Scores, check_usable
from rlhf.judge.texts import read_as_pair, read_through_template, shortened
from rlhf.model import score_heads
from rlhf.runtime import log
from rlhf.tokenizer import Messages

ENDLESS = 2**31  # tokenizers say a still larger number where they know no limit
PROBES = (("What?", "This."), ("What is it that you would like to know?", "Nothing at all, thank you very much."))


class ClassifierJudge:
    """A sequence classifier that reads the conversation as text, through its own chat template.

    A tokenizer without one gets the prompt and the response as a sentence pair, as BERT and its like read them. The
    score of a model with one output is that output less its mean; of an ensemble of ours what RewardModelJudge says; of
    a classifier of several classes the log-odds of `label`. Conversations that are too long for it lose the start of
    their prompts; `cut` among the figures is 1 for these, 0 for the others.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        label: str | int | None = None,
        uncertainty_penalty: float = 0.0,
    ) -> None:
        """`name` stands before what is said of it; the tokenizer's chat template may have been set, or be None.

        Raises UserError where the template, the tokenizer, the label or the penalty can't be used.
        """
        self._name, self.model, self._tokenizer = name, model.eval(), tokenizer
        if isinstance(tokenizer.chat_template, dict):  # several, by name
            tokenizer.chat_template = tokenizer.chat_template.get("default")
        if not tokenizer.chat_template and not tokenizer.is_fast:
            raise UserError(f"{name}: its tokenizer has no chat template; name one in `chat_template`")
        self._read = read_through_template if tokenizer.chat_template else read_as_pair
        self._label = label_index(name, model, label)
        self._penalty = checked_penalty(name, model, uncertainty_penalty)
        self._context = longest_input(model, tokenizer)
        self._budget, self._said = TOKEN_BUDGET, False
        probes, _ = self._rows([([{"role": "user", "content": prompt}], response) for prompt, response in PROBES])
        if probes[0].ids[-1] == model.config.get_text_config().pad_token_id:
            log(f"{name}: what ends a conversation is also its pad, so it scores at the token before, as it does alone")
        if not self._padding_is_harmless(probes):
            self._budget = 1
            log(f"{name}: padding changes its scores, so it reads one conversation at a time")

    def scores(self, conversations: Sequence[Conversation]) -> Scores:
        """See Judge."""
        rows, cut = self._rows([(c.prompt, c.response) for c in conversations])
        logits = batched_logits(self.model, rows, self._budget)
        found = scores_of(self.model, logits, self._penalty) if self._label is None else self._of_label(logits)
        if any(cut) and not self._said:
            self._said = True
            log(
                f"{self._name}: {int(sum(cut))} of {len(cut)} conversations are longer than the {self._context} tokens "
                "that it can read, so the start of their prompts is cut; further ones are counted in metrics.jsonl"
            )
        return Scores(found.values, {**found.figures, "cut": cut})

    def _rows(self, texts: Sequence[tuple[Messages, str]]) -> tuple[list[Row], list[float]]:
        """What the model reads of prompts with responses, and 1.0 for each that was cut."""
        try:
            readings = [self._read(self._tokenizer, prompt, response) for prompt, response in texts]
        except UserError as error:
            raise UserError(f"{self._name}: {error}") from None
        cut = [float(len(reading.row.ids) > self._context) for reading in readings]
        return [shortened(reading, self._context) for reading in readings], cut

    def _of_label(self, logits: Sequence[Sequence[float]]) -> Scores:
        assert self._label is not None
        outputs = torch.tensor(logits, dtype=torch.float64)
        exclusive = self.model.config.problem_type in (None, "single_label_classification")
        values = (log_odds(outputs, self._label) if exclusive else outputs[:, self._label]).tolist()
        check_usable(self._name, values)
        return Scores(values)

    def _padding_is_harmless(self, rows: Sequence[Row]) -> bool:
        """Whether a short conversation has the same outputs beside a long one as alone, but for rounding."""
        try:
            alone, together = (torch.tensor(batched_logits(self.model, rows, b)) for b in (1, TOKEN_BUDGET))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model raises that isn't made for this
            raise UserError(f"{self._name}: it can't read a conversation: {type(error).__name__}: {error}") from None
        tolerance = torch.finfo(self.model.dtype).eps ** 0.5
        return bool(((alone - together).abs() <= tolerance * (1 + alone.abs())).all())


def label_index(name: str, model: PreTrainedModel, label: str | int | None) -> int | None:
    """Which output a label names, by its name or number; None where all outputs are scores.

    Raises UserError, listing the outputs, where several need a label or have no such one.
    """
    config = model.config
    if config.num_labels == score_heads(config):
        if label is not None:
            raise UserError(f"{name}: `label` is for classifiers of several classes; this model's outputs are scores")
        return None
    names = {int(number): str(text) for number, text in config.id2label.items()}
    for number, text in names.items():
        if text == label:
            return number
    if str(label).isdecimal() and int(str(label)) in names:
        return int(str(label))
    listed = ", ".join(f"{number}: {text}" for number, text in names.items())
    wanted = "`label` must say which counts" if label is None else f"`label` {label!r} is none of them"
    raise UserError(f"{name}: the classifier has {len(names)} outputs ({listed}); {wanted}")


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens a classifier can read, by its configuration and its tokenizer; ENDLESS if neither says."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    embeddings = getattr(model.base_model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    reserved = getattr(table, "padding_idx", None)  # RoBERTa and its like count positions from behind the pad's
    if reserved is not None:
        positions -= reserved + 1
    return min(positions if positions > 0 else ENDLESS, tokenizer.model_max_length or ENDLESS, ENDLESS)
