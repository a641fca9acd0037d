"""The tokenizer and the architecture of a model that starts from random weights."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlhf.recipe.base import NO_RESULT, Section, Sources


class TokenizerSection(Section):
    """Byte-level BPE, trained on the texts of its sources."""

    train: Sources = Field(description="texts (or conversations) to learn the merges from")
    vocab_size: int = Field(
        1024, ge=264, le=2**22, description="number of tokens, the special ones and the 256 bytes included"
    )


class ModelSection(Section):
    """The architecture of a model that starts from random weights."""

    depth: int | None = Field(
        None,
        ge=1,
        le=512,
        description="the one dial: layers, from which width, heads, context, and pretrain's tokens, tokens_per_step, "
        "learning_rate and sequence_length follow where they aren't given (rlhf/functional/compute_optimal.py)",
        json_schema_extra=NO_RESULT,  # what follows from it decides
    )
    architecture: Literal["llama", "qwen3", "gpt2"] = Field(
        "llama",
        description="family of the config; qwen3 is llama with QK-norm",
    )
    layers: int = Field(4, ge=1, description="number of decoder layers")
    width: int = Field(128, ge=8, description="size of the hidden states")
    heads: int = Field(4, ge=1, description="number of attention heads")
    kv_heads: int | None = Field(None, ge=1, description="key-value heads (grouped-query attention); default: heads")
    mlp_width: int | None = Field(None, ge=8, description="inner size of the MLP; default: 8/3 width (gpt2: 4 width)")
    context: int = Field(256, ge=8, description="longest sequence in tokens")
    rope_theta: float = Field(10000.0, gt=1, description="base of the rotary position embedding (not gpt2)")
    initialisation: Literal["normal", "wide"] = Field(
        "normal", description="normal: transformers'; wide: for tiny models"
    )
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of normal's random weights")
    sliding_window: int | None = Field(None, ge=2, description="tokens that a local layer sees (qwen3 only)")
    sliding_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="which layers are local, from 0")
    tie_embeddings: bool = Field(True, description="share the input embedding with the output head")

    @model_validator(mode="after")
    def _divides(self) -> ModelSection:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.architecture != "gpt2" and self.width // self.heads % 2:
            raise ValueError(f"width / heads is {self.width // self.heads}; rotary positions need an even number")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.kv_heads and self.architecture == "gpt2":
            raise ValueError("gpt2 has no kv_heads")
        if (self.sliding_window is None) != (not self.sliding_layers):
            raise ValueError("sliding_window and sliding_layers come together")
        if self.sliding_layers and self.architecture != "qwen3":
            raise ValueError(f"sliding_layers: {self.architecture} has no local layers, qwen3 has")
        if any(layer >= self.layers for layer in self.sliding_layers):
            raise ValueError(f"sliding_layers: the layers are 0 to {self.layers - 1}")
        return self
