"""A model of ours as lm-evaluation-harness sees it. Imports lm_eval: see evaluation.harness.

It is lm_eval's own HFLM, but for what goes in: text is encoded as evaluation.suite encodes it, so that text which looks
like a control token stays text, and BOS stands where the suite has it (HFLM leaves that to the tokenizer's settings).
"""

import copy
from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.tokenizer import begin_id, encode_texts


class HarnessModel(HFLM):
    """The same model object, asked by lm_eval; `cut` collects the prompts whose beginning was cut off."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        context: int,
        begin: bool,
        control: bool,
        rows: int,
    ) -> None:
        """`context`: tokens that are read at most; `control`: whether what looks like a control token is one.

        `rows` of a forward pass.
        """
        first = begin_id(tokenizer)
        self._ours, self._begin, self._control = tokenizer, [first] if begin else [], control
        self.cut: set[str] = set()
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),  # HFLM may give it a pad token
            max_length=context,
            batch_size=rows,
            prefix_token_id=first,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """A prompt's ids, or with `add_special_tokens=False` those of a text that has something before it."""
        text = encode_texts(self._ours, [string], control=self._control)[0]
        ids = [*([] if add_special_tokens is False else self._begin), *text]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Prompts that are to be continued: (ids, mask), [B, T] each."""
        whole = [self.tok_encode(string) for string in strings]
        longest = left_truncate_len or max(map(len, whole))
        self.cut |= {string for string, ids in zip(strings, whole, strict=True) if len(ids) > longest}
        rows = {"input_ids": [ids[-longest:] for ids in whole]}
        batch = self.tokenizer.pad(rows, padding_side=padding_side, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts. HFLM puts BOS before each itself, so here the ids come without it."""
        begin, self._begin = self._begin, []
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        finally:
            self._begin = begin

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **options: Any) -> list[tuple[float, bool]]:
        self.cut |= {
            texts[0]
            for texts, before, after in requests
            if texts is not None and len(before) + len(after) > self.max_length + 1
        }
        return super()._loglikelihood_tokens(requests, *args, **options)
