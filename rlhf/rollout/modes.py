"""Models are left as they are found."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its modules is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def without_inference_tensors(model: nn.Module) -> Iterator[None]:
    """Afterwards no buffer is a tensor of the inference mode, which no gradient could go through.

    Rotary embeddings that depend on the length replace their buffers in a forward pass.
    """
    try:
        yield
    finally:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_inference():
                    setattr(module, name, buffer.clone())
