"""The gate: a judge that is not what `reward.require` asks for stops the chain before PPO learns from it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf.chain import check_gate, prepare, unmet
from rlhf.errors import StageFailed
from rlhf.recipe import RequireSection, load_recipe
from rlhf.rundir import RunDir
from tests.conftest import ROOT, TINY_RECIPE, rlhf

JUDGE = {"accuracy": 0.7, "gold_accuracy": 0.8, "length_baseline_accuracy": 0.6, "calibration_error": 0.04}


@pytest.mark.parametrize(
    ("asked", "summary", "reasons"),
    [
        ({}, {}, []),
        ({"accuracy": 0.7}, JUDGE, []),
        ({"accuracy": 0.71}, JUDGE, ["accuracy 0.7, required 0.71"]),
        ({"gold_accuracy": 0.9}, JUDGE, ["gold_accuracy 0.8, required 0.9"]),
        ({"gold_accuracy": 0.1}, {**JUDGE, "gold_accuracy": None}, ["gold_accuracy is not known, required 0.1"]),
        ({"accuracy": 0.0}, {}, ["accuracy is not known, required 0.0"]),
        ({"beats_length": True}, JUDGE, []),
        (
            {"beats_length": True},
            {**JUDGE, "length_baseline_accuracy": 0.7},
            ["accuracy 0.7 does not beat preferring the longer response, 0.7"],
        ),
        ({"beats_length": True}, {}, ["accuracy None does not beat preferring the longer response, None"]),
        ({"beats_length": True}, {**JUDGE, "pairs_test": 9, "pairs_test_unseen": 9}, []),
        (
            {"beats_length": True},
            {**JUDGE, "pairs_test": 9, "pairs_test_unseen": 0},
            ["the prompts of all 9 test comparisons are trained on as well"],
        ),
        ({}, {**JUDGE, "pairs_test": 9, "pairs_test_unseen": 0}, []),
        ({"accuracy": 0.7}, {"pairs_test": 0, "pairs_test_unseen": 0}, ["accuracy is not known, required 0.7"]),
        ({"calibration_error": 0.04}, JUDGE, []),
        ({"calibration_error": 0.03}, JUDGE, ["calibration_error 0.04, required at most 0.03"]),
        (
            {"calibration_error": 0.03},
            {**JUDGE, "calibration_error": None},
            ["calibration_error is not known, required at most 0.03"],
        ),
        (
            {"accuracy": 0.8, "calibration_error": 0.01},
            JUDGE,
            ["accuracy 0.7, required 0.8", "calibration_error 0.04, required at most 0.01"],
        ),
    ],
)
def test_what_is_unmet(asked: dict[str, Any], summary: dict[str, Any], reasons: list[str]) -> None:
    assert unmet(RequireSection.model_validate(asked), summary) == reasons


@pytest.fixture
def home(finished_chain: Path, tmp_path: Path) -> Path:
    """The tiny chain up to its judge."""
    for stage in ("tokenizer", "pretrain", "sft", "reward"):
        shutil.copytree(finished_chain / "runs/tiny" / stage, tmp_path / "runs/tiny" / stage)
    return tmp_path


TINY = ("--recipe", str(TINY_RECIPE))
TOO_MUCH = "reward.require.accuracy=1.0"


def test_a_judge_that_is_not_good_enough_stops_the_chain_and_is_kept(home: Path) -> None:
    before = (home / "runs/tiny/reward/summary.json").read_bytes()
    accuracy = json.loads(before)["accuracy"]
    for stage in ("all", "ppo"):
        said = rlhf("run", stage, *TINY, TOO_MUCH, cwd=home, code=1)
        assert "is not what reward.require asks for" in said
        assert f"accuracy {accuracy}, required 1.0" in said
        assert "reward: redone" not in said
        assert not (home / "runs/tiny/ppo").exists()
    assert (home / "runs/tiny/reward/summary.json").read_bytes() == before
    said = rlhf("run", "ppo", *TINY, "reward.require.accuracy=0.01", cwd=home)
    assert "ppo: starts" in said
    assert "reward" not in "".join(line.split(":")[0] for line in said.splitlines())  # it is not even looked at
    assert (home / "runs/tiny/reward/summary.json").read_bytes() == before


def test_the_stage_that_makes_the_judge_fails_itself(home: Path) -> None:
    """Straight after training, before anything else runs."""
    shutil.rmtree(home / "runs/tiny/reward")
    said = rlhf("run", "all", *TINY, TOO_MUCH, "reward.collect.train_prompts=20", cwd=home, code=1)
    assert "reward: starts" in said
    assert "required 1.0" in said
    assert (home / "runs/tiny/reward/summary.json").exists()
    assert "ppo: starts" not in said
    assert not (home / "runs/tiny/ppo").exists()


def test_under_a_launcher_the_gate_holds_too(home: Path) -> None:
    """Another program starts the ranks there; rank 0 decides for all, and all end with its exit code."""
    command = [sys.executable, "-m", "rlhf", "run", "ppo", *TINY, TOO_MUCH]
    common = {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "RLHF_RENDEZVOUS": str(home / "meeting")}
    ranks = [
        subprocess.Popen(
            command,
            cwd=home,
            env={**os.environ, **common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], said
    assert "required 1.0" in said[0]
    assert "Traceback" not in "".join(said)
    assert not (home / "runs/tiny/ppo").exists()


def test_a_stage_is_not_prepared_on_a_judge_that_is_not_good_enough(home: Path) -> None:
    recipe, run = load_recipe(str(TINY_RECIPE), [TOO_MUCH]), RunDir(home / "runs/tiny")
    with pytest.raises(StageFailed, match=r"required 1\.0"):
        prepare(recipe, "ppo", run, fresh=True, command="")
    assert not (home / "runs/tiny/ppo").exists()
    check_gate(recipe, "sft", run)  # only judges are asked
    check_gate(load_recipe(str(TINY_RECIPE)), "reward", run)
