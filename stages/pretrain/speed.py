"""How fast a model is trained, beside how fast the machine could."""

import time

import torch
from transformers import PreTrainedModel

from rlhf.model import count_parameters

MEASURED_SECONDS = 0.2


def flops_per_token(model: PreTrainedModel, length: int) -> float:
    """Floating-point operations of training on one token in rows of `length`, forward and backward.

    6 for each parameter that is multiplied with (the output head, not what is only looked up), and 12 x width for each
    position that a layer's attention looks at, the masked ones included (PaLM, appendix B: Chowdhery et al. 2022,
    arXiv:2204.02311). What gradient checkpointing computes again isn't counted.
    """
    config = model.config.get_text_config()
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    looked_up = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and not (tied and module is model.get_input_embeddings())
    )
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or length
    seen = sum(min(length, window) if kind == "sliding_attention" else length for kind in kinds)
    return 6.0 * (count_parameters(model) - looked_up) + 12.0 * width * seen


@torch.no_grad()
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product, the best of a fifth of a second.

    A square product of 8,192 on a GPU, of 1,024 on a CPU with the threads that torch has.
    """
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best, started = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - started < MEASURED_SECONDS:
        before = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return 2.0 * size**3 / best
