"""Whole pretraining runs: planted spikes, kills, processes, going on from a base, one dial."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rlhf.launch import START_WORKER
from rlhf.tinyworld.documents import documents
from tests.conftest import ROOT, TINY_RECIPE, rlhf
from tests.equal_runs import differences

STEPS = 130
# rows are read as they stand, so that what is planted into the file is read in a few steps one after the other
COMMON = (
    *("--recipe", str(TINY_RECIPE)),
    "stages=[tokenizer, pretrain]",
    "tokenizer.train=[{path: clean.jsonl}]",
    "pretrain.order=as_given",
    f"pretrain.tokens={STEPS * 1024}",
    "pretrain.spikes.good_every=10",
    "pretrain.ramp={from: 256, tokens: 30000, learning_rate: square_root}",
    "pretrain.learning_rate=0.02",
    "pretrain.microbatch_size=2",
)


def write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clean.jsonl, and bad.jsonl, of which a part in the middle is noise; a tokenizer and a run of the clean one."""
    folder = tmp_path_factory.mktemp("corpora")
    texts = list(islice(documents("train", seed=3), 3200))
    write_texts(folder / "clean.jsonl", texts)
    draw = random.Random(1)
    noise = ["".join(draw.choice("abcdefghijklmnopqrstuvwxyz #@!?0123456789") for _ in text) for text in texts]
    write_texts(folder / "bad.jsonl", [*texts[:1300], *noise[1300:1340], *texts[1340:]])
    run(folder, "tokenizer", "clean")
    run(folder, "pretrain", "clean")
    return folder


def arguments(stage: str, name: str, data: str, *more: str) -> list[str]:
    return ["run", stage, *COMMON, f"name={name}", f"pretrain.train=[{{path: {data}.jsonl}}]", *more]


def run(folder: Path, stage: str, name: str, data: str = "clean", *more: str, code: int = 0) -> str:
    return rlhf(*arguments(stage, name, data, *more), cwd=folder, code=code)


def with_tokenizer(corpora: Path, name: str) -> Path:
    """A run in which only the tokenizer is done; the directory of its pretrain stage."""
    shutil.copytree(corpora / "runs/clean/tokenizer", corpora / "runs" / name / "tokenizer")
    return corpora / "runs" / name / "pretrain"


def summary(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    return found


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rolled_back(corpora: Path) -> Path:
    directory = with_tokenizer(corpora, "rolled-back")
    said = run(corpora, "pretrain", "rolled-back", "bad")
    assert "pretrain: a spike at step" in said
    return directory


def test_a_window_of_noise_is_skipped_and_does_no_harm(corpora: Path, rolled_back: Path) -> None:
    clean, found = summary(corpora / "runs/clean/pretrain"), summary(rolled_back)
    assert clean["rollbacks"] == []
    assert found["rollbacks"]
    assert found["steps"] == clean["steps"]
    assert found["tokens"] == clean["tokens"]
    after = found["validation_nats_per_token"]
    assert after == pytest.approx(clean["validation_nats_per_token"], rel=0.01)
    directory = with_tokenizer(corpora, "ignored")
    run(corpora, "pretrain", "ignored", "bad", "pretrain.spikes.action=ignore")
    assert summary(directory)["rollbacks"] == []
    assert summary(directory)["validation_nats_per_token"] > 1.01 * clean["validation_nats_per_token"]


def test_a_rollback_is_written_down_and_no_step_stands_twice(rolled_back: Path) -> None:
    logged = lines(rolled_back)
    records = [line["rollback"] for line in logged if "rollback" in line]
    # two in a row go back to the same state: of these the file keeps the last one, the summary all
    assert records
    assert all(record in summary(rolled_back)["rollbacks"] for record in records)
    for record in records:
        assert record["cause"].startswith("the loss is")
        assert record["back_to_step"] <= record["step"]
        assert record["skipped_rows"][0] < record["skipped_rows"][1]
    steps = [line["step"] for line in logged if "loss" in line]
    assert steps == sorted(set(steps))
    assert steps[-1] == summary(rolled_back)["steps"]
    tokens = {line["step"]: line["tokens"] for line in logged if "loss" in line}
    assert tokens[steps[-1]] == summary(rolled_back)["tokens"]


def test_stop_says_what_happened(corpora: Path) -> None:
    directory = with_tokenizer(corpora, "stopped")
    said = run(corpora, "pretrain", "stopped", "bad", "pretrain.spikes.action=stop", code=1)
    assert "a spike at step" in said
    assert "pretrain.spikes.action" in said
    assert not (directory / "summary.json").exists()


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_through_ramp_and_rollback_it_ends_bitwise_equal(corpora: Path, processes: int) -> None:
    """kill -9 in the ramp, and at the spike or right after going back."""
    often, many = "checkpoints.every_steps=7", ("--processes", str(processes))
    whole = with_tokenizer(corpora, f"whole-{processes}")
    run(corpora, "pretrain", f"whole-{processes}", "bad", often, *many)
    rollbacks = summary(whole)["rollbacks"]
    assert rollbacks
    spike = rollbacks[0]["step"]
    name = f"killed-{processes}"
    directory = with_tokenizer(corpora, name)
    kills = 0
    for reached in (10, spike):
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf", *arguments("pretrain", name, "bad", often, *many)],
            cwd=corpora,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while process.poll() is None and last_step(directory) < reached:
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills == 2
    run(corpora, "pretrain", name, "bad", often, *many)
    assert differences(directory, whole) == []


def last_step(directory: Path) -> int:
    """The newest checkpoint, or the last line of metrics."""
    logged = [line.get("step", 0) for line in lines(directory)] if (directory / "metrics.jsonl").exists() else []
    return max([*logged, *(int(path.name[5:]) for path in directory.glob("checkpoints/step-*[0-9]"))], default=0)


NAN_IN_ONE_RANK = """
import os, sys
import torch
from stages.pretrain import training
whole = training.Training.add_gradient
seen = []
def planted(self, places):
    loss = whole(self, places)
    seen.append(self.step)
    if self.step == 60 and self.job.team.rank == 1 and seen.count(60) <= int(os.environ["TIMES"]):
        next(iter(self.learner.parameters())).grad.fill_(float("nan"))
    return loss
training.Training.add_gradient = planted
from rlhf.worker import leave, main
leave(main())
"""


def two_ranks_with_nan(corpora: Path, name: str, times: int) -> subprocess.CompletedProcess[str]:
    """A run of two processes, the second of which has a gradient that is no number at one step, so many times."""
    first = "launch.START_WORKER.split('from rlhf.worker')[0]"
    planting = f"import rlhf.launch as launch; launch.START_WORKER = {first} + {NAN_IN_ONE_RANK!r}"
    assert "from rlhf.worker" in START_WORKER
    return subprocess.run(
        [
            *(sys.executable, "-c", f"{planting}\nimport sys\nfrom rlhf.cli import main\nsys.exit(main())"),
            *arguments("pretrain", name, "clean", "--processes", "2"),
        ],
        cwd=corpora,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TIMES": str(times)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_nan_in_one_rank_of_two_takes_both_back(corpora: Path) -> None:
    directory = with_tokenizer(corpora, "nan")
    done = two_ranks_with_nan(corpora, "nan", times=1)
    assert done.returncode == 0, done.stdout + done.stderr
    found, clean = summary(directory), summary(corpora / "runs/clean/pretrain")
    assert [(r["step"], r["cause"], r["back_to_step"]) for r in found["rollbacks"]] == [
        (60, "the norm of the gradient is nan", 50)
    ]
    assert found["validation_nats_per_token"] == pytest.approx(clean["validation_nats_per_token"], rel=0.01)


def test_a_nan_that_comes_back_ends_the_stage_with_what_to_do(corpora: Path) -> None:
    with_tokenizer(corpora, "nans")
    done = two_ranks_with_nan(corpora, "nans", times=99)
    assert done.returncode == 1
    assert "It comes after 5 rollbacks in a row" in done.stderr
    assert "learning_rate" in done.stderr
    assert "Traceback" not in done.stderr


def test_training_goes_on_from_a_base_and_replay_keeps_what_it_knew(corpora: Path) -> None:
    base = corpora / "runs/clean/pretrain/model"
    letters = random.Random(4)
    other = [" ".join("".join(letters.sample("wxyz", 3)) for _ in range(30)) for _ in range(600)]
    write_texts(corpora / "other.jsonl", other[:560])
    write_texts(corpora / "other-held-out.jsonl", other[560:])
    found = {}
    for name, more in {"forgetful": "null", "replaying": "{train: [{path: clean.jsonl}], share: 0.4}"}.items():
        said = rlhf(
            *("run", "pretrain", "--recipe", str(TINY_RECIPE), "stages=[pretrain]", f"base={base}", f"name={name}"),
            *("model={}", "tokenizer=null", "pretrain.train=[{path: other.jsonl}]", f"pretrain.replay={more}"),
            "pretrain.validation=[{path: other-held-out.jsonl, name: new}, {builtin: tinyworld, rows: 20, name: old}]",
            *("pretrain.tokens=40000", "pretrain.learning_rate=0.01"),
            cwd=corpora,
        )
        found[name] = summary(corpora / "runs" / name / "pretrain")
        assert ("; replayed, 40% of all rows: " in said) == (name == "replaying")
        for source in ("new", "old"):  # the last line says what came of it
            ended, began = (
                each["validation"][source]["nats_per_token"] for each in (found[name], found[name]["before"])
            )
            assert f"; {source} {ended:.3f} (the base {began:.3f})" in said
    clean = summary(corpora / "runs/clean/pretrain")["validation_nats_per_token"]
    for name, figures in found.items():
        before, after = figures["before"]["validation"], figures["validation"]
        assert before["old"]["nats_per_token"] == pytest.approx(clean, rel=1e-5)  # the base as it was left
        assert after["new"]["nats_per_token"] < before["new"]["nats_per_token"] - 1, name
    forgot = {name: each["validation"]["old"]["nats_per_token"] - clean for name, each in found.items()}
    assert forgot["forgetful"] > 0.5
    assert forgot["replaying"] < forgot["forgetful"] / 2


def test_a_base_without_numbers_is_named(corpora: Path) -> None:
    broken = shutil.copytree(corpora / "runs/clean/pretrain/model", corpora / "broken")
    weights = load_file(broken / "model.safetensors")
    damaged = {name: tensor.fill_(math.nan) for name, tensor in weights.items()}
    save_file(damaged, broken / "model.safetensors", {"format": "pt"})
    arguments = ("stages=[pretrain]", "base=broken", "name=of-broken", "model={}", "tokenizer=null")
    texts = ("pretrain.train=[{path: clean.jsonl}]", "pretrain.validation=[{builtin: tinyworld, rows: 20}]")
    said = rlhf("run", "pretrain", "--recipe", str(TINY_RECIPE), *arguments, *texts, cwd=corpora, code=1)
    assert "pretrain: the base broken, before the first step" in said and "its weights are broken" in said


def test_one_dial_is_enough(corpora: Path) -> None:
    (corpora / "dial.yaml").write_text(
        "name: dial\nstages: [tokenizer, pretrain]\nthreads: 1\nmodel: {depth: 1}\n"
        "tokenizer: {train: [{path: clean.jsonl}], vocab_size: 300}\n"
        "pretrain:\n  train: [{path: clean.jsonl}]\n  validation: [{builtin: tinyworld, rows: 20}]\n  tokens: 20000\n"
    )
    said = rlhf("run", "all", "--recipe", "dial.yaml", cwd=corpora)
    assert "depth 1: 1 layers, width 64, 1 heads, context 128" in said
    config = json.loads((corpora / "runs/dial/pretrain/model/config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]) == (1, 64, 1)


def test_a_training_that_diverges_does_not_end_as_if_nothing_were(corpora: Path) -> None:
    with_tokenizer(corpora, "diverged")
    said = run(corpora, "pretrain", "diverged", "clean", "pretrain.learning_rate=50", "pretrain.warmup=0", code=1)
    assert "in a row" in said
    assert "smaller learning_rate" in said
    with_tokenizer(corpora, "ignored-divergence")
    more = ("pretrain.spikes.action=ignore", "pretrain.tokens=20000", "pretrain.learning_rate=50", "pretrain.warmup=0")
    said = run(corpora, "pretrain", "ignored-divergence", "clean", *more)
    assert "more than guessing costs" in said
