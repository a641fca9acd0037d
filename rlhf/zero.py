"""DeepSpeed's ZeRO-3 (Rajbhandari et al. 2020, arXiv:1910.02054) as a way to hold models; see rlhf.sharding.

DeepSpeed cuts weights and gradients, gathers the first for each layer's passes and adds up the second. The optimisers
are the stage's own, on this process's pieces: several of them share a module, one may rest while another steps, norms
are known before a step, and a step may not be taken, none of which `engine.step` offers. All weights stay float32;
where a GPU has bfloat16, passes compute in it by torch's autocast.
"""

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from rlhf.errors import UserError
from rlhf.pieces import CUT, Cut, cut_of, parameters_of
from rlhf.runtime import device
from rlhf.sharding import Held, Moving, ShardedModel, ShardedModels, check_same, layers_of, twin_of
from rlhf.team import Team

NO_MUON = (
    "pretrain.optimizer: Muon needs whole rows of matrices, and DeepSpeed cuts within them; take adamw, or a "
    "launch file with FSDP2"
)
BUCKET = 2**22  # numbers of gradients that cross the processes together


def _deepspeed() -> Any:
    """DeepSpeed, imported when it is first used. It says errors only, and compiles nothing."""
    os.environ["DS_ACCELERATOR"] = device().type
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # its shared memory for sums between CPU processes would need a C++ compiler at every first start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class ZeroModels:
    """Our use of DeepSpeed: the same on CPUs and GPUs."""

    def __init__(self, team: Team, resting: ShardedModels, *, bfloat16: bool) -> None:
        """`resting`: how models lie that never learn."""
        self.share = resting.share
        self._team, self._resting, self._bfloat16 = team, resting, bfloat16

    def learning(self, model: Any) -> Held:
        """See Holding. Raises UserError for a base in 4 bits."""
        check_same(self._team, model)
        twin = twin_of(model)
        engine = self._engine(twin)
        for parameter in twin.parameters():
            setattr(parameter, CUT, self._cut(parameter))
        cuts = {name: cut_of(parameter) for name, parameter in twin.named_parameters(remove_duplicate=False)}
        return ZeroModel(self._team, model, twin, cuts, engine)

    def _engine(self, module: nn.Module) -> Any:
        """DeepSpeed's module that is called for passes; its own optimiser, which it must have, never steps."""
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        settings = _settings(module, self._bfloat16)
        unused = SGD(trained, lr=0.0)
        engine, *_ = _deepspeed().initialize(model=module, optimizer=unused, dist_init_required=False, config=settings)
        return engine

    def _cut(self, parameter: Any) -> Cut:
        if not parameter.requires_grad:
            return Cut(parameter.ds_tensor, tuple(parameter.ds_shape), *self.share, trained=False)
        piece = _deepspeed().utils.safe_get_local_fp32_param(parameter)
        return Cut(piece, tuple(parameter.ds_shape), *self.share, trained=True, read=parameter.ds_tensor)

    def resting(self, model: Any) -> Held:
        """See Holding."""
        return self._resting.resting(model)

    def computing(self) -> AbstractContextManager[None]:
        """See Holding."""
        return torch.autocast(device().type, torch.bfloat16) if self._bfloat16 else nullcontext()


class ZeroModel(ShardedModel):
    """A model whose weights and gradients DeepSpeed holds; `called` is its engine."""

    def __init__(self, team: Team, model: Any, learner: Any, cuts: dict[str, Any], engine: Any) -> None:
        super().__init__(model, learner, cuts, called=engine)
        self._team = team

    def moving(self, module: nn.Module, optimizers: Mapping[str, Optimizer]) -> Moving:
        """See Held. Raises UserError for another optimiser than AdamW."""
        engine = self.called
        for optimizer in optimizers.values():
            if not isinstance(optimizer, AdamW):
                raise UserError(NO_MUON)
            _take_over(optimizer, engine)

        def backward(loss: Tensor) -> None:
            engine.backward(loss, scale_wrt_gas=False)
            _release(engine)

        return Moving(module, dict(optimizers), backward=backward, clip=self._clip, forget=_forget)

    def settle(self) -> None:
        """See Held. DeepSpeed keeps a list of the modules that it ever held, and so would keep their pieces."""
        engine = self.called
        super().settle()
        engine.destroy()
        held = _deepspeed().runtime.zero.parameter_offload.FWD_MODULE_STACK
        held[:] = [module for module in held if module is not engine.module]

    @torch.no_grad()
    def _clip(self, pieces: list[nn.Parameter], most: float) -> Tensor:
        """As torch.nn.utils.clip_grad_norm_ does, of gradients of which each process has pieces."""
        mine = sum(float(piece.grad.double().square().sum()) for piece in pieces if piece.grad is not None)
        norm = torch.tensor(self._team.add([mine])[0] ** 0.5)
        for piece in pieces:
            if piece.grad is not None:
                piece.grad.mul_(float((most / (norm + 1e-6)).clamp(max=1.0)))
        return norm


def _settings(module: nn.Module, bfloat16: bool) -> dict[str, Any]:
    """DeepSpeed's configuration. Batch sizes mean nothing here: gradients are added up until they are forgotten."""
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers_of(module)]
    layer = max(sizes, default=BUCKET)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,  # the one that never steps
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": layer,
            "stage3_max_live_parameters": 2 * layer,  # one that computes, and one that is gathered in advance
            "stage3_max_reuse_distance": 0,  # a layer's weights are gathered again for its backward pass
            "stage3_param_persistence_threshold": 0,  # small ones are cut as well
        },
        # sums of gradients stay float32
        "torch_autocast": {"enabled": bfloat16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }


@torch.no_grad()
def _take_over(optimizer: Optimizer, engine: Any) -> None:
    """Lets an optimiser of an engine's parameters move this process's pieces of them."""
    gradient_of = _deepspeed().utils.safe_get_local_grad
    for group in optimizer.param_groups:
        pieces = []
        for parameter in group["params"]:
            cut = cut_of(parameter)
            assert cut is not None
            piece = nn.Parameter(cut.piece)
            piece.grad = gradient_of(parameter)  # where DeepSpeed adds up this process's part of the gradient
            setattr(piece, CUT, cut)
            pieces.append(piece)
        group["params"] = pieces

    def stepped(*_: Any) -> None:
        for piece in parameters_of(optimizer):
            cut_of(piece).publish()  # type: ignore[union-attr]  # each has been given one
        _release(engine)
        _forget(optimizer)

    optimizer.register_step_post_hook(stepped)


def _release(engine: Any) -> None:
    """Lets go of weights that are still gathered after a backward pass: they may be others at the next one."""
    engine.optimizer.empty_partition_cache()


def _forget(optimizer: Any) -> None:
    optimizer.zero_grad(set_to_none=False)  # the memory is DeepSpeed's
