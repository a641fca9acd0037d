"""Faults that newcomers met in real runs, and mended: each test failed before."""

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf.errors import RecipeError, UserError
from rlhf.model import load_causal_lm
from rlhf.recipe import load_recipe, microbatches
from tests.conftest import TINY_RECIPE, rlhf


@pytest.fixture
def home(finished_chain: Path, tmp_path: Path) -> Path:
    """The finished tiny run, to be changed, and files of one's own in data/."""
    shutil.copytree(finished_chain, tmp_path, dirs_exist_ok=True)
    (tmp_path / "data").mkdir()
    rows = [
        {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."}]}
        for i in range(20)
    ]
    write(tmp_path / "data/chats.jsonl", *rows)
    return tmp_path


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


OWN_CHATS = ("data.root=data", "sft.train=[{path: chats.jsonl}]", "sft.validation=[{path: chats.jsonl}]", "sft.steps=2")


def sft(home: Path, *overrides: str, code: int = 0) -> str:
    return rlhf("run", "sft", "--recipe", str(TINY_RECIPE), *OWN_CHATS, *overrides, cwd=home, code=code)


def test_a_refused_input_gives_back_the_finished_stage(home: Path) -> None:
    """The finished stage had been moved aside for good, and each refusal left another empty directory."""
    before = (home / "runs/tiny/sft/summary.json").read_bytes()
    with (home / "data/chats.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "Alone?"}]}\n')
    for _ in range(2):
        assert "chats.jsonl, line 21: no assistant turn" in sft(home, code=2)
    assert (home / "runs/tiny/sft/summary.json").read_bytes() == before
    assert not list((home / "runs/tiny").glob("*.stale-*"))
    assert "done, skipped" in rlhf("run", "sft", "--recipe", str(TINY_RECIPE), cwd=home)


def test_skipping_bad_rows_makes_no_stage_stale_that_had_none(home: Path) -> None:
    sft(home)
    assert "done, skipped" in sft(home, "data.on_bad_row=skip")


def test_a_base_without_a_tokenizer_is_refused(home: Path) -> None:
    """It was given an empty tokenizer, and trained on nothing."""
    base = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=128))
    base.save_pretrained(home / "base")
    said = sft(home, "name=mine", "stages=[sft, reward]", "base=./base", code=2)
    assert "holds no tokenizer" in said


def test_a_reward_model_is_no_causal_language_model(home: Path) -> None:
    with pytest.raises(UserError, match="is a reward model"):
        load_causal_lm(home / "runs/tiny/reward/model")
    refused = rlhf("chat", "runs/tiny/reward/model", cwd=home, code=2)
    assert "is a reward model" in refused


def test_lengths_beyond_the_context_are_refused_before_training(home: Path) -> None:
    """They ended in an IndexError, once all steps were done."""
    with pytest.raises(RecipeError, match=r"pretrain\.sequence_length is 64, more than model\.context, which is 32"):
        load_recipe(str(TINY_RECIPE), ["model.context=32", "sft.max_tokens=32"])
    with pytest.raises(RecipeError, match=r"sft\.max_tokens is 2000, more than model\.context"):
        load_recipe("quickstart", ["sft.max_tokens=2000"])
    said = sft(home, "name=mine", "stages=[sft, reward]", "base=runs/tiny/pretrain/model", "sft.max_tokens=161", code=2)
    assert "sft.max_tokens is 161, more than the model's context of 160 tokens" in said


def test_an_existing_judge_alone_is_a_reward_stage(home: Path) -> None:
    """It was refused for want of comparisons that nobody had asked for."""
    said = rlhf(
        *("run", "reward", "--recipe", str(TINY_RECIPE), "name=judged", "stages=[reward, ppo]"),
        *("base=runs/tiny/sft/model", "reward={from: runs/tiny/reward/model}"),
        cwd=home,
    )
    assert "its accuracy is not known" in said
    summary = json.loads((home / "runs/judged/reward/summary.json").read_text())
    assert (summary["accuracy"], summary["pairs_test"], summary["pairs_train"]) == (None, 0, 0)
    weights = [home / "runs" / name / "reward/model/model.safetensors" for name in ("tiny", "judged")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_batches_that_do_not_divide_are_refused_before_the_first_stage(tmp_path: Path) -> None:
    said = rlhf("run", "all", "--recipe", str(TINY_RECIPE), "ppo.microbatch_size=3", cwd=tmp_path, code=2)
    assert "ppo.microbatch_size: 3 does not divide 8, episodes_per_update / minibatches" in said
    assert not list(tmp_path.iterdir())
    recipe = load_recipe(str(TINY_RECIPE))
    assert microbatches(recipe, "pretrain", 2) == (8, 1)
    with pytest.raises(RecipeError, match="reward: pairs_per_step is 10, which is not a multiple of the 4 processes"):
        microbatches(recipe, "reward", 4)


def test_a_model_can_be_read_by_whom_the_umask_lets(home: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for path in (home / "runs/tiny/ppo/model").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path.name


def test_a_models_own_code_runs_only_where_the_recipe_names_it(home: Path) -> None:
    base = home / "base"
    shutil.copytree(home / "runs/tiny/sft/model", base)
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "open('it-ran', 'w').close()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    os.environ["HF_MODULES_CACHE"] = str(home / "modules")
    own = ("name=mine", "stages=[sft, reward]", "base=./base")
    refused = sft(home, *own, code=2)
    assert "trust_remote_code: ['./base']" in refused
    assert not (home / "it-ran").exists()
    sft(home, *own, "trust_remote_code=[./base]")
    assert (home / "it-ran").exists()
    del os.environ["HF_MODULES_CACHE"]


def test_what_a_model_says_is_shown_and_not_obeyed(home: Path) -> None:
    torch.manual_seed(0)
    write(
        home / "data/chats.jsonl",
        *({"prompt": f"\x1b[2J\x1b]0;owned\x07 {i}", "completion": "\x1b[31mred\x9b1m\u202e"} for i in range(8)),
    )
    said = sft(home)
    assert "\\x1b[2J" in said
    for character in "\x1b\x07\x9b\u202e":
        assert character not in said
