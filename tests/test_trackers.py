"""Live curves: TensorBoard reads from its files what metrics.jsonl holds; a tracker that fails ends no stage."""

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

from rlhf.chain import check_inputs
from rlhf.errors import MissingInput, RecipeError
from rlhf.recipe import STAGES, TrackerName, load_recipe
from rlhf.runtime import seed_everything
from rlhf.trackers import Trackers, flat_settings
from tests.conftest import ROOT, TINY_RECIPE, rlhf
from tests.equal_runs import differences
from tests.test_resume import WAYS_OF_PPO, arguments, begin

TRACKED = "track=tensorboard"
# TensorBoard reads the eleventh file that one second brings before the second: so there are fewer back-offs than ten
BACKING_OFF = (*WAYS_OF_PPO["backing-off"], "ppo.learning_rate=0.03", "ppo.samples_every=1")
Curves = dict[tuple[str, int], float]  # values by name and step


def logged(directory: Path) -> Curves:
    """The numbers in metrics.jsonl, as 32-bit floats."""
    found: Curves = {}
    for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        del values["time"]
        step = values.pop("update") if "update" in values else values.pop("step")
        found |= {(k, step): float(np.float32(v)) for k, v in values.items() if not isinstance(v, str | list)}
    return found


def shown(directory: Path) -> Curves:
    """What TensorBoard shows of the stage; no step may come twice."""
    folder = directory.parent / "trackers" / directory.name
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    points = [(name, event.step, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)]
    found = {(name, step): value for name, step, value in points}
    assert len(found) == len(points)
    return found


def settings_shown(directory: Path) -> list[dict[str, Any]]:
    """The settings of each time that the stage began, as TensorBoard's hparams have them."""
    found = []
    for path in sorted((directory.parent / "trackers" / directory.name).glob("*/events.*")):
        content = EventAccumulator(str(path.parent)).Reload().PluginTagToContent("hparams")
        start_info = parse_session_start_info_plugin_data(content["_hparams_/session_start_info"])
        found.append({k: getattr(v, v.WhichOneof("kind")) for k, v in start_info.hparams.items()})
    return found


@pytest.mark.parametrize("more", [(), ("--processes", "2")], ids=["one-process", "two-processes"])
def test_tensorboard_shows_what_pretrain_logs_and_its_weights_are_the_same(
    finished_chain: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    directory = begin(finished_chain, tmp_path, "pretrain")
    rlhf("run", "pretrain", "--recipe", str(TINY_RECIPE), TRACKED, *more, cwd=tmp_path)
    curves = shown(directory)
    assert curves == logged(directory)
    assert {step for name, step in curves if name == "loss"} == {5, 10, 15, 20}
    assert len(list(tmp_path.rglob("trackers/pretrain/events.*"))) == 1  # rank 0's
    (settings,) = settings_shown(directory)
    assert settings["pretrain.learning_rate"] == 0.01
    assert settings["track"] == '["tensorboard"]'
    if not more:
        assert differences(directory, finished_chain / "runs/tiny/pretrain") == []
        for override in ("track=[]", TRACKED):  # who is told never makes a stage stale
            said = rlhf("run", "pretrain", "--recipe", str(TINY_RECIPE), override, cwd=tmp_path)
            assert "nothing to do" in said


@pytest.mark.parametrize(
    ("stage", "more"),
    [("sft", ()), ("ppo", BACKING_OFF)],
    ids=["sft", "ppo-backing-off"],
)
def test_tensorboard_shows_numbers_alone_and_each_step_once(
    finished_chain: Path, tmp_path: Path, stage: str, more: tuple[str, ...]
) -> None:
    directory = begin(finished_chain, tmp_path, stage)
    said = rlhf(*arguments(stage, TRACKED, *more), cwd=tmp_path)
    assert ("back to update" in said) == (stage == "ppo")
    assert shown(directory) == logged(directory)
    elsewhere = [path for path in tmp_path.rglob("events.*") if (tmp_path / "runs/tiny/trackers") not in path.parents]
    assert elsewhere == []  # what transformers' trainer would write


def test_a_stage_that_goes_on_or_begins_anew_shows_no_step_twice(finished_chain: Path, tmp_path: Path) -> None:
    directory = begin(finished_chain, tmp_path, "pretrain")
    rlhf(*arguments("pretrain", TRACKED, "pretrain.log_every=1"), cwd=tmp_path)
    shutil.rmtree(directory / "checkpoints/step-20")
    (directory / "summary.json").unlink()  # as if it had been killed behind step 19
    rlhf(*arguments("pretrain", TRACKED), cwd=tmp_path)
    curves = shown(directory)
    assert {step for name, step in curves if name == "loss"} == {*range(1, 17), 20}
    assert curves == logged(directory)
    assert len(settings_shown(directory)) == 1
    rlhf(*arguments("pretrain", TRACKED, "pretrain.learning_rate=0.02", "pretrain.log_every=7"), cwd=tmp_path)
    assert shown(directory) == logged(directory)
    assert {settings["pretrain.learning_rate"] for settings in settings_shown(directory)} == {0.01, 0.02}


FAULTY = """
config = {}

def init(**given):
    print("told", given)
    return Run()

class Run:
    def log(self, values, step):
        print("logged", step)
        if step == 10:
            raise ConnectionError("the line is dead\\nand more")

    def finish(self):
        print("finished")
"""


def test_a_tracker_that_fails_is_named_once_and_the_stage_ends_as_ever(finished_chain: Path, tmp_path: Path) -> None:
    """A package called wandb, with W&B's functions."""
    directory = begin(finished_chain, tmp_path / "run", "pretrain")
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/wandb.py").write_text(FAULTY)
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", "run", "pretrain", "--recipe", str(TINY_RECIPE), "track=[wandb, tensorboard]"],
        cwd=tmp_path / "run",
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path / 'packages'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "'project': 'tiny', 'name': 'pretrain'" in said
    why = "ConnectionError: the line is dead"
    assert f"pretrain: the tracker wandb failed, the stage goes on without it ({why})\n" in said
    assert said.count("wandb failed") == 1
    assert "logged 5" in said
    assert "logged 15" not in said
    assert differences(directory, finished_chain / "runs/tiny/pretrain") == []
    assert shown(directory) == logged(directory)  # the other tracker goes on


class Drawing(GeneralTracker):
    """A tracker that draws random numbers when it starts, and can't end."""

    name, requires_logging_directory, tracker = "wandb", False, None

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def start(self) -> None:
        random.random()
        np.random.rand()
        torch.rand(())

    def finish(self) -> None:
        raise OSError("too late")


def test_a_start_draws_nothing_that_the_stage_would_draw_and_a_bad_end_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Drawing)
    trackers = Trackers(load_recipe("quickstart", ["track=wandb"]), "ppo", tmp_path / "trackers")
    seed_everything(1)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    seed_everything(1)
    trackers.start(0)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    trackers.close()
    assert "the tracker wandb failed, the stage goes on without it (OSError: too late)" in capsys.readouterr().out
    trackers.start(0)  # it is not asked again
    trackers.close()
    assert capsys.readouterr().out == ""


def test_the_known_names_are_accelerates_and_each_class_takes_what_it_is_given(tmp_path: Path) -> None:
    names = get_args(TrackerName)
    assert set(names) == set(LOGGER_TYPE_TO_CLASS)
    given = Trackers(load_recipe("quickstart"), "ppo", tmp_path)._arguments(0)
    for name in names:
        LOGGER_TYPE_TO_CLASS[name](**given[name])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("track=tensorbord", ["did you mean 'tensorboard'", *get_args(TrackerName)]),
        ("track=[tensorboard, wand]", ["track.1", "did you mean 'wandb'"]),
        ("track=5", ["track: must be a list"]),
    ],
)
def test_a_name_that_no_tracker_has_is_refused(override: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None)], ids=["nothing", "a-mere-folder"])
def test_a_package_that_is_missing_is_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, found: ModuleSpec | None
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "wandb" else there(name))
    recipe = load_recipe("quickstart", ["track=[tensorboard, wandb]"])
    with pytest.raises(MissingInput, match=r"track: wandb needs the package wandb.*: pip install wandb"):
        check_inputs(recipe, STAGES, 1)


def test_settings_are_flat() -> None:
    found = flat_settings(load_recipe("quickstart", [TRACKED, "ppo.kl.coefficient=0.125"]))
    assert found["ppo.kl.coefficient"] == 0.125
    assert json.loads(str(found["stages"])) == list(STAGES)
    assert {type(value) for value in found.values()} <= {bool, int, float, str}
