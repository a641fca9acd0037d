"""Whether an engine can run a model: what its configuration says, and then whether its log-probabilities are right."""

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from rlhf.errors import RlhfError
from rlhf.functional.masked import widened
from rlhf.rollout.modes import evaluating
from rlhf.rollout.protocol import Drawing, Engine, Response

ATTENTION = ("sdpa", "eager")  # the implementations that take the masks that our engine makes
KINDS = {"full_attention", "sliding_attention"}
OWN_WINDOWS = ("window_size", "attention_window", "attention_window_size", "local_window")  # of masks of a model's own
PROBES = ([[1, 4, 2, 5, 3], [6, 2], [4, 4, 3]], [[5, 2, 3, 1], [5, 2, 6], [5, 2, 4, 4]])  # any vocabulary has these ids
PROBE_ROWS = 2  # at a time, so that a prompt takes the place of another
PROBE_DRAWING = Drawing(max_tokens=3)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 0.02}  # nats; a wrong mask or position is far off
COARSE_TOLERANCE = 0.5  # of bfloat16 and float16


def not_keys_and_values(model: PreTrainedModel) -> str | None:
    """Why a cache of slots can't hold the model's states, by its configuration; None where it can."""
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    others = {type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    if others or not layers:
        return f"its layers keep more than the keys and values of attention ({', '.join(sorted(others)) or 'unknown'})"
    unknown = sorted(set(getattr(config, "layer_types", None) or KINDS) - KINDS)
    if unknown:
        return f"it has layers of the kind {', '.join(unknown)}"
    if len({getattr(layer, "sliding_window", None) for layer in layers} - {None}) > 1:
        return "its layers have windows of different sizes"
    own = [name for name in OWN_WINDOWS if getattr(config, name, None)]
    if own and not any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers):
        return f"it makes masks of its own ({own[0]})"
    if config._attn_implementation not in ATTENTION:
        return f"its attention is {config._attn_implementation}, and none of {', '.join(ATTENTION)}"
    return None


def fault(engine: Engine, model: PreTrainedModel) -> str | None:
    """What is wrong when an engine with PROBE_DRAWING answers made-up prompts; None where nothing is.

    The second three begin alike. Its log-probabilities must be those of plain passes of the model over the same tokens.
    """
    try:
        found = [
            pair
            for prompts in PROBES
            for pair in zip(
                prompts,
                engine.generate(prompts, np.full((len(prompts), PROBE_DRAWING.max_tokens), 0.5)),
                strict=True,
            )
        ]
    except (MemoryError, torch.OutOfMemoryError, RlhfError):
        raise
    except Exception as error:  # whatever a model raises that takes other arguments or asks more of a cache
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    with evaluating(model):
        off = max(_off(model, *pair) for pair in found)
    if off <= tolerance_of(model):
        return None
    return f"its log-probabilities come out wrong, by {off:.2g} nats"


def tolerance_of(model: PreTrainedModel) -> float:
    """How far off log-probabilities may be, by what the model computes in; one in 4 bits has that in its settings."""
    quantised = getattr(model.config, "quantization_config", None)
    dtype = getattr(quantised, "bnb_4bit_compute_dtype", model.dtype)
    return TOLERANCE.get(dtype, COARSE_TOLERANCE)


@torch.no_grad()
def _off(model: PreTrainedModel, prompt: list[int], response: Response) -> float:
    ids = torch.tensor([prompt + response.ids], device=model.device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    expected = widened(logits).log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1).cpu()
    return float((expected - torch.tensor(response.logprobs)).abs().max())
