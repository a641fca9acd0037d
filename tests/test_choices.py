"""Precision, attention and compile: what a device gets, what is refused, and that a recipe which says nothing stays."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rlhf import choices, runtime
from rlhf.chain import stage_inputs
from rlhf.choices import FLASH_STAGES, Choices, check_attention, choose, loading_attention, training_attention
from rlhf.errors import UserError
from rlhf.recipe import Recipe, StageName, load_recipe
from rlhf.rundir import RunDir
from tests.conftest import TINY_RECIPE, rlhf
from tests.test_resume import begin

TRAINING: tuple[StageName, ...] = ("pretrain", "sft", "reward", "ppo")
OTHERS: tuple[StageName, ...] = ("tokenizer", "pretrain", "ppo", "evaluate")


def recipe_with(*overrides: str) -> Recipe:
    return load_recipe(str(TINY_RECIPE), list(overrides))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has a GPU with bfloat16, and a C compiler."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


def test_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in TRAINING:
        assert choose(recipe_with(), stage, "sdpa").facts() == {
            "precision": "float32",
            "attention": "sdpa",
            "compiled": False,
        }
    assert capsys.readouterr().out.splitlines() == [
        "pretrain: float32 (no GPU); attention sdpa (the default); not compiled (on a CPU it gains little)",
        *(
            f"{stage}: float32 (no GPU); attention sdpa (the default); not compiled (rows have many lengths)"
            for stage in ("sft", "reward", "ppo")
        ),
    ]


@pytest.mark.usefixtures("gpu")
def test_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in TRAINING:
        found = choose(recipe_with(), stage, "sdpa")
        assert (found.precision, found.attention, found.compiled) == ("bfloat16", "sdpa", stage == "pretrain")
    said = capsys.readouterr().out.splitlines()[0].split("; ")
    assert said == [
        "pretrain: bfloat16 (this GPU has it)",
        "attention sdpa (the default)",
        "compiled (on a GPU it is worth its minutes)",
    ]


@pytest.mark.usefixtures("gpu")
def test_what_is_asked_for_is_taken_on_a_gpu() -> None:
    found = choose(recipe_with("precision=float32", "pretrain.compile=false", "attention=eager"), "pretrain", "eager")
    assert str(found) == "float32 (as asked); attention eager (as asked); not compiled (as asked)"


def test_what_is_asked_for_is_taken_on_a_cpu() -> None:
    found = choose(recipe_with("pretrain.compile=true"), "pretrain", "eager")
    assert str(found) == "float32 (no GPU); attention eager (what its architecture has); compiled (as asked)"


@pytest.mark.usefixtures("gpu")
def test_nothing_is_compiled_without_a_c_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    found = choose(recipe_with(), "pretrain", "sdpa")
    assert (found.compiled, found.why_compiled) == (False, "there is no C compiler")
    monkeypatch.setenv("CC", "/opt/bin/cc")
    assert choose(recipe_with(), "pretrain", "sdpa").compiled


# flash-attn


def test_flash_attention_needs_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = recipe_with("attention=flash_attention_2")
    monkeypatch.setattr(choices, "find_spec", lambda name: None)
    for stage in FLASH_STAGES:
        with pytest.raises(UserError, match=r"needs the package flash-attn.*attention=sdpa does without"):
            check_attention(recipe, stage)
    for other in OTHERS:
        check_attention(recipe, other)
    said = rlhf("run", "sft", "--recipe", str(TINY_RECIPE), "attention=flash_attention_2", cwd=tmp_path, code=2)
    assert "flash-attn, which is not installed" in said


def test_flash_attention_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="works in bfloat16 on a GPU only, and this run has no GPU; attention=sdpa"):
        choose(recipe_with("attention=flash_attention_2"), "sft", "sdpa")


@pytest.mark.usefixtures("gpu")
def test_flash_attention_is_for_stages_whose_masks_it_takes() -> None:
    recipe = recipe_with("attention=flash_attention_2")
    assert loading_attention(recipe) == "sdpa"
    found = {stage: choose(recipe, stage, "sdpa") for stage in TRAINING}
    assert {stage for stage, each in found.items() if each.attention == "flash_attention_2"} == {"sft", "reward"}
    assert found["ppo"].why_attention == "its masks are none that flash_attention_2 takes"
    with pytest.raises(UserError, match="this run is in float32"):
        choose(recipe_with("attention=flash_attention_2", "precision=float32"), "sft", "sdpa")


def test_a_model_attends_otherwise_while_it_is_trained_only(tiny_llama: PreTrainedModel) -> None:
    eager = Choices("float32", "", "eager", "", False, "", None, "")
    ids = torch.arange(20).unsqueeze(0)
    before = tiny_llama(ids).logits
    with training_attention(tiny_llama, eager):
        assert tiny_llama.config._attn_implementation == "eager"
        assert tiny_llama(ids, output_attentions=True).attentions is not None
        torch.testing.assert_close(tiny_llama(ids).logits, before, atol=1e-4, rtol=1e-4)
    assert tiny_llama.config._attn_implementation == "sdpa"
    assert torch.equal(tiny_llama(ids).logits, before)


# Recipes


def test_a_recipe_that_says_nothing_is_no_other_than_before(tmp_path: Path) -> None:
    """What a finished stage's manifest holds: of an older version, or of one on another device."""
    run = RunDir.of(recipe_with(), tmp_path)

    def inputs(*overrides: str) -> dict[str, Any]:
        return stage_inputs(recipe_with(*overrides), "pretrain", run)

    assert "attention" not in inputs()
    assert inputs()["pretrain.compile"] is False
    assert inputs() == inputs("pretrain.compile=false") == inputs("pretrain.compile=auto", "attention=auto")
    assert inputs("pretrain.compile=true")["pretrain.compile"] is True
    assert inputs("attention=eager")["attention"] == "eager"


def test_the_summaries_say_what_was_computed_in(finished_chain: Path) -> None:
    for stage in TRAINING:
        summary = json.loads((finished_chain / f"runs/tiny/{stage}/summary.json").read_text())
        assert (summary["precision"], summary["attention"], summary["compiled"]) == ("float32", "sdpa", False)
        assert "quantised" not in summary


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINING)
def test_another_attention_gives_the_same_up_to_rounding(finished_chain: Path, tmp_path: Path, stage: str) -> None:
    directory = begin(finished_chain, tmp_path, stage)
    run = directory.parent
    for before in run.iterdir():  # made with another attention, and so stale: made as if with this one
        manifest = json.loads((before / "manifest.json").read_text())
        if before.name != "tokenizer":
            manifest["inputs"]["attention"] = "eager"
        (before / "manifest.json").write_text(json.dumps(manifest))
    said = rlhf("run", stage, "--recipe", str(TINY_RECIPE), "attention=eager", cwd=tmp_path)
    assert f"{stage}: float32 (no GPU); attention eager (as asked)" in said
    key = {"sft": "validation_nats_per_token_before", "reward": "validation_loss_before", "ppo": "score_before"}
    wanted = key.get(stage, "validation_nats_per_token")
    found, expected = (
        json.loads((folder / stage / "summary.json").read_text()) for folder in (run, finished_chain / "runs/tiny")
    )
    assert found["attention"] == "eager"
    assert found[wanted] == pytest.approx(expected[wanted], abs=0.02)


def test_bfloat16_is_decided_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_cpu_has_bfloat16", lambda: False)
    with pytest.raises(UserError, match="precision: this processor has no hardware for bfloat16"):
        choose(recipe_with("precision=bfloat16"), "sft", "sdpa")
