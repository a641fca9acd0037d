"""How a stage's models lie on its processes: whole on each of them, or cut into pieces (FSDP2).

Where they are cut, a model that learns has a *twin*, which is what learns: the same modules, but each process holds a
piece of every parameter, of its gradient and of the optimiser's state (Zhao et al. 2023, arXiv:2304.11277; torch's
`fully_shard`). A layer's weights are gathered for its forward and its backward pass, so all processes must do equally
many of them. The model itself has no weights meanwhile; they are gathered into it, on every process, where it is to
draw, to be measured or to be saved. There it is a plain model, and processes may do different numbers of passes.

A checkpoint holds pieces (rlhf.checkpoint.Piece), which another number of processes puts together anew.
"""

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from transformers import PreTrainedModel

from rlhf.checkpoint import Piece, rows_of
from rlhf.errors import StageFailed, UserError
from rlhf.runtime import Sharding, device, uses_bfloat16
from rlhf.team import Team

ABSENT = torch.device("meta")  # where the parameters of a model are whose weights lie in pieces


class Held(Protocol):
    """A model as the processes hold it."""

    learner: Any  # the module that learns

    def gathered(self) -> AbstractContextManager[None]:
        """Within, the model has its weights, on every process; all of them must come here. It is not to learn there."""

    def settle(self) -> None:
        """Gives the model its weights for good, when all learning is done."""


class Holding(Protocol):
    """The way in which a stage holds its models."""

    share: tuple[int, int]  # which of how many pieces is this process's; (0, 1): models are whole

    def learning(self, model: Any) -> Held:
        """A model that learns, and that is the same on all processes."""

    def resting(self, model: Any) -> Held:
        """One that never learns."""

    def prepared(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[Any, list[Any]]:
        """What is called for a pass of which gradients are taken, and optimisers; `module` is a learner or has it."""

    def accumulating(self, module: Any) -> AbstractContextManager[None]:
        """Within, gradients need not cross the processes yet: more passes come before the optimiser's step."""

    def computing(self) -> AbstractContextManager[None]:
        """Within, gathered models compute as the learners do."""


@contextmanager
def gathered(*held: Held) -> Iterator[None]:
    """Within, all of these models have their weights."""
    with ExitStack() as stack:
        for each in held:
            stack.enter_context(each.gathered())
        yield


def is_absent(model: nn.Module) -> bool:
    """Whether some of a model's weights are not there, since they lie in pieces."""
    return any(parameter.device == ABSENT for parameter in model.parameters())


# Whole


class WholeModel:
    """A model that every process holds as it is."""

    def __init__(self, model: Any) -> None:
        self.learner = model

    def gathered(self) -> AbstractContextManager[None]:
        """See Held: nothing is to be done."""
        return nullcontext()

    def settle(self) -> None:
        """See Held: nothing is to be done."""


class WholeModels:
    """Accelerate's way: DDP where there are several processes."""

    share = (0, 1)

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def learning(self, model: Any) -> Held:
        """See Holding."""
        return WholeModel(model)

    def resting(self, model: Any) -> Held:
        """See Holding."""
        return WholeModel(model)

    def prepared(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[Any, list[Any]]:
        """See Holding."""
        found, *prepared = self._accelerator.prepare(module, *optimizers)
        return found, prepared

    def accumulating(self, module: Any) -> AbstractContextManager[None]:
        """See Holding."""
        return self._accelerator.no_sync(module)

    def computing(self) -> AbstractContextManager[None]:
        """See Holding."""
        return self._accelerator.autocast()


# In pieces


class ShardedModel:
    """A model whose weights lie in pieces, each of which one process holds."""

    def __init__(self, model: Any, learner: Any, pieces: dict[str, Any], dtype: torch.dtype | None) -> None:
        """`pieces`: of each parameter, as a DTensor, by all names that it has in the model, which loses its weights.

        `dtype`: of floating-point weights while they are gathered; None: their own.
        """
        self.learner, self._dtype = learner, dtype
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
            self._fill(self._dtype)
        self._uses += 1
        try:
            yield
        finally:
            self._uses -= 1
            if self._uses == 0:
                self._leave()

    def settle(self) -> None:
        """See Held. The weights have their own dtype again."""
        self._fill(None)
        self._uses = 1
        self.learner = None

    @torch.no_grad()
    def _fill(self, dtype: torch.dtype | None) -> None:
        where, whole = device(), dict[int, nn.Parameter]()
        for owner, name, piece in self._places:
            if id(piece) not in whole:
                tensor = piece.detach().full_tensor().to(where, dtype)
                whole[id(piece)] = nn.Parameter(tensor, requires_grad=piece.requires_grad)
            owner.register_parameter(name, whole[id(piece)])

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
        self._dtype = torch.bfloat16 if bfloat16 else None

    def learning(self, model: Any) -> Held:
        """See Holding. Each of a transformer's layers is gathered by itself, and with the whole what is left.

        Raises UserError for a base in 4 bits.
        """
        if not all(parameter.is_floating_point() for parameter in model.parameters()):
            raise UserError("a base in 4 bits (`lora.quantised`) can't lie in pieces: leave that out, or FSDP")
        self._check_same(model)
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
        for layer in layers_of(twin):
            self._shard(layer, self._sharding.reshard_after_forward)
        self._shard(twin, again=False)
        return ShardedModel(model, twin, dict(twin.named_parameters(remove_duplicate=False)), self._dtype)

    def _shard(self, module: nn.Module, again: bool) -> None:
        """`again`: its weights are gathered a second time for the backward pass."""
        fully_shard(
            module,
            mesh=self._mesh,
            reshard_after_forward=again,
            # activations get the dtype of the weights by themselves; other inputs, such as rewards, must keep theirs
            mp_policy=MixedPrecisionPolicy(self._dtype, torch.float32 if self._dtype else None, None, False),
            offload_policy=CPUOffloadPolicy() if self._sharding.offload else OffloadPolicy(),
        )

    def resting(self, model: Any) -> Held:
        """See Holding."""
        self._check_same(model)
        cut: dict[int, DTensor] = {}
        pieces = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter.dim() and parameter.device != ABSENT:
                if id(parameter) not in cut:
                    cut[id(parameter)] = _in_pieces(parameter.detach(), self._mesh, *self.share)
                pieces[name] = cut[id(parameter)]
        return ShardedModel(model, None, pieces, self._dtype)

    def _check_same(self, model: nn.Module) -> None:
        self._team.check_same("the weights before they are cut into pieces", fingerprint(model.parameters()))

    def prepared(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[Any, list[Any]]:
        """See Holding: nothing is to be done."""
        return module, list(optimizers)

    def accumulating(self, module: Any) -> AbstractContextManager[None]:
        """See Holding. Each pass's gradients are cut at once, or their whole would have to be held."""
        return nullcontext()

    def computing(self) -> AbstractContextManager[None]:
        """See Holding: gathered weights have the learners' dtype already."""
        return nullcontext()


def sharded_models(team: Team, sharding: Sharding | None, precision: str) -> ShardedModels | None:
    """The way to cut models into pieces, where a launcher has asked for it and there are several processes."""
    if sharding is None or team.size == 1:
        return None
    return ShardedModels(team, sharding, bfloat16=uses_bfloat16(precision))


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of all transformers in a module: what their classes say is not to be split."""
    models = [each for each in module.modules() if isinstance(each, PreTrainedModel)]
    names = {name for model in models for name in model._no_split_modules or ()}
    return [each for each in module.modules() if type(each).__name__ in names]


def _in_pieces(tensor: Tensor, mesh: DeviceMesh, rank: int, size: int) -> DTensor:
    """This process's rows of a tensor that all processes have."""
    rows = rows_of(tensor.shape[0], rank, size)
    return _assembled(tensor[rows.start : rows.stop].clone(), tensor.shape, mesh)


def _assembled(local: Tensor, shape: Sequence[int], mesh: DeviceMesh) -> DTensor:
    whole = torch.empty(tuple(shape), device=ABSENT)
    found: DTensor = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return found


# States


def is_sharded(module: nn.Module) -> bool:
    """Whether some of a module's parameters lie in pieces."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def learned(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may lie in pieces, whole; all processes must come here."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mine(tensor: Tensor) -> tuple[Tensor, slice]:
    """What this process holds of a tensor, and which rows of the whole these are."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(None)
    rows = rows_of(tensor.shape[0], tensor.device_mesh.get_local_rank(), tensor.device_mesh.size())
    return tensor.to_local(), slice(rows.start, rows.stop)


def pieces(tree: Any) -> Any:
    """A tree of state with a Piece in place of each tensor that lies in pieces."""
    if isinstance(tree, DTensor):
        mesh = tree.device_mesh
        return Piece(tree.to_local().detach(), tuple(tree.shape), mesh.get_local_rank(), mesh.size())
    if isinstance(tree, dict):
        return {key: pieces(inner) for key, inner in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(pieces(inner) for inner in tree)
    return tree


def weights_of(module: nn.Module) -> dict[str, Any]:
    """All weights of a module by name, as a checkpoint holds them."""
    if not is_sharded(module):
        return module.state_dict()
    named = dict(module.named_parameters())  # tied ones once
    kept = {name: value for name, value in module.state_dict().items() if not isinstance(value, DTensor)}
    return pieces({**named, **kept})  # type: ignore[no-any-return]


@torch.no_grad()
def put(module: nn.Module, values: dict[str, Any]) -> None:
    """Gives a module the weights that `weights_of`, of a module that was held in any way, has given."""
    targets = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    missing = {id(parameter) for parameter in module.parameters()} - {id(targets.get(name)) for name in values}
    if missing or not set(values) <= set(targets):
        raise StageFailed("the checkpoint has other weights than the model; remove it, and the stage begins again")
    put_in({name: targets[name] for name in values}, values)


@torch.no_grad()
def put_in(targets: dict[str, Any], values: dict[str, Any]) -> None:
    """Gives each of these tensors its value, a Piece or whole."""
    for name, target in targets.items():
        if isinstance(target, DTensor):
            target.to_local().copy_(_local(target, values[name]))
        else:
            target.copy_(values[name])


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Gives an optimiser the state of one whose model was held in any way."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: _like(parameters[number], value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _like(parameter: Tensor, value: Any) -> Any:
    """What an optimiser keeps of a parameter, held as the parameter is."""
    alike = isinstance(value, Piece) or (isinstance(value, Tensor) and value.shape == parameter.shape)
    if not (isinstance(parameter, DTensor) and alike):
        return value
    local = _local(parameter, value).to(parameter.to_local().device, copy=True)
    return _assembled(local, parameter.shape, parameter.device_mesh)


def _local(like: DTensor, value: Piece | Tensor) -> Tensor:
    return value.local if isinstance(value, Piece) else value[mine(like)[1]]


def fingerprint(parameters: Iterable[nn.Parameter]) -> float:
    """A number that differs where weights differ, for processes to compare; of pieces, which do differ, it has nothing.

    It adds up in one order, so equal bits give equal numbers.
    """
    return float(
        sum(
            float(parameter.detach().double().sum()) * (1 + number % 97)
            for number, parameter in enumerate(parameters)
            if not isinstance(parameter, DTensor) and parameter.device != ABSENT
        )
    )
