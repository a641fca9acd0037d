"""Launch files: configurations of Accelerate's launcher, read, checked, and told in a sentence. Imports nothing heavy.

Those in recipes/launch ship. A file that `accelerate config` has written is taken as well. Accelerate itself takes an
unknown key of a nested section in silence, and settings that the stages don't follow: both are refused here.
"""

import os
import subprocess
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rlhf.errors import RecipeError, UserError
from rlhf.recipe import read_yaml
from rlhf.runtime import check_deepspeed

_STAGES_OWN = "the recipe says how the stages compute"
_THREE_WAYS = "the stages train with DDP, FSDP2 or ZeRO-3"
NOT_TAKEN = {  # Accelerate's keys that no stage follows, and why
    "fp8_config": f"{_STAGES_OWN} (precision)",
    "dynamo_config": f"{_STAGES_OWN} (pretrain.compile)",
    "parallelism_config": _THREE_WAYS,
    "megatron_lm_config": _THREE_WAYS,
    "mpirun_config": "processes are started by Accelerate, not by mpirun",
    **dict.fromkeys(("tpu_name", "tpu_zone", "tpu_vm", "command_file", "commands"), "no stage runs on TPUs"),
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FsdpConfig(_Part):
    """`fsdp_config`: how FSDP2 shards. rlhf.sharding does it, and not Accelerate."""

    fsdp_version: Literal[2]
    fsdp_auto_wrap_policy: Literal["TRANSFORMER_BASED_WRAP"] = "TRANSFORMER_BASED_WRAP"
    fsdp_reshard_after_forward: bool = True
    fsdp_offload_params: bool = False
    fsdp_cpu_ram_efficient_loading: Literal[False] = False
    fsdp_state_dict_type: Literal["SHARDED_STATE_DICT"] = "SHARDED_STATE_DICT"
    fsdp_activation_checkpointing: Literal[False] = False
    fsdp_activation_checkpointing_offload: Literal[False] = False


_FSDP1 = "it is a key of FSDP 1, and FSDP2 is what is done"
FSDP_NOT_TAKEN = {  # Accelerate's keys of `fsdp_config` that we don't follow, and why
    "fsdp_transformer_layer_cls_to_wrap": "the layer's class is the model's own (_no_split_modules)",
    "fsdp_min_num_params": "layers are sharded one by one, whatever their size",
    **dict.fromkeys(
        (
            "fsdp_sharding_strategy",
            "fsdp_backward_prefetch",
            "fsdp_forward_prefetch",
            "fsdp_use_orig_params",
            "fsdp_sync_module_states",
        ),
        _FSDP1,
    ),
}
FSDP_MUST_BE = {  # and of those that we do, what they must say
    "fsdp_version": ("2", "FSDP 1 is not followed"),
    "fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", "each of the model's layers is sharded"),
    "fsdp_cpu_ram_efficient_loading": ("false", "every process reads the weights"),
    "fsdp_state_dict_type": ("SHARDED_STATE_DICT", "every process writes its piece of a checkpoint"),
    "fsdp_activation_checkpointing": ("false", f"{_STAGES_OWN} (pretrain.gradient_checkpointing)"),
    "fsdp_activation_checkpointing_offload": ("false", "no stage does it"),
}


class DeepSpeedConfig(_Part):
    """`deepspeed_config`: how DeepSpeed shards. rlhf.zero asks it to, and not Accelerate."""

    zero_stage: Literal[3]
    offload_optimizer_device: Literal["none"] = "none"
    offload_param_device: Literal["none"] = "none"
    zero3_init_flag: Literal[False] = False
    zero3_save_16bit_model: bool = False  # whatever it says: model/ is plain
    deepspeed_multinode_launcher: Literal["standard"] = "standard"


DEEPSPEED_NOT_TAKEN = {  # Accelerate's keys of `deepspeed_config` that we don't follow, and why
    "gradient_accumulation_steps": "the recipe's batch sizes are global, and microbatches follow from them",
    "gradient_clipping": "the recipe says it (gradient_clipping of each stage)",
    "deepspeed_config_file": "rlhf.zero tells DeepSpeed what it needs to know",
    "deepspeed_moe_layer_cls_names": "every module is sharded",
    **dict.fromkeys(("offload_optimizer_nvme_path", "offload_param_nvme_path"), "nothing is offloaded"),
    **dict.fromkeys(
        ("deepspeed_hostfile", "deepspeed_exclusion_filter", "deepspeed_inclusion_filter"),
        "every machine runs the same command with a launch file of its own (see machines-2)",
    ),
}
_OFFLOAD = "pieces stay on their GPU; fsdp2 has fsdp_offload_params"
DEEPSPEED_MUST_BE = {  # and of those that we do, what they must say
    "zero_stage": ("3", "below it weights would be whole on every process"),
    "offload_optimizer_device": ("none", _OFFLOAD),
    "offload_param_device": ("none", _OFFLOAD),
    "zero3_init_flag": ("false", "every process reads the weights"),
    "deepspeed_multinode_launcher": ("standard", "Accelerate's launcher starts the processes"),
}


class LaunchConfig(_Part):
    """The keys of a launch file, which are Accelerate's (accelerate.commands.config.config_args.ClusterConfig)."""

    compute_environment: Literal["LOCAL_MACHINE"] = "LOCAL_MACHINE"
    distributed_type: Literal["MULTI_GPU", "FSDP", "DEEPSPEED"]
    use_cpu: bool = False
    num_processes: int | None = Field(None, ge=1, le=100_000)
    num_machines: int = Field(1, ge=1, le=10_000)
    machine_rank: int = Field(0, ge=0)
    main_process_ip: str | None = None
    main_process_port: int | None = Field(None, ge=0, le=65535)
    rdzv_backend: Literal["static", "c10d"] = "static"
    same_network: bool = False
    gpu_ids: str | None = None
    mixed_precision: Literal["no"] = "no"
    enable_cpu_affinity: bool = False
    debug: bool = False
    main_training_function: str = "main"
    downcast_bf16: Literal["no", False] = False
    tpu_env: list[str] = []
    tpu_use_cluster: Literal[False] = False
    tpu_use_sudo: Literal[False] = False
    fsdp_config: FsdpConfig | None = None
    deepspeed_config: DeepSpeedConfig | None = None

    @model_validator(mode="after")
    def _hangs_together(self) -> "LaunchConfig":
        if self.num_machines > 1:
            if self.num_processes is None or self.num_processes % self.num_machines:
                raise ValueError("num_processes counts over all machines: a multiple of num_machines")
            if not (self.main_process_ip and self.main_process_port):
                raise ValueError("several machines meet at the first one's main_process_ip and main_process_port")
            if self.machine_rank >= self.num_machines:
                raise ValueError(f"machine_rank: counted from 0, so below num_machines ({self.num_machines})")
        elif self.machine_rank:
            raise ValueError("machine_rank: there is one machine (num_machines)")
        elif self.distributed_type == "MULTI_GPU" and self.gpu_ids != "all" and "," not in (self.gpu_ids or ","):
            raise ValueError("gpu_ids: Accelerate's launcher takes all, or two and more with commas between")
        for key, kind in (("fsdp_config", "FSDP"), ("deepspeed_config", "DEEPSPEED")):
            if getattr(self, key) and self.distributed_type != kind:
                raise ValueError(f"{key} belongs to distributed_type: {kind}, and not to {self.distributed_type}")
        if self.distributed_type == "FSDP" and self.fsdp_config is None:
            raise ValueError("fsdp_config: missing; it says `fsdp_version: 2` at least")
        if self.distributed_type == "DEEPSPEED" and self.deepspeed_config is None:
            raise ValueError("deepspeed_config: missing; it says `zero_stage: 3` at least")
        return self


class LaunchFile(BaseModel):
    """A launch file that has been read: where it is, what it says, and how many processes it starts in all."""

    model_config = ConfigDict(frozen=True)

    path: Path
    config: LaunchConfig
    processes: int

    @property
    def here(self) -> int:
        """The processes on this machine."""
        return self.processes // self.config.num_machines

    def __str__(self) -> str:
        config = self.config
        how = {"FSDP": "FSDP2", "DEEPSPEED": "DeepSpeed ZeRO-3"}.get(config.distributed_type, "DDP")
        where = f"CPUs ({how} over gloo)" if config.use_cpu else f"GPUs ({how} over NCCL)"
        count = "one process" if self.here == 1 else f"{self.here} processes"
        told = f"{self.path.name}: {count} on this machine's {where}, started by Accelerate's launcher"
        if config.num_machines > 1:
            told += (
                f"; this is machine {config.machine_rank} of {config.num_machines} (counted from 0), and "
                f"{self.processes} processes meet at {config.main_process_ip}:{config.main_process_port}"
            )
        return told


def shipped_launch_files() -> list[Path]:
    """The launch files that come with the package."""
    return sorted((Path(__file__).resolve().parent.parent / "recipes" / "launch").glob("*.yaml"))


def described(path: Path) -> str:
    """A shipped launch file's first comment: what it starts."""
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def open_launch_file(name_or_path: str, processes: int | None) -> LaunchFile:
    """The launch file of a shipped one's name, or of a path, with all that it starts settled.

    `processes`: what --processes says. Raises UserError, naming file and key, for what can't be done here.
    """
    path = find_launch_file(name_or_path)
    config = read_launch_file(path)
    if config.distributed_type == "DEEPSPEED":
        check_deepspeed()
    asked = config.num_processes
    if asked and processes and asked != processes:
        raise UserError(f"--processes {processes} and {path} (num_processes: {asked}) disagree; leave one of them out")
    wanted = asked or processes
    if not config.use_cpu:
        wanted = _fitting(path, config, wanted)
    if not wanted:
        raise UserError(f"{path}: num_processes: missing; say it there, or with --processes N")
    return LaunchFile(path=path, config=config, processes=wanted)


def find_launch_file(name_or_path: str) -> Path:
    """The file of a shipped launch file's name, or the path itself. Raises UserError where there is none."""
    shipped = {path.stem: path for path in shipped_launch_files()}
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        is_file = False
    if not is_file:
        close = get_close_matches(name_or_path, shipped, n=1)
        known = f"did you mean {close[0]}?" if close else f"shipped ones are: {', '.join(shipped)}"
        raise UserError(
            f"--launch-config: no file {name_or_path[:100]}, and no shipped launch file has that name; {known}"
        )
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise UserError(f"--launch-config: {path}: Accelerate's launcher reads .yaml and .json files")
    return path


def read_launch_file(path: Path) -> LaunchConfig:
    """A launch file's values. Raises RecipeError, which names the key and the nearest right one."""
    if not isinstance(read_yaml(path, "launch file"), dict):
        raise RecipeError(f"{path}: a launch file is a mapping of Accelerate's keys to values")
    raw = yaml.safe_load(path.read_text(encoding="utf-8-sig"))  # as Accelerate reads it: a plain no is false there
    try:
        return LaunchConfig.model_validate(raw)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{path}: {_explain(one)}" for one in error.errors())) from None


def _explain(error: Any) -> str:
    """One line for one pydantic error."""
    place = [str(part) for part in error["loc"]]
    key, given = ".".join(place), error["input"]
    if error["type"] == "extra_forbidden":
        why = NOT_TAKEN.get(key) or {**FSDP_NOT_TAKEN, **DEEPSPEED_NOT_TAKEN}.get(place[-1])
        if why:
            return f"{key}: can't be followed: {why}"
        parts: dict[str, type[BaseModel]] = {"fsdp_config": FsdpConfig, "deepspeed_config": DeepSpeedConfig}
        known = parts.get(place[0], LaunchConfig).model_fields if len(place) > 1 else LaunchConfig.model_fields
        close = get_close_matches(place[-1], known, n=1, cutoff=0.5)
        return f"{key}: unknown key" + (f"; did you mean {close[0]}?" if close else "")
    if key == "distributed_type" and given == "MULTI_CPU":
        return f"{key}: Accelerate's launcher starts one process for MULTI_CPU; write MULTI_GPU and use_cpu: true"
    if key == "distributed_type" and given in ("NO", False):
        return f"{key}: one process needs no launch file: leave --launch-config out"
    musts = {**FSDP_MUST_BE, **DEEPSPEED_MUST_BE}
    if place[-1:] and place[-1] in musts and error["type"] in ("literal_error", "missing"):
        must, why = musts[place[-1]]
        return f"{key}: must be {must} ({why})"
    if key == "mixed_precision":
        why = "in quotes: a plain one is false" if given is False else f"{_STAGES_OWN}: precision: bfloat16"
        return f"{key}: must be 'no' ({why})"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not place:
        return message
    expected = str((error.get("ctx") or {}).get("expected", "")).replace("'", "").replace(" or ", ", ").split(", ")
    close = get_close_matches(str(given), expected, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{key}: {message[0].lower() + message[1:]} (given: {str(given)[:80]!r}){hint}"


def _fitting(path: Path, config: LaunchConfig, wanted: int | None) -> int:
    """The processes in all, one for each GPU. Raises UserError where this machine has too few."""
    found = _gpus(config)
    if found == 0:
        instead = {"FSDP": "fsdp2-cpu", "DEEPSPEED": "zero3-cpu"}.get(config.distributed_type, "cpu-2")
        raise UserError(
            f"{path} starts processes on GPUs, and this machine has none that torch can use; take {instead}"
        )
    here = (wanted or found * config.num_machines) // config.num_machines
    if here > found:
        source = "num_processes" if config.num_processes else "--processes"
        raise UserError(f"{path}: {source} asks for {here} GPUs of this machine, and torch can use {found}")
    return here * config.num_machines


def _gpus(config: LaunchConfig) -> int:
    """The GPUs that the file means and torch can use; asked in a process of its own, this one stays light."""
    environment = dict(os.environ)
    if config.gpu_ids and config.gpu_ids != "all":
        environment["CUDA_VISIBLE_DEVICES"] = config.gpu_ids
    counting = [sys.executable, "-P", "-c", "import torch; print(torch.cuda.device_count())"]
    done = subprocess.run(counting, env=environment, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else 0
