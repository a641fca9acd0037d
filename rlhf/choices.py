"""What a stage computes in: precision, attention and torch.compile, chosen by device unless the recipe says so.

    precision   bfloat16 on a GPU that has it, float32 elsewhere (on a CPU bfloat16 is many times slower)
    attention   sdpa where the architecture has it; flash_attention_2 only where the recipe asks for it
    compile     on a GPU, and in pretrain alone: the other stages' rows have many lengths, and each means compiling anew

Imports torch only inside functions: the parent asks before anything runs whether a package is there.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.errors import UserError
from rlhf.quantisation import quantised_adapters
from rlhf.recipe import Recipe, StageName
from rlhf.runtime import log, uses_bfloat16

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLASH = "flash_attention_2"
FLASH_STAGES: tuple[StageName, ...] = ("sft", "reward")  # whose training passes it can make


class Choices(NamedTuple):
    """What a stage's training computes in, and in few words why."""

    precision: str
    why_precision: str
    attention: str
    why_attention: str
    compiled: bool
    why_compiled: str
    quantised: str | None
    why_quantised: str

    def __str__(self) -> str:
        held = ""
        if self.quantised:
            held = f"; the base's linear layers in 4 bits, {self.quantised} ({self.why_quantised})"
        return (
            f"{self.precision} ({self.why_precision}); attention {self.attention} ({self.why_attention}); "
            f"{'compiled' if self.compiled else 'not compiled'} ({self.why_compiled}){held}"
        )

    def facts(self) -> dict[str, Any]:
        """What the stage's summary says of them."""
        found = {"precision": self.precision, "attention": self.attention, "compiled": self.compiled}
        return {**found, "quantised": self.quantised} if self.quantised else found


def choose(recipe: Recipe, stage: StageName, attention: str, *, in_pieces: bool = False) -> Choices:
    """What the stage computes in, by recipe and device; says it. `attention` is what the loaded model has.

    `in_pieces`: the processes hold the model in pieces (FSDP2, ZeRO-3).
    Raises UserError where the recipe asks for what the device can't.
    """
    import torch

    bfloat16 = uses_bfloat16(recipe.precision)
    compiled, why_compiled = _compiled(recipe, stage, in_pieces)
    if recipe.attention == FLASH and stage in FLASH_STAGES:
        _check_flash_device(bfloat16)
        attention = FLASH
    lora = quantised_adapters(recipe, stage)
    found = Choices(
        "bfloat16" if bfloat16 else "float32",
        _why_precision(recipe.precision, bfloat16),
        attention,
        _why_attention(recipe.attention, attention),
        compiled,
        why_compiled,
        lora.quantised if lora else None,
        "as asked" if torch.cuda.is_available() else "as asked; without a GPU it takes longer",
    )
    log(f"{stage}: {found}")
    return found


def _why_precision(asked: str, bfloat16: bool) -> str:
    import torch

    if asked != "auto":
        return "as asked"
    if bfloat16:
        return "this GPU has it"
    return "this GPU has no bfloat16" if torch.cuda.is_available() else "no GPU"


def _why_attention(asked: str, has: str) -> str:
    if asked == has:
        return "as asked"
    if asked == FLASH:
        return f"its masks are none that {FLASH} takes"
    return "the default" if has == "sdpa" else "what its architecture has"


def _compiled(recipe: Recipe, stage: StageName, in_pieces: bool) -> tuple[bool, str]:
    """Whether torch.compile is used, and why."""
    import torch

    if stage != "pretrain" or recipe.pretrain is None:
        return False, "rows have many lengths"
    if in_pieces:
        if recipe.pretrain.compile is True:
            raise UserError("pretrain.compile: not where models are sharded (FSDP2, ZeRO-3)")
        return False, "the model is sharded"
    if recipe.pretrain.compile != "auto":
        return recipe.pretrain.compile, "as asked"
    if not torch.cuda.is_available():
        return False, "on a CPU it gains little"
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    return (True, "on a GPU it is worth its minutes") if compiler else (False, "there is no C compiler")


# Attention


def check_attention(recipe: Recipe, stage: StageName) -> None:
    """Raises UserError where a stage is to train with flash-attn, and that isn't installed; imports nothing."""
    if recipe.attention == FLASH and stage in FLASH_STAGES and find_spec("flash_attn") is None:
        raise UserError(
            f"attention: {FLASH} needs the package flash-attn, which is not installed (pip install flash-attn, on a "
            "machine with a GPU and CUDA's compiler); attention=sdpa does without"
        )


def _check_flash_device(bfloat16: bool) -> None:
    import torch

    if not (torch.cuda.is_available() and bfloat16):
        lacks = "has no GPU" if not torch.cuda.is_available() else "is in float32"
        raise UserError(
            f"attention: {FLASH} works in bfloat16 on a GPU only, and this run {lacks}; attention=sdpa works"
        )


def loading_attention(recipe: Recipe) -> str | None:
    """The implementation that models are loaded with; None: transformers' choice."""
    return {"auto": None, FLASH: "sdpa"}.get(recipe.attention, recipe.attention)


@contextmanager
def training_attention(model: "PreTrainedModel", chosen: Choices) -> Iterator[None]:
    """Within, the model attends as was chosen for training; what draws responses needs the one that it had."""
    before = model.config._attn_implementation
    if chosen.attention == before:
        yield
        return
    model.set_attn_implementation(chosen.attention)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
