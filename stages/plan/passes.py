"""What stages do with a model, gone through without numbers: the passes that make memory largest.

Each takes the code that the stage itself runs, on shapes that it is given; see rlhf.footprint.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from evaluation.scoring import TOKEN_BUDGET
from rlhf.footprint import GRADIENTS, OPTIMISER, Footprint, tracing
from rlhf.judge.batches import TOKEN_BUDGET as JUDGE_BUDGET
from rlhf.likelihood import TokenReader
from rlhf.model import accelerator_bytes, planning_for
from rlhf.rollout.cache_engine import CACHE_BYTES, CACHE_SHARE, PREFILL_TOKENS
from rlhf.rollout.decoder import Decoder
from rlhf.rollout.draws import draw_tokens
from rlhf.rollout.protocol import Drawing
from stages.lora import SCORE_HEAD
from stages.plan.machine import Machine

DECODED = 3  # steps of a response that are gone through, evenly spaced


@contextmanager
def on(machine: Machine) -> Iterator[Footprint]:
    """Within, tensors are made and counted as on that machine."""
    with planning_for(machine.gpu_memory), tracing() as footprint:
        yield footprint


def computing(machine: Machine) -> AbstractContextManager[object]:
    """What a training pass runs in: where it computes in bfloat16, what a GPU's autocast does."""
    if machine.bfloat16 and not machine.sharded:
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()


def causal_lm(config: PreTrainedConfig, machine: Machine) -> PreTrainedModel:
    """A causal LM of this configuration."""
    return _built(AutoModelForCausalLM, config, machine)


def scorer(config: PreTrainedConfig, machine: Machine, heads: int = 1) -> PreTrainedModel:
    """A sequence classifier of this configuration."""
    config.num_labels = heads
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = 0  # any will do; without one transformers' classifiers refuse more than a row
    return _built(AutoModelForSequenceClassification, config, machine)


def _built(loader: Any, config: PreTrainedConfig, machine: Machine) -> PreTrainedModel:
    """Pieces are gathered in the precision of the passes."""
    dtype = torch.bfloat16 if machine.bfloat16 and machine.sharded else torch.float32
    how = {"attn_implementation": machine.attention} if machine.attention else {}
    model: PreTrainedModel = loader.from_config(config, dtype=dtype, **how)
    return model


class _Dequantised(torch.autograd.Function):
    """A product with weights that are made whole for it, and again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, rows: int) -> Tensor:
        """`inputs` [..., n] times whole weights [rows, n]."""
        ctx.size = (rows, inputs.shape[-1])
        return inputs @ inputs.new_empty(ctx.size).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The inputs' gradient; the weights learn nothing."""
        return gradients[0] @ gradients[0].new_empty(ctx.size), None


class FourBits(nn.Linear):
    """A linear layer as bitsandbytes holds it: half a byte a weight, and for each block of 64 a scale of one byte."""

    def __init__(self, like: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        packed = torch.empty(-(-like.weight.numel() // 2) + like.weight.numel() // 64, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = like.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """See nn.Linear."""
        if torch.is_autocast_enabled("cpu"):
            inputs = inputs.to(torch.get_autocast_dtype("cpu"))
        found: Tensor = _Dequantised.apply(inputs, self.out_features)
        return found if self.bias is None else found + self.bias


def in_four_bits(model: PreTrainedModel) -> None:
    """Holds a model's layers as `lora.quantised` does: all linear ones but the heads."""
    heads = {model.get_output_embeddings(), getattr(model, SCORE_HEAD, None)}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module not in heads:
            model.set_submodule(name, FourBits(module))


def ids(rows: int, tokens: int) -> Tensor:
    """Rows of token ids."""
    return torch.zeros(rows, tokens, dtype=torch.long)


def learn(
    footprint: Footprint,
    phase: str,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    *,
    several: bool,
    gradients: str = GRADIENTS,
    optimiser: str = OPTIMISER,
) -> None:
    """An optimiser step with its largest microbatch; with `several` the gradients of others are there before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with footprint.phase(phase):
        if several:
            _have_gradients(footprint, parameters, gradients)
        loss().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        with footprint.role(optimiser):
            optimizer.step()
        optimizer.zero_grad()


def have_state(
    footprint: Footprint, optimizer: torch.optim.Optimizer, gradients: str = GRADIENTS, optimiser: str = OPTIMISER
) -> None:
    """Gives an optimiser the state that it has from its first step on."""
    with footprint.phase("the first step's end"):
        _have_gradients(footprint, [p for group in optimizer.param_groups for p in group["params"]], gradients)
        with footprint.role(optimiser):
            optimizer.step()
        optimizer.zero_grad()


def _have_gradients(footprint: Footprint, parameters: Sequence[nn.Parameter], role: str) -> None:
    with footprint.role(role):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)


def adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, as all stages have it."""
    return torch.optim.AdamW(list(parameters), lr=1e-4, fused=True)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def read_texts(footprint: Footprint, model: PreTrainedModel, longest: int, rows: int) -> None:
    """Log-probabilities of held-out texts in rows of at most `longest` tokens, as the evaluation reads them."""
    length = min(longest, TOKEN_BUDGET)
    rows = max(1, min(rows, TOKEN_BUDGET // length))
    with footprint.phase("held-out texts"), torch.inference_mode():
        reader = TokenReader(model)
        states = reader.states(ids(rows, length)).flatten(0, 1)
        every = torch.zeros(rows * length, dtype=torch.long)
        reader.logprobs(states[every], every)


def score(footprint: Footprint, model: PreTrainedModel, longest: int, rows: int) -> None:
    """A judge's scores of conversations."""
    rows = max(1, min(rows, JUDGE_BUDGET // longest))
    with footprint.phase("scoring"), torch.inference_mode():
        model(input_ids=ids(rows, longest), attention_mask=ids(rows, longest))


def draw(
    footprint: Footprint, model: PreTrainedModel, prompts: Sequence[int], drawing: Drawing, batch: int = 256
) -> None:
    """Responses to prompts of so many tokens, all as long as may be, drawn as the rollout engine draws."""
    with footprint.phase("drawing responses"), torch.inference_mode():
        room = accelerator_bytes(model.device, CACHE_SHARE) or CACHE_BYTES
        decoder = Decoder(model, min(batch, len(prompts)), max(prompts) + drawing.max_tokens, room)
        plain = Drawing(max_tokens=drawing.max_tokens, temperature=drawing.temperature)
        waiting = sorted(prompts)[: decoder.slots]
        joined, before = 0, list[int]()
        for group in _groups(waiting, room // 4 // decoder.token_bytes):
            if group != before:  # one like the last is as large
                logits, layers = decoder.prefill([[0] * length for length in group])
                draw_tokens(logits, torch.zeros(len(group), dtype=torch.float64), plain)
            decoder.join(layers, list(range(len(group))), list(range(joined, joined + len(group))))
            joined, before = joined + len(group), group
        for step in range(DECODED):
            width = waiting[-1] + 1 + step * (drawing.max_tokens - 1) // max(1, DECODED - 1)
            found = decoder.step(ids(1, joined)[0], ids(1, joined)[0], width)
            draw_tokens(found, torch.zeros(joined, dtype=torch.float64), plain)


def _groups(lengths: Sequence[int], kept_tokens: int) -> Iterator[list[int]]:
    """The prompts that are read at a time, the shortest first."""
    group: list[int] = []
    for length in lengths:
        rows = len(group) + 1
        if group and (length * rows > PREFILL_TOKENS or length * rows > kept_tokens):
            yield group
            group = []
        group.append(length)
    yield group
