"""The whole chain in real processes: what it leaves on the disk, what it skips, redoes and refuses."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, rlhf
from tests.conftest import TINY_RECIPE as RECIPE

STAGES = ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate")


@pytest.fixture(scope="module")
def home(finished_chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny chain has run once, for these tests to change."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(finished_chain, folder, dirs_exist_ok=True)
    return folder


def summary(home: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / "runs/tiny" / stage / "summary.json").read_text())
    return found


def test_every_stage_has_the_keys_that_are_promised(home: Path) -> None:
    common = {
        "stage",
        "seconds",
        "cpu_seconds",
        "started",
        "device",
        "processes",
        "threads",
        "peak_memory_mib",
        "parameters",
    }
    promised = {
        "tokenizer": {"vocab_size", "bytes_per_token"},
        "pretrain": {
            "steps",
            "tokens",
            "tokens_per_second",
            "validation_nats_per_token",
            "validation_perplexity",
            "validation_bits_per_byte",
            "rollbacks",
        },
        "sft": {"steps", "tokens", "tokens_per_second", "validation_nats_per_token", "responses_ended"},
        "reward": {
            "pairs_train",
            "pairs_test",
            "accuracy",
            "accuracy_ci95",
            "length_baseline_accuracy",
            "gold_accuracy",
            "labellers_agree_with_gold",
        },
        "ppo": {
            "updates",
            "episodes",
            "episodes_per_second",
            "score_before",
            "score_after",
            "kl",
            "response_tokens",
            "gold_before",
            "gold_after",
            "gold_best",
        },
        "evaluate": {"models"},
    }
    for stage in STAGES:
        missing = (common | promised[stage]) - set(summary(home, stage))
        assert not missing, f"{stage}: {missing}"
    models = summary(home, "evaluate")["models"]
    assert list(models) == ["base", "sft", "ppo"]
    for found in models.values():
        assert {"bits_per_byte", "perplexity", "fewshot"} <= set(found)
        for task in found["fewshot"].values():
            assert {"accuracy", "accuracy_ci95", "chance"} <= set(task["0"])
    together = json.loads((home / "runs/tiny/summary.json").read_text())
    assert set(together) == set(STAGES)


def test_the_arithmetic_of_the_summaries_holds(home: Path) -> None:
    pretrain, ppo = summary(home, "pretrain"), summary(home, "ppo")
    assert pretrain["steps"] == math.ceil(20000 / 1024)
    assert pretrain["tokens"] == pretrain["steps"] * 1024
    assert pretrain["validation_perplexity"] == pytest.approx(math.exp(pretrain["validation_nats_per_token"]), rel=1e-4)
    assert pretrain["validation_nats_per_token"] < math.log(600)
    assert ppo["episodes"] == 32
    assert ppo["gold_best"] == 1.0
    assert 0 < ppo["response_tokens"] <= 16
    base = summary(home, "evaluate")["models"]["base"]
    assert base["perplexity"] == pytest.approx(math.exp(base["nats_per_token"]), rel=1e-4)


def test_metrics_are_one_json_object_a_line(home: Path) -> None:
    for stage, key in (("pretrain", "step"), ("sft", "step"), ("reward", "step"), ("ppo", "update")):
        lines = (home / "runs/tiny" / stage / "metrics.jsonl").read_text().splitlines()
        places = [json.loads(line)[key] for line in lines]
        assert places == sorted(places)
        assert places[-1] == {"pretrain": 20, "sft": 60, "ppo": 2}.get(stage, places[-1])


def test_models_load_with_plain_transformers_and_answer_through_their_chat_template(home: Path) -> None:
    code = """
import sys
sys.modules["rlhf"] = sys.modules["stages"] = sys.modules["evaluation"] = None  # importing them fails
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
run = sys.argv[1]
base = AutoModelForCausalLM.from_pretrained(f"{run}/pretrain/model")
ids = AutoTokenizer.from_pretrained(f"{run}/pretrain/model")("The opposite of hot", return_tensors="pt").input_ids
assert ids[0, 0] == base.config.bos_token_id
assert base(ids).logits.shape[-1] == 600
for stage in ("sft", "ppo"):
    model = AutoModelForCausalLM.from_pretrained(f"{run}/{stage}/model")
    tokenizer = AutoTokenizer.from_pretrained(f"{run}/{stage}/model")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": "What is the opposite of hot?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    torch.manual_seed(0)
    out = model.generate(**inputs, max_new_tokens=20)
    assert out.shape[1] > inputs["input_ids"].shape[1]
scorer = AutoModelForSequenceClassification.from_pretrained(f"{run}/reward/model")
tokenizer = AutoTokenizer.from_pretrained(f"{run}/reward/model")
chat.append({"role": "assistant", "content": "cold."})
inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
assert scorer(**inputs).logits.shape == (1, 1)
assert isinstance(scorer.config.score_mean, float)
print("fine")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(home / "runs/tiny")],
        cwd=home,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "fine\n", done.stderr


def test_model_directories_hold_safetensors_template_and_card_and_no_pickles(home: Path) -> None:
    for stage in ("pretrain", "sft", "reward", "ppo"):
        names = {path.name for path in (home / "runs/tiny" / stage / "model").iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
        assert ("chat_template.jinja" in names) == (stage != "pretrain")


def test_a_second_run_does_nothing_and_says_so(home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (home / "runs/tiny").rglob("*") if path.parent.name != "tiny"}
    said = rlhf("run", "all", "--recipe", str(RECIPE), cwd=home)
    assert said.count("done, skipped") == 6
    assert "nothing to do" in said
    after = {path: path.stat().st_mtime_ns for path in (home / "runs/tiny").rglob("*") if path.parent.name != "tiny"}
    assert before == after


def test_the_comparisons_are_kept_as_a_preference_file(home: Path) -> None:
    rows = [json.loads(line) for line in (home / "runs/tiny/reward/comparisons.train.jsonl").read_text().splitlines()]
    assert len(rows) == summary(home, "reward")["pairs_train"]
    assert all(row["chosen"] != row["rejected"] and row["prompt"][-1]["role"] == "user" for row in rows)


def test_status_shows_each_stage_with_its_figures(home: Path) -> None:
    said = rlhf("status", "runs/tiny", cwd=home)
    for stage in STAGES:
        assert f"  {stage}" in said
    assert said.count("done") == 7  # the corpus too
    assert "gold_after" in said


def test_chat_answers_and_ends(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", "chat", "runs/tiny/ppo/model", "--max-tokens", "8"],
        cwd=home,
        input="What is the opposite of hot?\n\n",
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    refused = rlhf("chat", "runs/tiny/pretrain/model", cwd=home, code=2)
    assert "no chat template" in refused


def _without_more(value: Any) -> Any:
    """Figures less those that need the training texts or a judge."""
    if not isinstance(value, dict):
        return value
    more = ("overlap", "accuracy_clean", "score", "score_ci95")
    return {key: _without_more(each) for key, each in value.items() if key not in more}


def test_evaluate_measures_any_directory_and_agrees_with_the_stage(home: Path) -> None:
    options = ["--recipe", str(RECIPE), "--output", "out.json"]
    said = rlhf("evaluate", "runs/tiny/ppo/model", *options, cwd=home)
    assert "bits per byte" in said
    found = json.loads((home / "out.json").read_text())["models"]["runs/tiny/ppo/model"]
    stage = summary(home, "evaluate")["models"]["ppo"]  # which knows the training texts and the judge besides
    assert {**stage, "memorisation": None}.keys() - found.keys() == {"memorisation"}
    for part in ("fewshot", "behaviour"):
        assert _without_more(found.pop(part)) == _without_more(stage[part])
    assert found == {key: stage[key] for key in found}


def test_one_seed_gives_identical_weights_and_another_does_not(home: Path) -> None:
    rlhf("run", "all", "--recipe", str(RECIPE), "name=again", cwd=home)
    for stage in ("pretrain", "sft", "reward", "ppo"):
        weights = [
            (home / "runs" / name / stage / "model/model.safetensors").read_bytes() for name in ("tiny", "again")
        ]
        assert weights[0] == weights[1], stage
    rlhf("run", "tokenizer", "--recipe", str(RECIPE), "name=other", "seed=2", cwd=home)
    rlhf("run", "pretrain", "--recipe", str(RECIPE), "name=other", "seed=2", cwd=home)
    other = (home / "runs/other/pretrain/model/model.safetensors").read_bytes()
    assert other != (home / "runs/tiny/pretrain/model/model.safetensors").read_bytes()


def test_a_change_of_ppo_redoes_ppo_and_evaluate_only(home: Path) -> None:
    """Runs after the tests above: it changes the run."""
    refused = rlhf("run", "evaluate", "--recipe", str(RECIPE), "ppo.updates=1", cwd=home, code=2)
    assert "ppo" in refused
    assert "rlhf run ppo" in refused
    said = rlhf("run", "all", "--recipe", str(RECIPE), "ppo.updates=1", "ppo.log_every=9", cwd=home)
    assert said.count("done, skipped") == 4
    assert "ppo: redone, since ppo.updates: 2 -> 1 (the old one is now ppo.stale-1)" in said
    assert "evaluate: redone, since ppo was made anew" in said
    assert summary(home, "ppo")["updates"] == 1
    assert json.loads((home / "runs/tiny/ppo.stale-1/summary.json").read_text())["updates"] == 2


def test_a_key_that_an_older_version_did_not_know_makes_nothing_stale_unless_it_is_given(
    finished_chain: Path, tmp_path: Path
) -> None:
    shutil.copytree(finished_chain, tmp_path, dirs_exist_ok=True)
    manifest = tmp_path / "runs/tiny/sft/manifest.json"
    facts = json.loads(manifest.read_text())
    del facts["inputs"]["sft.sampling.top_p"], facts["inputs"]["sft.loss_on"]
    manifest.write_text(json.dumps(facts))
    said = rlhf("run", "all", "--recipe", str(RECIPE), cwd=tmp_path)
    assert said.count("done") >= 6
    assert not list((tmp_path / "runs/tiny").glob("sft.stale-*"))
    said = rlhf("run", "sft", "--recipe", str(RECIPE), "sft.loss_on=last", cwd=tmp_path)
    assert "sft.loss_on: None -> last" in said


def test_any_hugging_face_directory_with_files_of_ones_own_is_a_start(home: Path, tmp_path: Path) -> None:
    """A GPT-2 with another tokenizer, without chat template and pad token; conversations and comparisons from files."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    core = ByteLevelBPETokenizer()
    core.train_from_iterator(["What is the opposite of hot?", "The opposite of hot is cold."] * 9, vocab_size=300)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=256)
    ).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with (tmp_path / "chats.jsonl").open("w", encoding="utf-8") as file:
        for i in range(30):
            messages = [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."}]
            file.write(json.dumps({"messages": messages}) + "\n")
    with (tmp_path / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for i in range(20):
            file.write(
                json.dumps({"prompt": f"Question {i}?", "chosen": "Yes, gladly.", "rejected": f"No {i}."}) + "\n"
            )
    said = rlhf(
        "run",
        "all",
        "--recipe",
        str(RECIPE),
        "name=mine",
        "stages=[sft, reward, ppo, evaluate]",
        f"base={tmp_path / 'base'}",
        f"data.root={tmp_path}",
        "sft.train=[{path: chats.jsonl}]",
        "sft.validation=[{path: chats.jsonl, rows: 8}]",
        "sft.steps=4",
        "sft.chat_template=chatml",
        "reward.collect=null",
        "reward.train=[{path: pairs.jsonl}]",
        "reward.test=[{path: pairs.jsonl}]",
        "ppo.prompts=[{path: pairs.jsonl}]",
        "ppo.test_prompts=[{path: pairs.jsonl}]",
        "ppo.updates=1",
        cwd=home,
    )
    assert "3 tokens added to the vocabulary" in said  # <|im_start|>, <|im_end|>, <|pad|>
    run = home / "runs/mine"
    ppo = json.loads((run / "ppo/summary.json").read_text())
    assert "gold_after" not in ppo
    assert list(json.loads((run / "evaluate/summary.json").read_text())["models"]) == ["base", "sft", "ppo"]
    config = json.loads((run / "sft/model/config.json").read_text())
    assert config["vocab_size"] == len(tokenizer) + 3
