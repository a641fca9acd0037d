"""From a depth to a model's shape and its training, so that nobody needs to know forty numbers to start.

The rule, each part of which a recipe may override:

    width        64 a layer, so that width and depth grow together (the shape of GPT-2: 12 layers, 768 wide)
    heads        of 64 channels each, so as many as layers
    context      128 tokens a layer, up to the next power of two, at most 2,048
    tokens       20 a parameter, the output head included: compute-optimal (Hoffmann et al. 2022, arXiv:2203.15556)
    batch        0.58 D^0.571 tokens a step, rounded to a power of two rows          (Step Law: Li et al. 2025,
    peak rate    1.79 N^-0.713 D^0.307                                               arXiv:2503.04715, section 1)

with D the training's tokens and N the parameters without embedding and head. The Step Law was fitted on AdamW, a cosine
and models of 60 M to 1 B parameters; below that it is continued, and the rate bounded by 0.005. Plain numbers.
"""

from typing import NamedTuple

CHANNELS_PER_LAYER, HEAD_CHANNELS = 64, 64
LARGEST_CONTEXT, CONTEXT_PER_LAYER = 2048, 128
TOKENS_PER_PARAMETER = 20
LARGEST_RATE = 5e-3


class Shape(NamedTuple):
    """A decoder-only Transformer's size."""

    layers: int
    width: int
    heads: int
    context: int  # tokens


class Training(NamedTuple):
    """How long it is trained, how much a step reads, and how far a step goes."""

    tokens: int
    tokens_per_step: int
    learning_rate: float


def shape_of_depth(depth: int) -> Shape:
    """The shape of a model of so many layers."""
    context = 1 << (CONTEXT_PER_LAYER * depth - 1).bit_length()
    width = CHANNELS_PER_LAYER * depth
    return Shape(depth, width, width // HEAD_CHANNELS, min(LARGEST_CONTEXT, context))


def inner_parameters(layers: int, width: int, mlp: int, gated: bool, kv_share: float = 1.0) -> int:
    """The weights of the layers' matrices, without embedding and head.

    `mlp` is the MLP's inner size, `gated` whether it has three matrices instead of two, `kv_share` the key-value heads
    as a share of the heads.
    """
    attention = round((2 + 2 * kv_share) * width * width)
    return layers * (attention + (3 if gated else 2) * width * mlp)


def training_of(inner: int, head: int, sequence_length: int, tokens: int | None = None) -> Training:
    """The training of a model of `inner` parameters in its layers and `head` in its output head.

    `tokens`: where somebody has said how many; rows are `sequence_length` tokens long.
    """
    tokens = tokens or TOKENS_PER_PARAMETER * (inner + head)
    rows = max(1.0, 0.58 * tokens**0.571 / sequence_length)
    lower = 1 << (int(rows).bit_length() - 1)
    nearest = lower if rows / lower < 2 * lower / rows else 2 * lower
    rate = min(LARGEST_RATE, 1.79 * inner**-0.713 * tokens**0.307)
    return Training(tokens, nearest * sequence_length, float(f"{rate:.2g}"))
