"""How much memory a computation takes, found by going through it without numbers.

Within `tracing()` tensors have shapes and no contents (torch's FakeTensorMode): a model of any size is built in a
moment, and forward and backward passes, optimiser steps and generation run as they would, operation by operation,
while the bytes that each operation makes and drops are counted. So what is counted is what the code does, whatever the
architecture, and not what a formula remembers of it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORKING = "activations and working memory"  # the role of what nobody has named
GRADIENTS, OPTIMISER = "gradients", "optimiser"


def is_traced(tensor: Tensor) -> bool:
    """Whether a tensor has a shape but no contents, so that no number may be asked of it."""
    return isinstance(tensor, FakeTensor)


class Moment(NamedTuple):
    """What there was when a phase's memory was largest, in bytes."""

    phase: str
    roles: dict[str, int]  # of all tensors, by role

    @property
    def total(self) -> int:
        """Of all roles."""
        return sum(self.roles.values())


class _Live(NamedTuple):
    """A storage that was there when it was last looked at."""

    storage: StorageWeakRef
    size: int  # bytes
    role: str


class Footprint(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes, until nothing holds it any more."""

    def __init__(self) -> None:
        super().__init__()
        self.moments: list[Moment] = []  # of each phase, in order
        self._role = WORKING
        self._live: dict[int, _Live] = {}  # by storage; what has gone since the last look is among them
        self._roles: Counter[str] = Counter()  # bytes
        self._total = self._most = 0  # bytes; in this phase at most
        self._largest = Moment("", {})

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation, and notes what it made."""
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return found

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        self._live[key] = _Live(StorageWeakRef(storage), size, self._role)
        self._roles[self._role] += size
        self._total += size
        if self._total > self._most:
            self._forget_the_gone()
        if self._total > self._most:
            self._most, self._largest = self._total, Moment(self._largest.phase, dict(self._roles))

    def _forget_the_gone(self) -> None:
        """Takes out what nothing holds any more. It is looked for where it matters, and not at every operation."""
        for key in [key for key, live in self._live.items() if live.storage.expired()]:
            _, size, role = self._live.pop(key)
            self._roles[role] -= size
            self._total -= size

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """What is made within plays this role."""
        before, self._role = self._role, name
        try:
            yield
        finally:
            self._role = before

    def name(self, role: str, tensors: Iterable[Tensor]) -> None:
        """Gives tensors that are there already a role."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._live:
                live = self._live[key]
                self._live[key] = live._replace(role=role)
                self._roles[live.role] -= live.size
                self._roles[role] += live.size
        self._forget_the_gone()
        if self._total == self._most:  # it's now that memory is largest
            self._largest = Moment(self._largest.phase, dict(self._roles))

    def name_gradients(self, parameters: Iterable[nn.Parameter], role: str = GRADIENTS) -> None:
        """Has the gradients of parameters play this role as soon as they are there."""
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: self.name(role, () if p.grad is None else (p.grad,))
                )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Notes how large memory is at most within."""
        self._forget_the_gone()
        self._most, self._largest = self._total, Moment(name, dict(self._roles))
        yield
        self.moments.append(self._largest)

    def peak(self) -> Moment:
        """The phase in which memory is largest, as it is then."""
        return max(self.moments, key=lambda moment: moment.total)


@contextmanager
def tracing() -> Iterator[Footprint]:
    """Within, tensors are made without contents, on the CPU, and counted."""
    footprint = Footprint()
    with ExitStack() as stack:
        # a module's tensors can't be exchanged here, and are on the CPU in float32 already
        stack.enter_context(patch.object(nn.Module, "to", lambda module, *_, **__: module))
        # torch's own copy of a tensor without contents is a real one in memory that nobody has given it
        stack.enter_context(patch.object(FakeTensor, "__deepcopy__", _copied, create=True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(footprint)
        yield footprint


def _copied(tensor: Tensor, memo: dict[int, Tensor]) -> Tensor:
    """What copy.deepcopy makes of a tensor without contents."""
    if id(tensor) not in memo:
        copy = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return memo[id(tensor)]
