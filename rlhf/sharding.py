"""How a stage's models lie on its processes: whole on each of them, or cut into pieces (FSDP2, DeepSpeed's ZeRO-3).

Where they are cut, a model that learns has a *twin*, which is what learns: the same modules, but each process holds a
piece of every parameter, of its gradient and of the optimiser's state (Zhao et al. 2023, arXiv:2304.11277; torch's
`fully_shard`; or rlhf.zero). A layer's weights are gathered for its forward and its backward pass, so all processes
must do equally many of them. The model itself has no weights meanwhile; they are gathered into it, on every process,
where it is to draw, to be measured or to be saved. There it is a plain model, and processes may do different numbers of
passes.

A checkpoint holds pieces (rlhf.checkpoint.Piece), which another number of processes puts together anew.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from rlhf.errors import UserError
from rlhf.pieces import (
    ABSENT,
    fingerprint,
    in_pieces,
    load_optimizer,
    optimizer_state,
    parameters_of,
    whole,
)
from rlhf.runtime import Sharding, device, uses_bfloat16
from rlhf.team import Team


class Held(Protocol):
    """A model as the processes hold it."""

    learner: Any  # the module that learns
    called: Any  # what is called in its place for a pass of which gradients are taken

    def gathered(self) -> AbstractContextManager[None]:
        """Within, the model has its weights, on every process; all of them must come here. It is not to learn there."""

    def moving(self, module: nn.Module, optimizers: Mapping[str, Optimizer]) -> "Moving":
        """What takes gradients and steps. `module` is `called`, or a module that calls it."""

    def settle(self) -> None:
        """Gives the model its weights for good, when all learning is done."""


class Holding(Protocol):
    """The way in which a stage holds its models."""

    share: tuple[int, int]  # which of how many pieces is this process's; (0, 1): models are whole

    def learning(self, model: Any) -> Held:
        """A model that learns, and that is the same on all processes."""

    def resting(self, model: Any) -> Held:
        """One that never learns."""

    def computing(self) -> AbstractContextManager[None]:
        """Within, models that are gathered there compute as the learners do; elsewhere in their own dtype."""


class Moving:
    """A module that is called for passes, and the optimisers that move it, by name."""

    def __init__(
        self,
        module: Any,
        optimizers: dict[str, Any],
        *,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        clip: Callable[[list[Any], float], Any] = nn.utils.clip_grad_norm_,
        accumulating: Callable[[Any], AbstractContextManager[Any]] = nullcontext,
        forget: Callable[[Any], None] = lambda optimizer: optimizer.zero_grad(),
    ) -> None:
        """How a loss's gradient is added up, the gradients of parameters are clipped, and an optimiser's forgotten.

        `accumulating`: given the module, within which gradients need not cross the processes yet.
        """
        self.module, self.optimizers = module, optimizers
        self._backward, self._clip, self._accumulating, self._forget = backward, clip, accumulating, forget

    def accumulating(self) -> AbstractContextManager[None]:
        """Within, gradients need not cross the processes yet: more passes come before the optimiser's step."""
        return self._accumulating(self.module)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a loss, the mean over the processes, to what is there."""
        self._backward(loss)

    def clip(self, most: float, *names: str) -> float:
        """Clips the gradients of these optimisers, all without a name, together; their norm before."""
        parameters = [parameter for name in names or self.optimizers for parameter in self._parameters(name)]
        return float(whole(self._clip(parameters, most)))

    def _parameters(self, name: str) -> list[Any]:
        return parameters_of(self.optimizers[name])

    def set_rate(self, rate: float, *names: str) -> None:
        """Gives these optimisers, all without a name, a learning rate."""
        for name in names or self.optimizers:
            for group in self.optimizers[name].param_groups:
                group["lr"] = rate

    def step(self, *names: str) -> None:
        """One step of these optimisers, all without a name; gradients stay until they are forgotten."""
        for name in names or self.optimizers:
            self.optimizers[name].step()

    def forget(self) -> None:
        """Forgets all gradients, after a step or instead of one."""
        for optimizer in self.optimizers.values():
            self._forget(optimizer)

    def state(self) -> dict[str, Any]:
        """The optimisers' states by name; all processes must come here."""
        return {name: optimizer_state(optimizer) for name, optimizer in self.optimizers.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` gave, in any way of holding; all processes must come here."""
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, state[name])


@contextmanager
def gathered(*held: Held) -> Iterator[None]:
    """Within, all of these models have their weights."""
    with ExitStack() as stack:
        for each in held:
            stack.enter_context(each.gathered())
        yield


# Whole


class WholeModel:
    """A model that every process holds as it is."""

    def __init__(self, model: Any, accelerator: Accelerator | None = None) -> None:
        """`accelerator` is for what is to be moved by a stage itself, not by a trainer."""
        self.learner = self.called = model
        self._accelerator = accelerator

    def gathered(self) -> AbstractContextManager[None]:
        """See Held: nothing is to be done."""
        return nullcontext()

    def moving(self, module: nn.Module, optimizers: Mapping[str, Optimizer]) -> Moving:
        """See Held."""
        accelerator = self._accelerator
        assert accelerator is not None
        found, *prepared = accelerator.prepare(module, *optimizers.values())
        return Moving(
            found,
            dict(zip(optimizers, prepared, strict=True)),
            backward=accelerator.backward,
            clip=accelerator.clip_grad_norm_,
            accumulating=accelerator.no_sync,
        )

    def settle(self) -> None:
        """See Held: nothing is to be done."""


class WholeModels:
    """Accelerate's way: DDP where there are several processes."""

    share = (0, 1)

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def learning(self, model: Any) -> Held:
        """See Holding."""
        return WholeModel(model, self._accelerator)

    def resting(self, model: Any) -> Held:
        """See Holding."""
        return WholeModel(model)

    def computing(self) -> AbstractContextManager[None]:
        """See Holding."""
        return self._accelerator.autocast()


# In pieces


class ShardedModel:
    """A model whose weights lie in pieces, each of which one process holds."""

    def __init__(
        self,
        model: Any,
        learner: Any,
        pieces: dict[str, Any],
        dtype: Callable[[], torch.dtype | None] = lambda: None,
        called: Any = None,
    ) -> None:
        """`pieces`: of each parameter, as a DTensor or a Cut, by all names that it has in the model, which loses its
        weights. `dtype` says what they are gathered in; None: their own.
        """
        self.learner, self.called, self._dtype = learner, called or learner, dtype
        self._places = [
            (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], piece)
            for name, piece in pieces.items()
        ]
        self._uses = 0
        self._leave()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """See Held."""
        if self._uses == 0:
            self._fill(self._dtype())
        self._uses += 1
        try:
            yield
        finally:
            self._uses -= 1
            if self._uses == 0:
                self._leave()

    def moving(self, module: nn.Module, optimizers: Mapping[str, Optimizer]) -> Moving:
        """See Held. Each pass's gradients are cut at once, or their whole would have to be held."""
        return Moving(module, dict(optimizers))

    def settle(self) -> None:
        """See Held. The weights have their own dtype again."""
        self._fill(None)
        self._uses = 1
        self.learner = self.called = None

    @torch.no_grad()
    def _fill(self, dtype: torch.dtype | None) -> None:
        where, filled = device(), dict[int, nn.Parameter]()
        for owner, name, piece in self._places:
            if id(piece) not in filled:
                tensor = whole(piece).detach().to(where, dtype)
                filled[id(piece)] = nn.Parameter(tensor, requires_grad=piece.requires_grad)
            owner.register_parameter(name, filled[id(piece)])

    def _leave(self) -> None:
        absent = dict[int, nn.Parameter]()
        for owner, name, piece in self._places:
            if id(piece) not in absent:
                empty = torch.empty(piece.shape, dtype=piece.dtype, device=ABSENT)
                absent[id(piece)] = nn.Parameter(empty, requires_grad=piece.requires_grad)
            owner.register_parameter(name, absent[id(piece)])


class ShardedModels:
    """Our way with torch's `fully_shard`: the same on CPUs and GPUs."""

    def __init__(self, team: Team, sharding: Sharding, *, bfloat16: bool) -> None:
        where = device()
        if where.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        self.share = (team.rank, team.size)
        self._team, self._sharding = team, sharding
        self._mesh = init_device_mesh(where.type, (team.size,))
        self._dtype = torch.bfloat16 if bfloat16 else None  # that learners compute in
        self._gathering: torch.dtype | None = None  # that weights are gathered in now

    def learning(self, model: Any) -> Held:
        """See Holding. Each of a transformer's layers is gathered by itself, and with the whole what is left.

        Raises UserError for a base in 4 bits.
        """
        check_same(self._team, model)
        twin = twin_of(model)
        for layer in layers_of(twin):
            self._shard(layer, self._sharding.reshard_after_forward)
        self._shard(twin, again=False)
        return ShardedModel(model, twin, dict(twin.named_parameters(remove_duplicate=False)), self._now)

    def _shard(self, module: nn.Module, again: bool) -> None:
        """`again`: its weights are gathered a second time for the backward pass."""
        offload = CPUOffloadPolicy(pin_memory=self._mesh.device_type == "cuda")
        fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=again,
            # activations get the dtype of the weights by themselves; other inputs, such as rewards, must keep theirs
            mp_policy=MixedPrecisionPolicy(self._dtype, torch.float32 if self._dtype else None, None, False),
            offload_policy=offload if self._sharding.offload else OffloadPolicy(),
        )

    def resting(self, model: Any) -> Held:
        """See Holding."""
        check_same(self._team, model)
        cut: dict[int, DTensor] = {}
        pieces = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.dim() and parameter.device != ABSENT:
                if id(parameter) not in cut:
                    cut[id(parameter)] = in_pieces(parameter.detach(), self._mesh, *self.share)
                pieces[name] = cut[id(parameter)]
        return ShardedModel(model, None, pieces, self._now)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """See Holding: within, weights are gathered in what the learners compute in."""
        before, self._gathering = self._gathering, self._dtype
        try:
            yield
        finally:
            self._gathering = before

    def _now(self) -> torch.dtype | None:
        return self._gathering


def check_same(team: Team, model: nn.Module) -> None:
    """Raises StageFailed where the processes' models, which are to be cut into pieces, differ."""
    team.check_same("the weights before they are cut into pieces", fingerprint(model.parameters()))


def twin_of(model: Any) -> Any:
    """A model's modules once more, with the same weights. Raises UserError where these can't lie in pieces."""
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise UserError("a base in 4 bits (`lora.quantised`) can't lie in pieces: leave that out, or the sharding")
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def sharded_models(team: Team, sharding: Sharding | None, precision: str) -> Holding | None:
    """The way to cut models into pieces, where a launcher has asked for it and there are several processes."""
    if sharding is None or team.size == 1:
        return None
    bfloat16 = uses_bfloat16(precision)
    resting = ShardedModels(team, sharding, bfloat16=bfloat16 and not sharding.zero)
    if not sharding.zero:
        return resting
    from rlhf.zero import ZeroModels

    return ZeroModels(team, resting, bfloat16=bfloat16)


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of all transformers in a module: what their classes say is not to be split."""
    models = [each for each in module.modules() if isinstance(each, PreTrainedModel)]
    names = {name for model in models for name in model._no_split_modules or ()}
    return [each for each in module.modules() if type(each).__name__ in names]
