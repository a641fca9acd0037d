"""Launch files: those that ship mean to Accelerate what they say; a wrong one is refused by file and key."""

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from rlhf import launch_file
from rlhf.errors import RecipeError, UserError
from rlhf.launch_file import (
    DEEPSPEED_NOT_TAKEN,
    FSDP_NOT_TAKEN,
    NOT_TAKEN,
    DeepSpeedConfig,
    FsdpConfig,
    LaunchConfig,
    open_launch_file,
    read_launch_file,
    shipped_launch_files,
)
from rlhf.runtime import SHARDING, Sharding, make_accelerator, take_over_sharding
from tests.conftest import ROOT, rlhf

SHIPPED = {path.stem: path for path in shipped_launch_files()}


def as_accelerate_reads(path: Path) -> Namespace:
    """What its launcher would do with a launch file and two processes."""
    asked = ["--config_file", str(path), "--num_processes", "2", "train.py"]
    return _validate_launch_command(launch_command_parser().parse_args(asked))[0]


def test_the_launch_files_that_ship() -> None:
    assert set(SHIPPED) == {"cpu-2", "gpus", "fsdp2", "fsdp2-cpu", "zero3", "zero3-cpu", "machines-2"}
    for path in SHIPPED.values():
        text = path.read_text()
        assert text.startswith("# ")
        assert "ried" in text, f"{path}: says nothing of whether it was tried"
        assert ClusterConfig.from_yaml_file(yaml_file=str(path)).distributed_type
        read_launch_file(path)


@pytest.mark.parametrize("name", ["cpu-2", "gpus", "machines-2"])
def test_accelerate_starts_ddp(name: str) -> None:
    read = as_accelerate_reads(SHIPPED[name])
    assert read.multi_gpu and not (read.use_fsdp or read.use_deepspeed or read.cpu)
    assert read.mixed_precision == "no"
    assert read.use_cpu == (name == "cpu-2")
    assert read.num_machines == (2 if name == "machines-2" else 1)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-cpu"])
def test_accelerate_shards_as_fsdp2_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = as_accelerate_reads(SHIPPED[name])
    assert read.use_fsdp and not (read.multi_gpu or read.use_deepspeed)
    environment = prepare_multi_gpu_env(read)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert environment["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
    assert environment["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    for key, value in environment.items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True


@pytest.mark.parametrize("name", ["zero3", "zero3-cpu"])
def test_accelerate_shards_as_zero3_says(name: str) -> None:
    read = as_accelerate_reads(SHIPPED[name])
    assert read.use_deepspeed and not (read.multi_gpu or read.use_fsdp or read.cpu)
    assert (read.zero_stage, read.offload_param_device, read.zero3_init_flag) == (3, "none", False)


def test_our_keys_are_accelerates() -> None:
    """It takes an unknown key of a nested section in silence: each of ours must be an argument of its launcher."""
    assert set(LaunchConfig.model_fields) | set(NOT_TAKEN) == set(ClusterConfig.__dataclass_fields__)
    known = set(vars(launch_command_parser().parse_args(["train.py"])))
    assert set(FsdpConfig.model_fields) | set(FSDP_NOT_TAKEN) <= known
    assert set(DeepSpeedConfig.model_fields) | set(DEEPSPEED_NOT_TAKEN) <= known


def test_a_file_that_accelerate_config_has_written_is_taken(tmp_path: Path) -> None:
    written = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": "MULTI_GPU",
        "downcast_bf16": "no",
        "enable_cpu_affinity": False,
        "gpu_ids": "all",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 2,
        "rdzv_backend": "static",
        "same_network": True,
        "tpu_env": [],
        "tpu_use_cluster": False,
        "tpu_use_sudo": False,
        "use_cpu": False,
    }
    path = tmp_path / "default_config.yaml"
    path.write_text(yaml.safe_dump(written))
    assert read_launch_file(path).num_processes == 2


GOOD = {"distributed_type": "MULTI_GPU", "use_cpu": True, "num_processes": 2}
MACHINES = {**GOOD, "num_machines": 2, "main_process_ip": "127.0.0.1", "main_process_port": 1234}


def sharded(**values: Any) -> dict[str, Any]:
    return {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, **values}}


def zero(**values: Any) -> dict[str, Any]:
    return {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, **values}}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({**GOOD, "num_process": 2}, "num_process: unknown key; did you mean num_processes?"),
        ({**GOOD, "num_processes": 0}, "num_processes: input should be greater than or equal to 1"),
        ({**GOOD, "num_processes": "two"}, "num_processes: input should be a valid integer"),
        ({**GOOD, "distributed_type": "MULTI_GPUS"}, "distributed_type: .* did you mean MULTI_GPU?"),
        ({**GOOD, "distributed_type": "MULTI_CPU"}, "starts one process for MULTI_CPU; write MULTI_GPU and use_cpu"),
        ({**GOOD, "distributed_type": "NO"}, "distributed_type: one process needs no launch file"),
        ({"use_cpu": True}, "distributed_type: missing"),
        (
            {**GOOD, "mixed_precision": "bf16"},
            r"must be 'no' \(the recipe says .* precision: bfloat16",
        ),
        ({**GOOD, "mixed_precision": False}, r"mixed_precision: must be 'no' \(in quotes"),
        ({**GOOD, "dynamo_config": {}}, "dynamo_config: can't be followed: the recipe"),
        ({**GOOD, "megatron_lm_config": {}}, "megatron_lm_config: can't be followed"),
        ({**GOOD, "machine_rank": 1}, "machine_rank: there is one machine"),
        ({**GOOD, "gpu_ids": "0"}, "gpu_ids: Accelerate's launcher takes all, or two"),
        ({**MACHINES, "num_processes": 3}, "num_processes counts over all machines"),
        ({**MACHINES, "machine_rank": 2}, "machine_rank: counted from 0"),
        ({**MACHINES, "main_process_ip": None}, "main_process_ip and main_process_port"),
        ({**GOOD, "fsdp_config": {"fsdp_version": 2}}, "fsdp_config belongs to distributed_type: FSDP"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_verison": 2}},
            "fsdp_config.fsdp_verison: unknown key; did you mean fsdp_version?",
        ),
        ({"distributed_type": "FSDP"}, "fsdp_config: missing; it says `fsdp_version: 2` at least"),
        ({"distributed_type": "FSDP", "fsdp_config": {}}, r"fsdp_config.fsdp_version: must be 2 \(FSDP 1 is not"),
        (sharded(fsdp_version=1), r"fsdp_config.fsdp_version: must be 2 \(FSDP 1 is not followed\)"),
        (
            sharded(fsdp_sharding_strategy="FULL_SHARD"),
            "fsdp_sharding_strategy: can't be followed: it is a key of FSDP 1",
        ),
        (sharded(fsdp_transformer_layer_cls_to_wrap="A"), "can't be followed: the layer's class is the model's own"),
        (sharded(fsdp_cpu_ram_efficient_loading=True), r"must be false \(every process reads the weights\)"),
        (sharded(fsdp_activation_checkpointing=True), r"must be false \(the recipe says .*gradient_checkpointing"),
        (sharded(fsdp_state_dict_type="FULL_STATE_DICT"), "fsdp_state_dict_type: must be SHARDED_STATE_DICT"),
        (sharded(fsdp_auto_wrap_policy="NO_WRAP"), "fsdp_auto_wrap_policy: must be TRANSFORMER_BASED_WRAP"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
            r"deepspeed_config.zero_stage: must be 3 \(below it weights would be whole",
        ),
        ({"distributed_type": "DEEPSPEED"}, "deepspeed_config: missing; it says `zero_stage: 3` at least"),
        (zero(offload_param_device="cpu"), r"offload_param_device: must be none \(pieces stay on their GPU; fsdp2"),
        (zero(gradient_clipping=1.0), "gradient_clipping: can't be followed: the recipe says it"),
        (zero(deepspeed_config_file="a.json"), "deepspeed_config_file: can't be followed: rlhf.zero tells DeepSpeed"),
        (zero(zero3_init_flag=True), r"zero3_init_flag: must be false \(every process reads the weights\)"),
    ],
)
def test_a_wrong_file_is_refused_by_file_and_key(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match=says) as refused:
        read_launch_file(path)
    assert str(refused.value).startswith(f"{path}: ")


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [\n", "use_cpu: true\nuse_cpu: false\n"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        read_launch_file(path)


def test_processes_and_file_agree_or_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_launch_file("cpu-2", None).processes == 2
    assert open_launch_file("cpu-2", 2).processes == 2
    with pytest.raises(UserError, match=r"--processes 3 and .*cpu-2.yaml \(num_processes: 2\) disagree"):
        open_launch_file("cpu-2", 3)
    open_ended = tmp_path / "mine.yaml"
    open_ended.write_text("distributed_type: MULTI_GPU\nuse_cpu: true\n")
    assert open_launch_file(str(open_ended), 3).processes == 3
    with pytest.raises(UserError, match="num_processes: missing"):
        open_launch_file(str(open_ended), None)
    monkeypatch.setattr(launch_file, "_gpus", lambda config: 4)
    assert open_launch_file("gpus", None).processes == 4
    assert open_launch_file("gpus", 3).processes == 3
    with pytest.raises(UserError, match="--processes asks for 5 GPUs of this machine, and torch can use 4"):
        open_launch_file("gpus", 5)
    with pytest.raises(UserError, match="num_processes asks for 8 GPUs of this machine, and torch can use 4"):
        open_launch_file("machines-2", None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--launch-config", "cpu2"], "did you mean cpu-2?"),
        (
            ["--launch-config", "nowhere"],
            "shipped ones are: cpu-2, fsdp2-cpu, fsdp2, gpus, machines-2, zero3-cpu, zero3",
        ),
        (["--launch-config", "README.md"], "reads .yaml and .json files"),
        (["--launch-config", "cpu-2", "--processes", "3"], "disagree"),
        (["--launch-config", "fsdp2"], "this machine has none that torch can use; take fsdp2-cpu"),
    ],
)
def test_the_command_line_refuses(tmp_path: Path, arguments: list[str], says: str) -> None:
    runs = ["--runs-dir", str(tmp_path / "runs")]
    assert says in rlhf("run", "all", "--recipe", "quickstart", *runs, *arguments, cwd=ROOT, code=2)
    assert not (tmp_path / "runs").exists()


def test_a_machine_without_gpus_is_told_what_to_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="this machine has none that torch can use; take cpu-2"):
        open_launch_file("gpus", None)


def test_the_launch_files_are_listed() -> None:
    said = rlhf("recipes", cwd=ROOT)
    for name, path in SHIPPED.items():
        assert f"{name}\n  {path.read_text().splitlines()[0][2:]}\n  {path}" in said


# What a launcher may ask of the stages


def accelerates_source() -> str:
    return "".join(path.read_text() for path in Path(accelerate.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("name", SHARDING)
def test_sharding_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in accelerates_source()
    monkeypatch.setenv(name, "true")
    with pytest.raises(UserError, match=rf"\({name}\), by which no stage shards models: take fsdp2 or zero3"):
        make_accelerator()
    monkeypatch.setenv(name, "false")
    make_accelerator()


def test_a_stage_refuses_fsdp_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that `accelerate launch` with an FSDP file has started."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    recipe = ["--recipe", str(ROOT / "tests/tiny.yaml")]
    said = rlhf("run", "tokenizer", *recipe, cwd=tmp_path, code=2)
    assert "the launcher asks for FSDP version 1; only FSDP2 is followed" in said
    assert not (tmp_path / "runs/tiny/tokenizer").exists()


def test_what_the_launcher_says_of_fsdp2_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate and transformers are not to see it."""
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_"))]:
        monkeypatch.delenv(name)
    assert take_over_sharding() is None
    for name, value in prepare_multi_gpu_env(as_accelerate_reads(SHIPPED["fsdp2"])).items():
        monkeypatch.setenv(name, value)
    assert take_over_sharding() == Sharding(reshard_after_forward=True, offload=False)
    assert not [name for name in os.environ if name.startswith("FSDP_") or name == "ACCELERATE_USE_FSDP"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert take_over_sharding() == Sharding(reshard_after_forward=False, offload=True)
