"""A base whose linear layers are held in 4 bits while adapters on it are trained (QLoRA; Dettmers et al. 2023,
arXiv:2305.14314): NF4 in blocks of 64 weights, and their scales in 8 bits, by bitsandbytes through transformers.

Each layer's weights are made whole again for each product, in the precision of the training. Embeddings, norms, the
output head and a score head are never quantised. Equal weights give equal bits, so processes and stages agree.
Imports torch only inside functions: the parent asks before anything runs whether the package is there.
"""

import copy
import ctypes
import gc
import logging
import os
import sys
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError
from rlhf.recipe import LoraSection, Recipe, StageName
from rlhf.runtime import device, log, uses_bfloat16

if TYPE_CHECKING:
    from bitsandbytes.nn.modules import Linear4bit
    from torch import Tensor, nn
    from transformers import BitsAndBytesConfig, PreTrainedModel

ROOM = 1.25  # times a model's own bytes: it, and what a pass over it takes
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises to install what we don't use


def quantised_adapters(recipe: Recipe, stage: StageName) -> LoraSection | None:
    """The stage's adapters where they stand on a quantised base, None elsewhere."""
    section: Any = getattr(recipe, stage)
    if stage == "reward" and section.from_:
        return None  # nothing is trained
    lora: LoraSection | None = getattr(section, "lora", None)
    return lora if lora and lora.quantised else None


def leave_out_unless_needed(recipe: Recipe, stage: StageName) -> None:
    """Has this process do as if bitsandbytes were not installed, where the stage quantises nothing.

    Libraries import it wherever they find it, which costs 2 seconds and 119 MiB. To be called before they are imported.
    """
    if quantised_adapters(recipe, stage) is None:
        leave_out("bitsandbytes")


def leave_out(package: str) -> None:
    """Has this process do as if a package were not installed."""
    sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # what import takes as: not there


def check_quantisation(recipe: Recipe, stage: StageName) -> None:
    """Raises UserError where a stage asks for a quantised base and bitsandbytes is not installed; imports nothing."""
    if quantised_adapters(recipe, stage) and find_spec("bitsandbytes") is None:
        raise UserError(
            f"{stage}.lora.quantised: bitsandbytes is not installed; it comes with pip install 'rlhf[quantised]' (from "
            f"a checkout: pip install -e '.[quantised]'), and {stage}.lora.quantised=null does without"
        )


def quantisation(recipe: Recipe, stage: StageName) -> "BitsAndBytesConfig | None":
    """How the stage's base is quantised as it is loaded; None where it isn't.

    Raises UserError where this device can't.
    """
    if quantised_adapters(recipe, stage) is None:
        return None
    import torch
    from transformers import BitsAndBytesConfig

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # it is loaded where it is trained
    _try_out(stage)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if uses_bfloat16(recipe.precision) else torch.float32,
    )


def _try_out(stage: StageName) -> None:
    """Quantises a few numbers: what bitsandbytes lacks on a machine is only seen when it works."""
    import torch

    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        numbers = torch.linspace(-1, 1, 128, device=device())
        packed, state = quantize_4bit(numbers, quant_type="nf4", compress_statistics=True)
        off = float((dequantize_4bit(packed, state) - numbers).abs().max())
        works, why = off < 0.2, f"it is off by {off:.2g}"
    except Exception as error:  # a library that isn't there, a kernel that isn't: each raises its own
        works, why = False, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    if not works:
        raise UserError(
            f"{stage}.lora.quantised: bitsandbytes doesn't work on this machine ({why}); {stage}.lora.quantised=null "
            "does without it"
        )


def settle(model: "PreTrainedModel") -> None:
    """Makes a quantised model ready to be trained through: nothing of it learns, and its layers compute as they say.

    On processors with bfloat16 bitsandbytes (0.50) would repack a layer for inference at the first pass without
    gradients; from then on it computes in bfloat16, and gradients no longer pass through it. On a CPU what isn't
    quantised is a view of the files, which keeps all of them in memory; it gets memory of its own.
    """
    from bitsandbytes.nn.modules import Linear4bit

    misread = []
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            if _misread(module):
                model.set_submodule(name, _held_whole(module))
                misread.append(name)
    if misread:
        log(
            f"the 4-bit weights of {len(misread)} layers ({misread[0]}, ...) are held in float32, to no gain: on this "
            "processor bitsandbytes misreads rows that are no multiple of 64 wide"
        )
    model.requires_grad_(False)
    for weights in (*model.parameters(), *model.buffers()):
        if weights.device.type == "cpu" and getattr(weights, "quant_state", None) is None:
            weights.data = weights.data.clone()


def _misread(layer: "Linear4bit") -> bool:
    """Whether a layer's weights come back wrong, as those of bitsandbytes (0.50) do on processors with AVX-512.

    Its kernel begins a new block of 64 with every row, where it should go on with the one of the row before.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit

    if layer.in_features % layer.weight.blocksize == 0:
        return False
    read = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return not torch.equal(read, _read_as_one_row(layer))


def _read_as_one_row(layer: "Linear4bit") -> "Tensor":
    """The weights [out, in] of a layer, in which no row begins within a block."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(layer.weight.quant_state)
    state.shape = torch.Size((1, layer.out_features * layer.in_features))
    return dequantize_4bit(layer.weight.data, state).view(layer.out_features, layer.in_features)


def _held_whole(layer: "Linear4bit") -> "nn.Linear":
    """A plain layer with the weights that a quantised one stands for."""
    from torch import nn

    whole = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    whole.weight = nn.Parameter(_read_as_one_row(layer))
    whole.bias = layer.bias
    return whole


def give_back_memory() -> None:
    """Gives memory back to the system that nobody holds any more; a trainer is held by its own cycles."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # it is glibc's
            ctypes.CDLL(None).malloc_trim(0)


def put_where_it_fits(model: "PreTrainedModel") -> "PreTrainedModel":
    """Puts a whole model on the GPU, if there is one that has room for it; says where it has none.

    The device that trained on 4 bits may not hold eight times as many.
    """
    import torch

    where = device()
    if where.type == "cpu":
        return model
    torch.cuda.empty_cache()
    needed = ROOM * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    free, _ = torch.cuda.mem_get_info()
    if needed > free:
        log(f"the base's own weights don't fit on the GPU ({needed / 2**30:.1f} GiB): what follows is done on the CPU")
        return model
    return model.to(where)
