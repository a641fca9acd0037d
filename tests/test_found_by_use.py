"""Faults that newcomers met in real runs, and mended: each test failed before."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from transformers import GPT2Config, GPT2LMHeadModel

from evaluation.preference import share
from rlhf.chain import stage_inputs, state_of
from rlhf.errors import MissingInput, RecipeError, UserError
from rlhf.functional.intervals import proportion_estimate
from rlhf.model import load_causal_lm
from rlhf.recipe import dump_recipe, load_recipe, microbatches
from rlhf.rundir import RunDir
from rlhf.tokenizer import load_tokenizer
from tests.conftest import ROOT, TINY_RECIPE, rlhf


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
    before, after = (load_file(home / "runs" / name / "reward/model/model.safetensors") for name in ("tiny", "judged"))
    head = after.pop("score.weight") / before.pop("score.weight")  # scaled anew, on this run's own responses
    assert head.max().item() == pytest.approx(head.min().item(), rel=1e-5)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_chain_of_one_stage_is_told_as_any_and_validation_where_it_was_measured(home: Path) -> None:
    """It ended without a report, and a line of training showed the validation of steps before."""
    small = ("sft.steps=4", "sft.validate_every=2", "sft.log_every=1", "sft.sampled_prompts=4")
    said = rlhf(
        *(
            "run",
            "all",
            "--recipe",
            str(TINY_RECIPE),
            "name=one",
            "stages=[sft]",
            "base=runs/tiny/pretrain/model",
            *small,
        ),
        cwd=home,
    )
    assert "the report: runs/one/report.html" in said and "talk with its model" in said
    assert (home / "runs/one/report.html").is_file()
    (measured,) = (line for line in said.splitlines() if "after step" in line)
    assert measured.startswith("sft: after step 2: validation nats per token ")
    assert not any("/4  loss" in line and "validation" in line for line in said.splitlines())


def test_batches_that_do_not_divide_are_refused_before_the_first_stage(tmp_path: Path) -> None:
    said = rlhf("run", "all", "--recipe", str(TINY_RECIPE), "reward.microbatch_size=3", cwd=tmp_path, code=2)
    assert "reward.microbatch_size: 3 does not divide 10, pairs_per_step" in said
    assert not list(tmp_path.iterdir())
    recipe = load_recipe(str(TINY_RECIPE))
    assert microbatches(recipe, "pretrain", 2) == (8, 1)
    smaller = load_recipe(str(TINY_RECIPE), ["sft.microbatch_size=8", "sft.dialogues_per_step=4"])
    assert microbatches(smaller, "sft", 2) == (2, 1)  # at most: nothing else has to be changed with a small step
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


# What a breaker found


def test_each_of_several_files_with_one_name_decides_staleness(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "d.jsonl", {"text": folder})
    recipe = load_recipe(str(TINY_RECIPE), [f"data.root={tmp_path}", "tokenizer.train=[{path: '*/d.jsonl'}]"])
    run = RunDir(tmp_path / "run")
    before = stage_inputs(recipe, "tokenizer", run)
    write(tmp_path / "a/d.jsonl", {"text": "changed"})
    after = stage_inputs(recipe, "tokenizer", run)
    assert {key for key in before if before[key] != after[key]} == {"file a/d.jsonl"}


def test_an_override_changes_one_of_two_sections_that_an_anchor_joins(tmp_path: Path) -> None:
    text = TINY_RECIPE.read_text().replace(
        "sampling: {max_tokens: 24}\n  sampled", "sampling: &s {max_tokens: 24}\n  sampled"
    )
    text = text.replace("sampling: {max_tokens: 16}", "sampling: *s")
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(str(tmp_path / "recipe.yaml"), ["ppo.sampling.max_tokens=5"])
    assert recipe.sft is not None
    assert recipe.ppo is not None
    assert (recipe.sft.sampling.max_tokens, recipe.ppo.sampling.max_tokens) == (24, 5)


def test_text_that_looks_like_a_number_stays_text_in_the_resolved_recipe(tmp_path: Path) -> None:
    for text in ("1e5", "010", "true", "0x1F", "1_0", "null", "1.5", "-.5"):
        recipe = load_recipe(str(TINY_RECIPE), [f"description='{text}'"])
        (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
        assert load_recipe(str(tmp_path / "resolved.yaml")).description == text


@pytest.mark.parametrize(("scalar", "value"), [("10", 10), ("0x10", 16), ("1_000", 1000), ("010", 10)])
def test_numbers_are_read_as_yaml_1_2_has_them(scalar: str, value: int) -> None:
    assert load_recipe(str(TINY_RECIPE), [f"seed={scalar}"]).seed == value


@pytest.mark.parametrize("scalar", ["true", "1:30", "1e30", "yes"])
def test_what_is_no_number_is_refused_as_one(scalar: str) -> None:
    with pytest.raises(RecipeError, match="seed"):
        load_recipe(str(TINY_RECIPE), [f"seed={scalar}"])


def test_recipes_that_are_no_plain_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    for name in (str(tmp_path / "fifo.yaml"), "/dev/zero", "x" * 5000, "a\0b"):
        with pytest.raises(RecipeError, match=r"no plain file|no recipe file"):
            load_recipe(name)
    laughs = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    (tmp_path / "laughs.yaml").write_text(laughs + "name: x\nstages: *a29\n")
    with pytest.raises(RecipeError):
        load_recipe(str(tmp_path / "laughs.yaml"))


def test_a_diverged_run_says_so_and_saves_nothing(home: Path) -> None:
    """Its loss was logged as 0.000, and the model saved."""
    tensors = load_file(home / "runs/tiny/pretrain/model/model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    shutil.copytree(home / "runs/tiny/pretrain/model", home / "base")
    (home / "base/model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    said = sft(home, "name=mine", "stages=[sft, reward]", "base=./base", code=1)
    assert "sft: the validation loss is not a number" in said
    assert not (home / "runs/mine/sft/model").exists()


def spoil(home: Path, name: str, content: bytes) -> Path:
    target = home / f"spoiled-{name}"
    shutil.copytree(home / "runs/tiny/sft/model", target)
    (target / name).write_bytes(content)
    return target


def test_models_with_missing_or_damaged_files_are_refused(home: Path) -> None:
    whole = (home / "runs/tiny/sft/model/model.safetensors").read_bytes()
    tensors = load_file(home / "runs/tiny/sft/model/model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    lacking = spoil(home, "model.safetensors", save(tensors, metadata={"format": "pt"}))
    with pytest.raises(MissingInput, match=r"1 weights are missing .*layers\.1\.mlp\.up_proj"):
        load_causal_lm(lacking)
    shutil.rmtree(lacking)
    for content in (whole[:-100], b"", b"{}", b"\xff" * 500):
        with pytest.raises(MissingInput, match="no model could be loaded"):
            load_causal_lm(spoil(home, "model.safetensors", content))
        shutil.rmtree(home / "spoiled-model.safetensors")
    for content in (b"[]", b"{", b'{"model_type": "llama", "hidden_size": "x"}'):
        with pytest.raises(MissingInput, match="no model could be loaded"):
            load_causal_lm(spoil(home, "config.json", content))
        shutil.rmtree(home / "spoiled-config.json")
    with pytest.raises(MissingInput, match="no tokenizer could be loaded"):
        load_tokenizer(spoil(home, "tokenizer.json", b'{"a": 1}'))


def test_a_finished_stage_whose_model_was_changed_is_stale(home: Path) -> None:
    run = RunDir(home / "runs/tiny")
    recipe = load_recipe(str(run.path / "recipe.yaml"))
    weights = run.stage("sft").model / "model.safetensors"
    assert state_of(recipe, "sft", run).name == "done"
    os.utime(weights)
    assert state_of(recipe, "sft", run).name == "done"  # touched, and the same
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert state_of(recipe, "sft", run) == ("stale", "its model was changed")
    weights.unlink()
    assert state_of(recipe, "sft", run) == ("stale", "its model has lost model.safetensors")
    shutil.rmtree(run.stage("sft").model)
    assert state_of(recipe, "sft", run) == ("stale", "its model is gone")
    run.stage("tokenizer").summary_file.write_text("{}")
    assert state_of(recipe, "tokenizer", run).name == "interrupted"


def test_a_stage_is_refused_while_any_that_it_stands_on_is_stale(home: Path) -> None:
    """Only the one right below was looked at: ppo ran on a chain that no recipe describes."""
    said = rlhf("run", "ppo", "--recipe", str(TINY_RECIPE), "pretrain.tokens=40000", cwd=home, code=2)
    assert "pretrain" in said
    assert "is stale (pretrain.tokens: 20000 -> 40000)" in said or "rlhf run pretrain" in said


def test_files_in_the_users_folder_are_not_imported(home: Path) -> None:
    (home / "datasets.py").write_text("raise SystemExit('imported')")
    (home / "tty.py").write_text("raise SystemExit('imported')")
    rlhf("run", "tokenizer", "--recipe", str(TINY_RECIPE), "name=other", cwd=home)


def test_status_bears_files_that_are_not_what_they_should_be(home: Path) -> None:
    run = home / "runs/tiny"
    (run / "ppo/summary.json").unlink()
    (run / "ppo/metrics.jsonl").write_bytes(b'5\n"x"\n\xff\n{"step": 3}\n')
    (run / "evaluate/summary.json").write_text('{"a": 1}')
    assert "step 3" in rlhf("status", "runs/tiny", cwd=home)
    (run / "reward/manifest.json").write_text('{"inputs": []}')
    assert "never really begun" in rlhf("status", "runs/tiny", cwd=home)


def test_any_text_can_be_said_whatever_the_terminals_encoding() -> None:
    code = "from rlhf.runtime import log, print_anything; print_anything(); log('你好 \\x1b[2J')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "\\u4f60\\u597d \\x1b[2J\n"


def test_the_interval_of_an_accuracy_counts_prompts_not_pairs() -> None:
    """40 prompts, each with 25 comparisons that are all right or all wrong: as wide as 40 trials have it."""
    right = [float(i // 25 < 20) for i in range(1000)]
    estimate = share([str(i // 25) for i in range(1000)], right)
    assert estimate.mean == 0.5
    trials = proportion_estimate(20, 40)
    assert estimate.high - estimate.low == pytest.approx(trials.high - trials.low, rel=0.03)
    assert share([str(i) for i in range(1000)], right) == proportion_estimate(500, 1000)


def test_a_run_that_goes_on_from_a_base_has_no_architecture_of_its_own(tmp_path: Path) -> None:
    """Its recipe.yaml, and so its report, named the defaults: four layers where the base has one."""
    keys = "tokens: 8192, tokens_per_step: 1024, sequence_length: 64, learning_rate: 0.001"
    texts = "train: [{builtin: tinyworld, rows: 9}], validation: [{builtin: tinyworld, rows: 9}]"
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nstages: [pretrain]\nbase: some/model\npretrain: {{{texts}, {keys}}}\n")
    recipe = load_recipe(str(path))
    path.write_text(dump_recipe(recipe))
    assert "layers" not in path.read_text()
    assert load_recipe(str(path)) == recipe


def test_a_stages_directory_is_told_apart_from_its_model(home: Path) -> None:
    """`runs/tiny/sft holds no config.json` left a reader to guess that the model is one folder deeper."""
    said = rlhf("evaluate", "runs/tiny/sft", "--tasks", "tinyworld", cwd=home, code=2)
    assert "did you mean runs/tiny/sft/model?" in said


def test_a_task_that_is_named_by_its_file_is_told_how(home: Path) -> None:
    """`no file mood.test.jsonl.test.jsonl` didn't say that a task goes without its ending."""
    (home / "data/mood.test.jsonl").write_text("")
    tasks = ("--tasks", "data/mood.test.jsonl")
    said = rlhf("evaluate", "runs/tiny/sft/model", *tasks, cwd=home, code=2)
    assert "data/mood.test.jsonl is a file; a task is named FOLDER/TASK" in said
