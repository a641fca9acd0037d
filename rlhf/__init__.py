"""rlhf: from random weights to an aligned chat model, every step proved."""

__version__ = "0.1.0"
