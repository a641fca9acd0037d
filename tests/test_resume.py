"""Nothing is lost: stages that are killed, stopped or interrupted end as if nothing had happened."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf.checkpoint import SEAL
from rlhf.errors import UserError
from rlhf.launch import START_WORKER
from rlhf.runtime import MetricsLog
from tests.conftest import ROOT, TINY_RECIPE, rlhf
from tests.equal_runs import differences

STAGES = ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate")
OFTEN = {"pretrain": 4, "sft": 10, "reward": 3, "ppo": 1}  # steps between checkpoints


def arguments(stage: str, *more: str) -> list[str]:
    often = f"checkpoints.every_steps={OFTEN[stage]}"
    return ["run", stage, "--recipe", str(TINY_RECIPE), often, *more]


def begin(finished_chain: Path, folder: Path, stage: str) -> Path:
    """A run in which the stages before this one are done; returns the stage's directory."""
    for before in STAGES[: STAGES.index(stage)]:
        shutil.copytree(finished_chain / "runs/tiny" / before, folder / "runs/tiny" / before)
    return folder / "runs/tiny" / stage


def start(*command: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf", *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def until(happened: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.Error):  # it has just ended
            if "rlhf.worker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def sealed(directory: Path) -> list[Path]:
    return sorted((directory / "checkpoints").glob("step-*[0-9]"))


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_a_stage_that_is_killed_goes_on_and_ends_bitwise_equal(
    finished_chain: Path, tmp_path: Path, stage: str
) -> None:
    directory = begin(finished_chain, tmp_path, stage)
    process = start(*arguments(stage), cwd=tmp_path)
    until(lambda: sealed(directory), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert family
    assert psutil.wait_procs(family, timeout=20)[1] == [], "the stage's process outlives the command"
    assert not (directory / "summary.json").exists()
    assert "interrupted" in rlhf("status", "runs/tiny", cwd=tmp_path)
    said = rlhf(*arguments(stage), cwd=tmp_path)
    assert f"{stage}: was interrupted, goes on" in said
    assert f"{stage}: goes on from the checkpoint of step" in said
    assert differences(directory, finished_chain / "runs/tiny" / stage) == []


OVERFITTED = ("sft.train=[{builtin: tinyworld, rows: 8}]", "sft.learning_rate=0.05")  # the loss falls, and rises again
WAYS_TO_FINE_TUNE = {
    "adapters": ("sft.lora={rank: 4, dropout: 0.1}", "sft.packing=true", "sft.microbatch_size=8"),
    "early-stopping": (*OVERFITTED, "sft.early_stopping={every: 3, patience: 4}"),
}


@pytest.mark.parametrize("way", WAYS_TO_FINE_TUNE)
def test_however_it_is_fine_tuned_it_goes_on_and_ends_bitwise_equal(
    finished_chain: Path, tmp_path: Path, way: str
) -> None:
    """Adapters with dropout, packed, and new tokens; the best weights of before, and the validations since."""
    command = arguments("sft", "sft.chat_template=chatml", *WAYS_TO_FINE_TUNE[way])
    whole = begin(finished_chain, tmp_path / "whole", "sft")
    rlhf(*command, cwd=tmp_path / "whole")
    directory = begin(finished_chain, tmp_path, "sft")
    process = start(*command, cwd=tmp_path)
    until((directory / "checkpoints/step-20").exists, process)
    process.kill()
    process.communicate()
    assert not (directory / "summary.json").exists()
    assert "sft: goes on from the checkpoint of step" in rlhf(*command, cwd=tmp_path)
    assert differences(directory, whole) == []
    if way == "adapters":
        name = "adapter/adapter_model.safetensors"
        assert (directory / name).read_bytes() == (whole / name).read_bytes()
    else:
        summary = json.loads((whole / "summary.json").read_text())
        assert summary["stopped_early"]
        assert summary["best_step"] < 20 < summary["steps"] < 60

    for made in ("summary.json", "model", "adapter"):  # killed between the last checkpoint and the end
        path = directory / made
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    rlhf(*command, cwd=tmp_path)
    assert differences(directory, whole) == []


EVERYTHING = (
    "ppo.updates=3",
    "ppo.validate_every=1",
    "ppo.best_of=2",
    "ppo.kl={coefficient: 0.1, target: 0.5, horizon: 50, estimator: k3}",
    "ppo.score={scaling: running, clip: 2}",
    "ppo.ptx={train: [{builtin: tinyworld, rows: 40}], tokens_per_minibatch: 64, sequence_length: 32}",
    "ppo.sampling={max_tokens: 16, top_k: 50, top_p: 0.95, min_tokens: 2}",
    "ppo.entropy_coefficient=0.01",
    "ppo.dual_clip=3",
    "ppo.stop_kl=0.5",
    "ppo.critic_warmup=1",
)
WAYS_OF_PPO = {
    "shared": (*EVERYTHING, "ppo.layout=shared"),
    "adapters": (*EVERYTHING, "ppo.layout=adapters", "ppo.learning_rate=0.01"),
    "backing-off": ("ppo.updates=3", "ppo.learning_rate=1.0", "ppo.doctor={action: back_off, most_back_offs: 20}"),
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow if way == "backing-off" else ()) for way in WAYS_OF_PPO]
)
def test_ppo_with_controllers_texts_and_adapters_goes_on_and_ends_bitwise_equal(
    finished_chain: Path, tmp_path: Path, way: str
) -> None:
    command = arguments("ppo", *WAYS_OF_PPO[way])
    whole = begin(finished_chain, tmp_path / "whole", "ppo")
    said = rlhf(*command, cwd=tmp_path / "whole")
    assert ("back to update" in said) == (way == "backing-off")
    directory = begin(finished_chain, tmp_path, "ppo")
    process = start(*command, cwd=tmp_path)
    until((directory / "checkpoints/step-2").exists, process)
    process.kill()
    process.communicate()
    assert not (directory / "summary.json").exists()
    assert "ppo: goes on from the checkpoint of step" in rlhf(*command, cwd=tmp_path)
    assert differences(directory, whole) == []


def test_another_logging_interval_changes_the_lines_and_not_the_figures(finished_chain: Path, tmp_path: Path) -> None:
    """A line is the mean since the last line, wherever the run was interrupted in between."""
    directory = begin(finished_chain, tmp_path, "pretrain")
    process = start(*arguments("pretrain", "pretrain.log_every=1"), cwd=tmp_path)
    until(lambda: sealed(directory), process)
    process.kill()
    process.communicate()
    rlhf(*arguments("pretrain", "pretrain.log_every=20"), cwd=tmp_path)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["loss"] for line in lines if "loss" in line}
    logged = max(step for step in found if step < 20)
    rest = losses_of_each_step(finished_chain, tmp_path)[logged:]
    assert found[20] == pytest.approx(sum(rest) / len(rest), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_layers_that_are_computed_twice_change_no_bit(finished_chain: Path, tmp_path: Path, stage: str) -> None:
    """So one may switch to it within a stage, when memory runs out."""
    directory = begin(finished_chain, tmp_path, stage)
    rlhf(*arguments(stage, f"{stage}.gradient_checkpointing=true"), cwd=tmp_path)
    assert differences(finished_chain / "runs/tiny" / stage, directory) == []


def losses_of_each_step(finished_chain: Path, folder: Path) -> list[float]:
    directory = begin(finished_chain, folder / "each", "pretrain")
    rlhf(*arguments("pretrain", "pretrain.log_every=1"), cwd=folder / "each")
    return losses(directory)


def test_a_terminated_run_leaves_a_checkpoint_of_its_last_step(finished_chain: Path, tmp_path: Path) -> None:
    directory = begin(finished_chain, tmp_path, "sft")
    command = ["run", "sft", "--recipe", str(TINY_RECIPE)]
    process = start(*command, cwd=tmp_path)
    until(lambda: (directory / "metrics.jsonl").exists() and (directory / "metrics.jsonl").read_text(), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "Traceback" not in said
    (checkpoint,) = sealed(directory)
    assert f"a checkpoint of step {checkpoint.name.removeprefix('step-')} is written" in said
    rlhf(*command, cwd=tmp_path)
    assert differences(directory, finished_chain / "runs/tiny/sft") == []


def test_a_second_signal_ends_a_run_at_once(finished_chain: Path, tmp_path: Path) -> None:
    begin(finished_chain, tmp_path, "pretrain")
    process = start(*arguments("pretrain"), cwd=tmp_path)
    until(lambda: workers(process), process)
    (child,) = workers(process)
    time.sleep(0.5)  # until its parent knows it as well
    child.suspend()  # it can't answer the first one
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130
    deadline = time.monotonic() + 10  # it was killed; the system may need a moment to take it down
    with suppress(psutil.NoSuchProcess):
        while child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_run_in_use_is_refused_with_its_holders_pid(finished_chain: Path, tmp_path: Path) -> None:
    begin(finished_chain, tmp_path, "pretrain")
    process = start(*arguments("pretrain"), cwd=tmp_path)
    try:
        until(lambda: workers(process), process)
        refused = rlhf(*arguments("pretrain"), cwd=tmp_path, code=2)
        assert f"in use by another rlhf run (pid {process.pid})" in refused
        assert "running" in rlhf("status", "runs/tiny", cwd=tmp_path)
    finally:
        process.kill()
        process.communicate()
    rlhf(*arguments("pretrain", "pretrain.tokens=2048"), cwd=tmp_path)  # a dead holder's lock is taken over


def test_two_processes_do_what_one_does_and_a_lost_one_is_named(finished_chain: Path, tmp_path: Path) -> None:
    """Losses as with one process; a rank that is killed ends the run and is named; what goes on is bitwise equal."""
    directory = begin(finished_chain, tmp_path, "pretrain")
    command = arguments("pretrain", "--processes", "2")
    rlhf(*command, cwd=tmp_path)
    whole = tmp_path / "whole"
    directory.rename(whole)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["processes"] == 2
    for mine, theirs in zip(*map(losses, (whole, finished_chain / "runs/tiny/pretrain")), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)

    process = start(*command, cwd=tmp_path)
    until(lambda: sealed(directory), process)
    os.kill(json.loads((directory / "ranks/rank-1.json").read_text())["pid"], signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "rank 1 of 2" in said
    assert "SIGKILL" in said
    assert "Traceback" not in said
    shutil.copytree(tmp_path / "runs", tmp_path / "elsewhere/runs")
    assert "goes on from the checkpoint" in rlhf(*command, cwd=tmp_path)
    assert differences(directory, whole) == []

    said = rlhf(*arguments("pretrain"), cwd=tmp_path / "elsewhere")  # with one process now
    assert "the bits of the result may differ" in said
    for mine, theirs in zip(*map(losses, (tmp_path / "elsewhere/runs/tiny/pretrain", whole)), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def losses(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_stopped_rank_is_named_and_all_are_ended(finished_chain: Path, tmp_path: Path) -> None:
    directory = begin(finished_chain, tmp_path, "ppo")
    process = start(*arguments("ppo", "--processes", "2", "ppo.updates=50"), cwd=tmp_path)
    until(lambda: sealed(directory), process)
    pid = json.loads((directory / "ranks/rank-1.json").read_text())["pid"]
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(pid, signal.SIGSTOP)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert f"rank 1 (pid {pid}) has been stopped" in said
    assert psutil.wait_procs(family, timeout=5)[1] == []


# What a breaker found


def test_a_rank_that_starts_after_its_parent_has_died_ends_at_once(tmp_path: Path) -> None:
    """Under a subreaper the orphan's new parent is not process 1; it trained beside the run that was started again."""
    places = ["1", str(ROOT), "tokenizer", str(tmp_path)]  # process 1 is not its parent
    done = subprocess.run([sys.executable, "-P", "-c", START_WORKER, *places], capture_output=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


def test_the_runs_summary_holds_what_is_done_after_a_kill_at_the_end(finished_chain: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_chain, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "runs/tiny/summary.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({stage: whole[stage] for stage in STAGES[:-1]}))
    assert "nothing to do" in rlhf("run", "all", "--recipe", str(TINY_RECIPE), cwd=tmp_path)
    assert json.loads(path.read_text()) == whole


def test_metrics_that_were_torn_are_cut_to_whole_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(5):
        metrics.log(step=step)
    position = metrics.position()
    content = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(content[: len(content) // 2 + 3])
    again = MetricsLog(tmp_path / "metrics.jsonl")
    again.cut_back(position)
    again.log(step=5)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(len(steps) - 1), 5]
    assert "some of its lines are lost" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_metrics_are_not_written_through_a_link(tmp_path: Path, kind: str) -> None:
    (tmp_path / "outside").write_text("mine")
    if kind == "link":
        (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "outside")
    else:
        (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="is a link or a folder"):
        MetricsLog(tmp_path / "metrics.jsonl")
    assert (tmp_path / "outside").read_text() == "mine"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_runs_no_code_and_is_one_message(
    finished_chain: Path, tmp_path: Path, name: str
) -> None:
    directory = begin(finished_chain, tmp_path, "sft")
    process = start(*arguments("sft"), cwd=tmp_path)
    until(lambda: sealed(directory), process)
    process.kill()
    process.communicate()
    newest = sealed(directory)[-1]
    (evil,) = newest.glob(f"checkpoint-*/{name}")
    evil.write_bytes(pickle.dumps(Evil(str(tmp_path / "it-ran"))))
    seal = json.loads((newest / SEAL).read_text())
    seal.pop("sha256")
    seal["files"][str(evil.relative_to(newest))] = [evil.stat().st_size, sha256(evil.read_bytes()).hexdigest()]
    seal["sha256"] = sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()
    (newest / SEAL).write_text(json.dumps(seal))
    said = rlhf(*arguments("sft"), cwd=tmp_path, code=1)
    assert "is not one of ours" in said
    assert not (tmp_path / "it-ran").exists()


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (self.path, "w"))
