"""Held-out texts, by the source that they come from."""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.perplexity import DocumentScore, Perplexity, perplexity, score_documents
from evaluation.scoring import Scorer
from rlhf.recipe import Recipe, Source
from rlhf.team import Team
from stages.common import open_data, report_faults

QUICK = 100  # documents of each source in the validations on the way; the first and the last one take all


class Validation:
    """The validation texts and how a model does on them."""

    def __init__(self, recipe: Recipe, sources: Sequence[Source]) -> None:
        self.texts: dict[str, list[str]] = {}
        for source in sources:
            held_out = open_data(recipe, "pretrain", (source,), "texts", "validation")
            self.texts[str(source)] = list(held_out)
            report_faults(held_out)

    def measure(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        team: Team,
        most: int | None = None,
    ) -> "Measured":
        """Perplexity of all texts, or of `most` of each source at most; the ranks share them."""
        was_training = model.training
        model.eval()
        scorer = Scorer(model, share=False)  # documents have nothing in common
        chosen = {name: texts[:most] for name, texts in self.texts.items()}
        everything = [text for texts in chosen.values() for text in texts]
        scores = team.share(everything, lambda mine: score_documents(scorer, tokenizer, mine, context=context))
        model.train(was_training)
        each = iter(scores)
        return Measured({name: list(islice(each, len(texts))) for name, texts in chosen.items()})


class Measured:
    """What one validation found."""

    def __init__(self, scores: Mapping[str, list[DocumentScore]]) -> None:
        self._scores = scores

    def whole(self) -> Perplexity:
        """All texts together."""
        return perplexity([score for scores in self._scores.values() for score in scores])

    def figures(self) -> dict[str, Any]:
        """Of all texts together, as summaries and metrics write it."""
        found = self.whole()
        return {
            **found.nats_per_token.as_keys("validation_nats_per_token"),
            "validation_perplexity": round(found.perplexity, 4),
            **found.bits_per_byte.as_keys("validation_bits_per_byte"),
        }

    def by_source(self) -> dict[str, dict[str, Any]]:
        """Of each source, where there are several."""
        return {name: perplexity(scores).summary() for name, scores in self._scores.items() if len(self._scores) > 1}

    def lines(self) -> dict[str, float]:
        """The nats per token of each source, where there are several, by keys of metrics.jsonl."""
        found = self.by_source()
        return {f"validation_nats_per_token/{name}": figures["nats_per_token"] for name, figures in found.items()}
