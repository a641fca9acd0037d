"""The plan of the stage pretrain."""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.footprint import Footprint
from rlhf.model import accelerator_bytes, checkpoint_layers, count_parameters
from rlhf.muon import Muon
from rlhf.recipe import PretrainSection, microbatches
from stages.common import check_context
from stages.plan import passes
from stages.plan.base import ADAM, Beginning, Context, StagePlan, counting, memory_of, read_first, read_if_there
from stages.plan.machine import Work
from stages.pretrain import ACTIVATIONS, ACTIVATIONS_SHARE, rows_fitting
from stages.pretrain.loss import TokenLoss, positions_in_documents
from stages.pretrain.plan import Plan
from stages.pretrain.speed import flops_per_token
from stages.pretrain.training import optimizers_of

SHOWN = 300  # characters of the first document
GOOD_STATES = "good states, to go back to after a spike"


def plan(context: Context) -> StagePlan:
    """What pretraining will do and need."""
    settings = context.recipe.pretrain
    assert settings is not None
    found = StagePlan("pretrain")
    beginning = context.beginning("pretrain")
    if context.recipe.base is not None:
        check_context(beginning.context, "pretrain.sequence_length", settings.sequence_length)
    schedule = Plan(settings)
    mine, _ = microbatches(context.recipe, "pretrain", context.machine.processes)
    _read(context, settings, found)
    with passes.on(context.machine) as footprint:
        with footprint.role("weights"):
            model = passes.causal_lm(beginning.config, context.machine)
        memory = accelerator_bytes(model.device, ACTIVATIONS_SHARE) or ACTIVATIONS
        size = mine if settings.microbatch_size else rows_fitting(model, settings, mine, memory)
        found.parameters = found.trained = count_parameters(model)
        found.work = Work(flops_per_token(model, settings.sequence_length) * schedule.tokens)
        optimizers = list(optimizers_of(model, settings).values())
        moments = sum(
            (1 if isinstance(optimizer, Muon) else ADAM) * parameter.numel()
            for optimizer in optimizers
            for parameter in passes.moved_by([optimizer])
        )
        with counting(found):
            _go_through(context, settings, beginning, schedule, size, model, optimizers, footprint)
            spares = settings.gradient_checkpointing
            found.memory = memory_of(footprint, context.machine, model, found.trained, spares=spares)
    found.tokens = schedule.tokens
    rows = schedule.parts[-1].rows // context.machine.processes
    found.lines = [
        f"{schedule.describe()}; {context.machine.processes} processes x {-(-rows // size)} microbatches x "
        f"{min(size, rows)} rows",
        f"learning rate {settings.learning_rate:g}, {settings.schedule}; about "
        f"{schedule.tokens / found.parameters:.1f} tokens a parameter",
    ]
    weights = 4 * found.parameters
    states = 3 if settings.spikes.action == "roll_back" else 1
    token = 2 if beginning.config.get_text_config().vocab_size <= 2**16 else 4
    kept = context.recipe.checkpoints.keep + 1  # and the one that is being written
    found.disk = kept * states * (weights + 4 * moments) + weights + token * schedule.tokens
    return found


def _read(context: Context, settings: PretrainSection, found: StagePlan) -> None:
    """Looks at the first of the texts."""
    replayed = settings.replay.train if settings.replay else ()

    def read() -> str:
        read_first(context, "pretrain", settings.validation, "texts", "validation")
        texts = read_first(context, "pretrain", (*settings.train, *replayed), "texts", "train")
        return str(texts[0])[:SHOWN]

    sources = (*settings.train, *replayed, *settings.validation)
    found.shown = read_if_there(found, sources, "the texts", read) or ""


def _go_through(
    context: Context,
    settings: PretrainSection,
    beginning: Beginning,
    schedule: Plan,
    size: int,
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    footprint: Footprint,
) -> None:
    """Measures, trains and measures again, as the stage does."""
    machine, length = context.machine, settings.sequence_length
    longest = min(beginning.context, 8192)
    if context.recipe.base is not None:
        passes.read_texts(footprint, model, longest, rows=8192)
    if settings.gradient_checkpointing:
        checkpoint_layers(model, "pretrain.gradient_checkpointing")
    model.train()
    loss = TokenLoss(model, settings.z_loss)
    footprint.name_gradients(model.parameters())

    def objective(rows: int) -> Tensor:
        inputs = passes.ids(rows, length)
        positions = positions_in_documents(inputs, 0) if settings.isolate_documents else None
        with passes.computing(machine):
            return loss(inputs, passes.ids(rows, length), positions).objective

    mine = schedule.parts[-1].rows // machine.processes
    if schedule.steps > 1:
        passes.have_state(footprint, optimizers)
    kept = _good_states(settings, schedule, model, optimizers, footprint) if not machine.on_gpus else []
    passes.learn(footprint, "a training step", optimizers, partial(objective, min(size, mine)), several=mine > size)
    model.eval()
    passes.read_texts(footprint, model, longest, rows=8192)
    del kept


def _good_states(
    settings: PretrainSection,
    schedule: Plan,
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    footprint: Footprint,
) -> list[Tensor]:
    """What is kept to go back to after a spike, in the host's memory: two states, or one of so short a training.

    The first one is from before the first step, when the optimiser has none of its own.
    """
    if settings.spikes.action != "roll_back":
        return []
    weights = list({id(p): p for p in model.parameters()}.values())
    moments = [
        value
        for optimizer in optimizers
        for each in optimizer.state.values()
        for value in each.values()
        if torch.is_tensor(value)
    ]
    kept_later = (schedule.steps - 1) // min(settings.spikes.good_every, schedule.steps)  # states after the first
    states = [*weights, *moments] * min(2, kept_later) + weights * (kept_later < 2)
    with footprint.phase("keeping a good state"), footprint.role(GOOD_STATES):
        return [tensor.detach().clone() for tensor in states]
