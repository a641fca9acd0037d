"""Checkpoints: whole or passed over, the last good one never removed, every tensor and random state as it was."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.checkpoint import (
    SEAL,
    Cadence,
    Checkpoints,
    copy_tree,
    load_tree,
    random_state,
    save_tree,
    set_random_state,
)
from rlhf.errors import StageFailed
from rlhf.job import Job
from rlhf.recipe import load_recipe
from rlhf.rundir import RunDir
from rlhf.saver import Saver, once
from tests.conftest import TINY_RECIPE


def write(store: Checkpoints, step: int, **facts: Any) -> Path:
    folder = store.begin(step)
    save_tree({"weight": torch.full((4, 4), float(step)), "step": step}, folder, "state")
    return store.seal(folder, facts).path


def test_the_newest_checkpoint_is_found_with_its_facts(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints")
    assert store.newest() is None
    write(store, 9, note="old")
    write(store, 10, note="new")
    found = store.newest()
    assert found is not None
    assert (found.step, found.facts) == (10, {"note": "new"})
    assert load_tree(found.path, "state")["weight"].tolist() == [[10.0] * 4] * 4


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", SEAL])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_checkpoint_is_reported_and_passed_over(
    tmp_path: Path, name: str, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Checkpoints(tmp_path)
    write(store, 1)
    damage(write(store, 2) / name)
    found = store.newest()
    assert found is not None
    assert found.step == 1
    assert "step-2 is damaged" in capsys.readouterr().out
    assert write(store, 2).exists()  # and can be written again
    found = store.newest()
    assert found is not None
    assert found.step == 2


def test_what_a_crash_left_half_written_is_never_read_and_is_cleared_away(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    write(store, 1)
    left = store.begin(2)
    (left / "state.safetensors").write_bytes(b"torn")
    assert Checkpoints(tmp_path).newest() == store.newest()
    write(store, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-3"]


@given(keep=st.integers(1, 4), steps=st.lists(st.integers(1, 99), unique=True, min_size=1, max_size=8))
@settings(max_examples=20, deadline=None)
def test_as_many_as_asked_for_are_kept_the_newest_among_them(
    tmp_path_factory: pytest.TempPathFactory, keep: int, steps: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    store = Checkpoints(folder, keep)
    for step in sorted(steps):
        write(store, step)
    assert {path.name for path in folder.iterdir()} == {f"step-{step}" for step in sorted(steps)[-keep:]}


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Checkpoints(tmp_path)
    write(store, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10, 10))
    with pytest.raises(StageFailed, match="no room on the disk"):
        store.begin(2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    with pytest.raises(StageFailed, match="no room on the disk"):  # the first one too, if its size can be told
        Checkpoints(tmp_path / "new").begin(1, expected=1)


def test_a_checkpoint_that_cannot_be_finished_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up in the middle of a file, as a write in Python, NumPy or Rust reports it."""
    recipe = load_recipe(str(TINY_RECIPE), ["checkpoints.every_steps=1"])
    (tmp_path / "pretrain").mkdir()
    job = Job(recipe, RunDir(tmp_path), "pretrain")
    saver = Saver(job, job.metrics())
    weights = torch.nn.Linear(3, 3)
    saver.after_step(1, 9, lambda: {"weights": weights.state_dict()}, weights)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf.saver.save_tree", full)
    with pytest.raises(OSError, match="No space left"):
        saver.after_step(2, 9, lambda: {"weights": weights.state_dict()}, weights)
    assert [path.name for path in (tmp_path / "pretrain/checkpoints").iterdir()] == ["step-1"]
    monkeypatch.undo()
    found = Saver(job, job.metrics()).resume()
    assert found is not None
    assert found.step == 1
    saver.after_step(2, 9, lambda: {"weights": weights.state_dict()}, weights)
    assert sorted(path.name for path in (tmp_path / "pretrain/checkpoints").iterdir()) == ["step-1", "step-2"]


def test_what_is_made_once_is_used_again_unless_it_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    job = Job(load_recipe(str(TINY_RECIPE)), RunDir(tmp_path), "sft")
    made = []

    def make(folder: Path) -> dict[str, Any]:
        made.append(folder)
        (folder / "numbers").write_bytes(b"123")
        return {"n": 3}

    for _ in range(2):
        found = once(job, "numbers", make)
        assert (found.facts, (found.path / "numbers").read_bytes()) == ({"n": 3}, b"123")
    assert len(made) == 1
    flip(found.path / "numbers")
    assert (once(job, "numbers", make).path / "numbers").read_bytes() == b"123"
    assert len(made) == 2


def test_what_is_no_checkpoint_of_ours_is_left_out_of_account(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    write(store, 10)
    flip(write(store, 20) / "state.safetensors")
    (tmp_path / "step-\u00b2").mkdir()
    (tmp_path / "step-30").write_text("a file")
    (tmp_path / "a.partial").write_text("a file")
    found = store.newest()
    assert found is not None
    assert found.step == 10
    write(store, 12)
    assert {"step-10", "step-12", "step-20.damaged"} <= {path.name for path in tmp_path.iterdir()}
    write(store, 30)
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "step-12").rename(elsewhere)
    (tmp_path / "step-12").symlink_to(elsewhere)
    write(store, 40)
    assert not (tmp_path / "step-12").exists()
    assert (elsewhere / SEAL).exists()  # a link is removed, not what it leads to


# Trees


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tree = {"optimizer": optimizer.state_dict(), "list": [1, 2.5, None, True, "text"], "pair": (1, (2, 3)), 7: "seven"}
    save_tree(tree, tmp_path, "tree")
    found = load_tree(tmp_path, "tree")
    assert found.keys() == tree.keys()
    assert found["list"] == tree["list"]
    assert found["pair"] == (1, (2, 3))
    again = torch.optim.AdamW(layer.parameters(), lr=0.2)
    again.load_state_dict(found["optimizer"])
    for old, new in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert again.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_every_bit_of_a_tensor_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.randn(5, 7) * 10).to(dtype).t()
    save_tree([tensor, torch.zeros(0, 3, dtype=dtype), torch.tensor(1).to(dtype)], tmp_path, "t")
    found = load_tree(tmp_path, "t")
    assert [item.dtype for item in found] == [dtype] * 3
    assert torch.equal(found[0], tensor)
    assert found[1].shape == (0, 3)
    assert found[2].shape == ()


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    weight = torch.randn(1000, 10)
    save_tree({"a": weight, "b": weight}, tmp_path, "tied")
    assert (tmp_path / "tied.safetensors").stat().st_size < 1.5 * weight.numel() * 4
    assert torch.equal(load_tree(tmp_path, "tied")["b"], weight)


def test_parts_of_one_memory_are_each_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    tree = {"first": whole[:4], "second": whole[4:], "turned": whole.view(3, 4).T, "whole": whole, "again": whole}
    save_tree(tree, tmp_path, "parts")
    found = load_tree(tmp_path, "parts")
    assert all(torch.equal(found[name], tensor) for name, tensor in tree.items())


def test_what_is_no_plain_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="can't hold a PosixPath"):
        save_tree({"path": tmp_path}, tmp_path, "bad")


def test_random_states_go_on_where_they_were(tmp_path: Path) -> None:
    def draws() -> list[Any]:
        return [random.random(), np.random.rand(3).tolist(), torch.randn(3).tolist()]

    random.gauss(0, 1), np.random.randn()  # leaves half a pair of Gaussians behind
    save_tree(random_state(), tmp_path, "random")
    first = draws()
    assert draws() != first
    set_random_state(load_tree(tmp_path, "random"))
    assert draws() == first


# Cadence


def test_a_checkpoint_is_due_by_steps_and_by_minutes() -> None:
    now = [0.0]
    cadence = Cadence(steps=10, minutes=2, clock=lambda: now[0])
    assert [step for step in range(1, 31) if cadence.due(step)] == [10, 20, 30]
    now[0] = 119.0
    assert not cadence.due(31)
    now[0] = 120.0
    assert cadence.due(31)
    cadence.written()
    assert not cadence.due(32)
    assert not Cadence(steps=None, minutes=1, clock=lambda: 0.0).due(10)


def test_a_seal_holds_no_code(tmp_path: Path) -> None:
    path = write(Checkpoints(tmp_path), 3)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    assert json.loads((path / SEAL).read_text())["step"] == 3


def test_parts_of_one_memory_are_written_from_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As weights are that were read from a file. A copy of each would be the model once more in memory."""
    whole = torch.arange(60, dtype=torch.float32)
    tree = {
        "first": whole[:20].view(4, 5),
        "second": whole[20:50].view(5, 6),
        "half": whole[50:54].view(torch.bfloat16),
    }
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "clone", lambda _: pytest.fail("a part was copied"))
        save_tree(tree, tmp_path, "parts")
    found = load_tree(tmp_path, "parts")
    assert all(torch.equal(found[name], tensor) and found[name].dtype is tensor.dtype for name, tensor in tree.items())
    save_tree({"whole": whole, "part": whole[10:30], "across": whole[25:40]}, tmp_path, "overlapping")
    again = load_tree(tmp_path, "overlapping")
    assert torch.equal(again["whole"], whole) and torch.equal(again["across"], whole[25:40])


def test_a_copy_keeps_tied_weights_tied() -> None:
    weight = torch.randn(4, 4)
    copied = copy_tree({"embedding": weight, "head": weight, "other": weight[:2]})
    assert copied["embedding"] is copied["head"] and copied["embedding"] is not weight
    assert torch.equal(copied["other"], weight[:2])
