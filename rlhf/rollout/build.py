"""Which engine draws responses from a model."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.rollout.cache_engine import CacheEngine
from rlhf.rollout.fit import PROBE_DRAWING, PROBE_ROWS, fault, not_keys_and_values
from rlhf.rollout.generate_engine import GenerateEngine
from rlhf.rollout.protocol import Drawing, Engine
from rlhf.runtime import log

EngineKind = Literal["auto", "cache", "generate"]
ENGINES: dict[str, type[CacheEngine] | type[GenerateEngine]] = {"cache": CacheEngine, "generate": GenerateEngine}


def build_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drawing: Drawing,
    *,
    end_ids: Sequence[int],
    kind: EngineKind = "auto",
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
) -> Engine:
    """An engine for a causal LM: `cache` is ours, `generate` transformers', `auto` is ours where it can run the model.

    `end_ids` end a response; no more than `batch_size` responses are drawn at a time; `progress` is told how many are
    over. The engine is tried on made-up prompts. Raises UserError where none can run the model.
    """
    reasons: dict[str, str] = {}
    for name in ENGINES if kind == "auto" else (kind,):
        reason = _misfit(name, model, tokenizer)
        if reason is None:
            if reasons:
                _say_once(f"{_said(model, reasons)}; transformers' generate draws the responses, which is slower")
            return ENGINES[name](model, tokenizer, drawing, end_ids=end_ids, batch_size=batch_size, progress=progress)
        reasons[name] = reason
    raise UserError(_said(model, reasons))


def _misfit(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Why an engine can't run the model; None where it can."""
    reason = not_keys_and_values(model) if name == "cache" else None
    engine = ENGINES[name](model, tokenizer, PROBE_DRAWING, end_ids=(), batch_size=PROBE_ROWS)
    engine.least_shared = 1
    return reason or fault(engine, model)


def _said(model: PreTrainedModel, reasons: dict[str, str]) -> str:
    return "; ".join(f"the engine `{name}` can't run {type(model).__name__}: {why}" for name, why in reasons.items())


@cache
def _say_once(message: str) -> None:
    log(message)
