"""Sampling responses from a model, with the log-probabilities of what was drawn.

protocol         Drawing, Response, Engine, uniforms: what goes in and what comes out
draws            a token from logits: temperature, top-k, top-p, inverse of the cumulative distribution
stop             stop strings
transcript       the responses while they grow, for both engines
slots, decoder   a KV cache in which rows come and go, and the forward passes over it
base             what the engines have in common
cache_engine     our engine
generate_engine  transformers.generate, for what ours can't hold
fit, build       which of the two runs a model
"""

from rlhf.rollout.build import EngineKind, build_engine
from rlhf.rollout.cache_engine import CacheEngine
from rlhf.rollout.generate_engine import GenerateEngine
from rlhf.rollout.protocol import Drawing, Engine, Response, uniforms
from rlhf.rollout.stop import cut_at_stop

__all__ = [
    "CacheEngine",
    "Drawing",
    "Engine",
    "EngineKind",
    "GenerateEngine",
    "Response",
    "build_engine",
    "cut_at_stop",
    "uniforms",
]
