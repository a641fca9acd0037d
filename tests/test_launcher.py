"""Stages started by Accelerate's launcher: as with --processes, interrupted, killed, refused, across machines."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rlhf import api
from rlhf.errors import UserError
from rlhf.recipe import load_recipe
from tests.conftest import ROOT, TINY_RECIPE, rlhf
from tests.equal_runs import differences
from tests.test_resume import STAGES, sealed, start, until

TINY = ("--recipe", str(TINY_RECIPE))
LAUNCHED = ("--launch-config", "cpu-2")
OFTEN = "checkpoints.every_steps=2"


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny chain's first stage is done; not to be changed."""
    folder = tmp_path_factory.mktemp("tokenizer")
    rlhf("run", "tokenizer", *TINY, cwd=folder)
    return folder


@pytest.fixture
def home(with_tokenizer: Path, tmp_path: Path) -> Path:
    shutil.copytree(with_tokenizer / "runs", tmp_path / "runs")
    return tmp_path


def pretrained(home: Path) -> Path:
    return home / "runs/tiny/pretrain"


def test_the_result_is_that_of_two_processes(home: Path) -> None:
    said = rlhf("run", "pretrain", *TINY, *LAUNCHED, "--processes", "2", cwd=home)
    assert "launch: cpu-2.yaml: 2 processes on this machine's CPUs (DDP over gloo)" in said
    assert json.loads((pretrained(home) / "summary.json").read_text())["processes"] == 2
    launched = home / "launched"
    pretrained(home).rename(launched)
    rlhf("run", "pretrain", *TINY, "--processes", "2", cwd=home)
    assert differences(pretrained(home), launched) == []
    assert "nothing to do" in rlhf("run", "pretrain", *TINY, *LAUNCHED, cwd=home)


@pytest.mark.slow
def test_all_stages_come_to_what_two_processes_come_to(tmp_path: Path) -> None:
    for name, how in (("launched", LAUNCHED), ("ours", ("--processes", "2"))):
        (tmp_path / name).mkdir()
        rlhf("run", "all", *TINY, *how, cwd=tmp_path / name)
    for stage in STAGES:
        launched, ours = (tmp_path / name / "runs/tiny" / stage for name in ("launched", "ours"))
        assert differences(ours, launched) == [], stage


@pytest.mark.slow
def test_interrupted_it_writes_a_checkpoint_and_goes_on_to_the_same_end(home: Path) -> None:
    command = ("run", "pretrain", *TINY, OFTEN)
    process = start(*command, *LAUNCHED, cwd=home)
    until(lambda: sealed(pretrained(home)), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "a checkpoint of step" in said
    assert "Traceback" not in said
    assert len(family) == 3  # the launcher and two ranks
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert "goes on from the checkpoint" in rlhf(*command, *LAUNCHED, cwd=home)
    launched = home / "launched"
    pretrained(home).rename(launched)
    rlhf(*command, "--processes", "2", cwd=home)
    assert differences(pretrained(home), launched) == []


def test_a_second_signal_ends_all_at_once(home: Path) -> None:
    process = start("run", "pretrain", *TINY, OFTEN, "pretrain.tokens=4000000", *LAUNCHED, cwd=home)
    until(lambda: sealed(pretrained(home)), process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 130
    assert len(family) == 3
    assert psutil.wait_procs(family, timeout=5)[1] == []


def test_a_rank_that_is_killed_is_named_and_none_outlives_its_parent(home: Path) -> None:
    command = ("run", "pretrain", *TINY, OFTEN, "pretrain.tokens=2000000", *LAUNCHED)
    process = start(*command, cwd=home)
    until(lambda: sealed(pretrained(home)), process)
    pid = json.loads((pretrained(home) / "ranks/rank-1.json").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert f"rank 1 of 2 (pid {pid}) was killed by signal 9 (SIGKILL)" in said
    assert "Traceback" not in said

    process = start(*command, cwd=home)
    until(lambda: len(psutil.Process(process.pid).children(recursive=True)) == 3, process)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert psutil.wait_procs(family, timeout=20)[1] == []


def test_what_a_stage_refuses_is_the_users_to_mend(home: Path) -> None:
    """Exit code 2 and one message, where the launcher itself would say 1 and show a traceback."""
    (home / "bad.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    said = rlhf("run", "pretrain", *TINY, *LAUNCHED, "pretrain.train=[{path: bad.jsonl}]", cwd=home, code=2)
    assert "bad.jsonl" in said
    assert "line 2" in said
    assert not pretrained(home).exists()


def test_a_launcher_within_a_launcher_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    said = rlhf("run", "pretrain", *TINY, *LAUNCHED, cwd=home, code=2)
    assert "this one was started by a launcher already" in said


def on_two_machines(home: Path, *words: str) -> list[tuple[int, str]]:
    """The exit codes and the output of the same command on two machines, which are one here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    machines = []
    for rank in (0, 1):
        file = home / f"machine-{rank}.yaml"
        file.write_text(
            "distributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 2\nnum_processes: 2\n"
            f"machine_rank: {rank}\nmain_process_ip: 127.0.0.1\nmain_process_port: {port}\nsame_network: true\n"
        )
        machines.append(
            subprocess.Popen(
                [sys.executable, "-m", "rlhf", "run", *words, *TINY, "--launch-config", str(file), "threads=1"],
                cwd=home,
                env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    return [(machine.returncode, text) for machine, text in zip(machines, said, strict=True)]


@pytest.mark.slow
def test_two_machines_come_to_what_two_processes_come_to(home: Path) -> None:
    (first, said), (second, also) = on_two_machines(home, "pretrain")
    assert (first, second) == (0, 0), said + also
    assert "this is machine 1 of 2" in also
    apart = home / "apart"
    pretrained(home).rename(apart)
    rlhf("run", "pretrain", *TINY, "--processes", "2", cwd=home)
    assert differences(pretrained(home), apart) == []

    shutil.rmtree(pretrained(home))
    (first, said), (second, also) = on_two_machines(home, "sft")
    assert (first, second) == (2, 2), said + also
    assert "sft stands on the stage pretrain, which has not been run" in said


def test_the_api_leaves_several_machines_to_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "distributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 2\nnum_processes: 2\n"
        "main_process_ip: 127.0.0.1\nmain_process_port: 1234\n"
    )
    with pytest.raises(UserError, match=r"mine\.yaml: several machines are for the command line"):
        api.run(load_recipe(str(TINY_RECIPE)), runs_dir=tmp_path, launch_config=str(file))
    with pytest.raises(UserError, match=r"--processes 4 and .* disagree"):
        api.run(load_recipe(str(TINY_RECIPE)), runs_dir=tmp_path, processes=4, launch_config="cpu-2")


def test_a_launcher_and_processes_that_disagree_are_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = rlhf("run", "pretrain", "--recipe", str(TINY_RECIPE), "--processes", "3", cwd=home, code=2)
    assert "the launcher that has started this process says how many" in said
