"""Tensors of which each process holds a piece: gathered, written, read, clipped, whatever has cut them.

FSDP2 cuts rows, as torch's DTensor; DeepSpeed's ZeRO-3 cuts a tensor's numbers in one line, as a `Cut` says; a
checkpoint holds rows, as a Piece. All functions take whole tensors too.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from rlhf.checkpoint import Piece, rows_of
from rlhf.errors import StageFailed

ABSENT = torch.device("meta")  # where the parameters of a model are whose weights lie in pieces
CUT = "_rlhf_cut"  # the attribute of a parameter, and of the piece of it that an optimiser moves, that is their Cut


class Cut:
    """How ZeRO-3 holds a parameter: its numbers in one line, in pieces of equal length, the last one filled up."""

    def __init__(
        self, piece: Tensor, shape: tuple[int, ...], rank: int, size: int, *, trained: bool, read: Tensor | None = None
    ) -> None:
        """`piece`: this process's, of one dimension; `read`: another copy, which passes read where it isn't that."""
        self.piece, self.shape, self.rank, self.size, self.requires_grad = piece, shape, rank, size, trained
        self._read = read

    @property
    def dtype(self) -> torch.dtype:
        """The parameter's."""
        return self.piece.dtype

    def whole(self, piece: Tensor | None = None) -> Tensor:
        """The parameter, or what else lies as it does, such as a moment; all processes must come here."""
        mine = self.piece.detach() if piece is None else piece
        line = mine.new_empty(self.size * mine.numel())
        distributed.all_gather(list(line.split(mine.numel())), mine.contiguous())
        return line[: math.prod(self.shape)].view(self.shape)

    @property
    def _in_rows(self) -> bool:
        """Whether the pieces are a checkpoint's rows too."""
        return self.shape[0] % self.size == 0

    def rows(self, piece: Tensor | None = None) -> Piece:
        """The parameter, or what else lies as it does, as a checkpoint holds it; all processes must come here."""
        mine = self.piece.detach() if piece is None else piece
        if self._in_rows:
            return Piece(mine.view(-1, *self.shape[1:]), self.shape, self.rank, self.size)
        rows = rows_of(self.shape[0], self.rank, self.size)
        return Piece(self.whole(mine)[rows.start : rows.stop].clone(), self.shape, self.rank, self.size)

    def piece_of(self, value: Piece | Tensor) -> Tensor:
        """What this process holds of a tensor of the parameter's shape; all processes must come here."""
        if isinstance(value, Piece) and self._in_rows:
            return value.local.flatten().to(self.piece, copy=True)
        whole = _rows_together(value, self.piece.device) if isinstance(value, Piece) else value
        each = self.piece.numel()
        mine = whole.flatten()[self.rank * each : (self.rank + 1) * each].to(self.piece)
        return nn.functional.pad(mine, (0, each - mine.numel()))

    @torch.no_grad()
    def put(self, value: Piece | Tensor) -> None:
        """Gives the parameter a value; all processes must come here."""
        self.piece.copy_(self.piece_of(value))
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Lets passes read what the piece is now."""
        if self._read is not None:
            self._read.copy_(self.piece)


def cut_of(tensor: Any) -> Cut | None:
    """How ZeRO-3 has cut a parameter, if it has."""
    return tensor if isinstance(tensor, Cut) else getattr(tensor, CUT, None)


def _rows_together(piece: Piece, where: torch.device) -> Tensor:
    """The tensor of which each process has some rows."""
    each = -(-piece.shape[0] // piece.size)
    mine = torch.zeros((each, *piece.shape[1:]), dtype=piece.local.dtype, device=where)
    mine[: len(piece.local)] = piece.local
    rows = mine.new_empty((each * piece.size, *piece.shape[1:]))
    distributed.all_gather(list(rows.split(each)), mine)
    return rows[: piece.shape[0]]


def in_pieces(tensor: Tensor, mesh: DeviceMesh, rank: int, size: int) -> DTensor:
    """This process's rows of a tensor that all processes have."""
    rows = rows_of(tensor.shape[0], rank, size)
    return _assembled(tensor[rows.start : rows.stop].clone(), tensor.shape, mesh)


def _assembled(local: Tensor, shape: Sequence[int], mesh: DeviceMesh) -> DTensor:
    whole = torch.empty(tuple(shape), device=ABSENT)
    found: DTensor = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )
    return found


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's own, also where it lies in pieces."""
    cut = cut_of(parameter)
    return cut.shape if cut else tuple(parameter.shape)


# A module's


def is_absent(model: nn.Module) -> bool:
    """Whether some of a model's weights are not there, since they lie in pieces."""
    return any(parameter.device == ABSENT for parameter in model.parameters())


def is_sharded(module: nn.Module) -> bool:
    """Whether some of a module's parameters lie in pieces."""
    return any(isinstance(parameter, DTensor) or cut_of(parameter) for parameter in module.parameters())


def learned(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def weights_of(module: nn.Module) -> dict[str, Any]:
    """All weights of a module by name, as a checkpoint holds them."""
    if not is_sharded(module):
        return module.state_dict()
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    kept = {name: value for name, value in module.state_dict().items() if name not in parameters}
    return pieces({**dict(module.named_parameters()), **kept})  # type: ignore[no-any-return]  # tied ones once


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
    """Gives each of these tensors its value, a Piece or whole; all processes must come here."""
    for name, target in targets.items():
        cut = cut_of(target)
        if cut:
            cut.put(values[name])
        elif isinstance(target, DTensor):
            target.to_local().copy_(_local(target, values[name]))
        else:
            target.copy_(values[name])


# A tensor's


def whole(tensor: Any) -> Tensor:
    """A tensor that may lie in pieces, whole; all processes must come here."""
    cut = cut_of(tensor)
    if cut:
        return cut.whole()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mine(tensor: Tensor) -> tuple[Tensor, slice]:
    """What this process holds of a tensor in rows, and which rows of the whole these are."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(None)
    rows = rows_of(tensor.shape[0], tensor.device_mesh.get_local_rank(), tensor.device_mesh.size())
    return tensor.to_local(), slice(rows.start, rows.stop)


def pieces(tree: Any) -> Any:
    """A tree of state with a Piece in place of each tensor that lies in pieces; all processes must come here."""
    cut = cut_of(tree)
    if cut:
        return cut.rows()
    if isinstance(tree, DTensor):
        mesh = tree.device_mesh
        return Piece(tree.to_local().detach(), tuple(tree.shape), mesh.get_local_rank(), mesh.size())
    if isinstance(tree, dict):
        return {key: pieces(inner) for key, inner in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(pieces(inner) for inner in tree)
    return tree


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
            if not isinstance(parameter, DTensor) and not cut_of(parameter) and parameter.device != ABSENT
        )
    )


# An optimiser's


def parameters_of(optimizer: Any) -> list[Any]:
    """What an optimiser moves, in its order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """An optimiser's state, as a checkpoint holds it; all processes must come here."""
    state, parameters = pieces(optimizer.state_dict()), parameters_of(optimizer)
    moments = {
        number: {name: _moment(parameters[number], value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": moments}


def _moment(parameter: Any, value: Any) -> Any:
    cut = cut_of(parameter)
    if cut and isinstance(value, Tensor) and value.shape == parameter.shape:
        return cut.rows(value)
    return value


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Gives an optimiser the state of one whose model was held in any way; all processes must come here."""
    parameters = parameters_of(optimizer)
    moments = {
        number: {name: _like(parameters[number], value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})


def _like(parameter: Tensor, value: Any) -> Any:
    """What an optimiser keeps of a parameter, held as the parameter is."""
    cut = cut_of(parameter)
    if not (isinstance(value, Piece) or (isinstance(value, Tensor) and value.shape == shape_of(parameter))):
        return value
    if cut:
        return cut.piece_of(value)
    if not isinstance(parameter, DTensor):
        return value
    local = _local(parameter, value).to(parameter.to_local().device, copy=True)
    return _assembled(local, parameter.shape, parameter.device_mesh)
