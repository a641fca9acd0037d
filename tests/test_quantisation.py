"""Adapters on a base in 4 bits: what is quantised and how, what is trained, and that what is saved is whole.

The oracles: NF4's code book as the paper prints it, and the same training on a base of the weights that bitsandbytes
gives back.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional
import pytest
import torch
import yaml
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf import quantisation
from rlhf.errors import RecipeError, UserError
from rlhf.model import count_parameters, load_causal_lm, load_scorer, save_model
from rlhf.quantisation import check_quantisation
from rlhf.recipe import LoraSection, Recipe, load_recipe
from rlhf.rollout.fit import tolerance_of
from rlhf.tokenizer import token_info
from stages.lora import add_adapters, give_weights, learned_weights, merged
from tests.conftest import TINY_RECIPE, VOCAB_SIZE, rlhf
from tests.equal_runs import differences
from tests.test_resume import arguments, begin, start, until

NF4 = [  # Dettmers et al. 2023, arXiv:2305.14314, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
BLOCK = 64  # weights that have a scale together
SETTINGS = LoraSection(rank=4, alpha=8.0, quantised="nf4")


def recipe_of(stage: str, *more: str) -> Recipe:
    return load_recipe(str(TINY_RECIPE), [f"{stage}.lora={{rank: 4, quantised: nf4}}", *more])


@pytest.fixture
def how() -> BitsAndBytesConfig:
    found = quantisation.quantisation(recipe_of("sft"), "sft")
    assert found is not None
    return found


@pytest.fixture(params=["llama", "gpt2", "narrow llama"])
def base(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A random model, in a folder; of the narrow one half a block of weights is a row."""
    width = 32 if request.param == "narrow llama" else 64
    torch.manual_seed(2)
    if request.param == "gpt2":
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        sizes = {"n_layer": 2, "n_embd": width, "n_head": 4, "n_positions": 64}
        config = GPT2Config(vocab_size=VOCAB_SIZE, initializer_range=0.1, **sizes, **off, **token_info(tokenizer))
    else:
        sizes = {"num_hidden_layers": 2, "hidden_size": width, "num_attention_heads": 4, "intermediate_size": 2 * width}
        config = LlamaConfig(vocab_size=VOCAB_SIZE, initializer_range=0.1, **sizes, **token_info(tokenizer))
    save_model(AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer, tmp_path / "base", "")
    return tmp_path / "base"


def linear_layers(model: PreTrainedModel) -> set[str]:
    """The names of those but the head, by the names of their classes."""
    head = model.get_output_embeddings()
    return {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head
    }


def quantised_layers(model: nn.Module) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def given_back(layer: nn.Module) -> Tensor:
    """The weights [out, in] that a layer of 4 bits stands for."""
    is_held = isinstance(layer, Linear4bit)
    weights: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state) if is_held else layer.weight.data
    return weights


def whole_with_these_weights(quantised: PreTrainedModel, base: Path) -> PreTrainedModel:
    """The base as it was, but for the weights that were quantised, which are what is left of them."""
    plain = load_causal_lm(base)
    for name in linear_layers(plain):
        layer, left = plain.get_submodule(name), given_back(quantised.get_submodule(name))
        layer.weight.data.copy_(left if isinstance(layer, nn.Linear) else left.T)
    return plain


def losses(model: PeftModel, steps: int) -> list[float]:
    """Of steps with a pass for inference before each, as validation and drawing do."""
    torch.manual_seed(3)
    ids = torch.randint(5, 300, (4, 20))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(steps):
        with torch.no_grad():
            model.eval()(input_ids=ids)
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


# What is quantised


@pytest.mark.parametrize("base", ["llama", "narrow llama"], indirect=True)
def test_each_weight_becomes_the_nearest_of_the_papers_values_times_its_blocks_scale(
    base: Path, how: BitsAndBytesConfig
) -> None:
    name = "model.layers.0.mlp.up_proj"
    layer = load_causal_lm(base, quantised=how).get_submodule(name)
    weights = load_causal_lm(base).get_submodule(name).weight.detach().flatten()
    blocks = [weights[at : at + BLOCK].tolist() for at in range(0, len(weights), BLOCK)]
    scales = [max(map(abs, block)) for block in blocks]
    nearest = [
        min(NF4, key=lambda value: abs(value - weight / scale)) * scale
        for block, scale in zip(blocks, scales, strict=True)
        for weight in block
    ]
    off = (given_back(layer).flatten() - torch.tensor(nearest)).abs().max() / max(scales)
    assert 0 < off < 0.01, "the scales are kept in 8 bits"


def test_linear_layers_are_quantised_and_nothing_else(base: Path, how: BitsAndBytesConfig) -> None:
    model, plain = load_causal_lm(base, quantised=how), load_causal_lm(base)
    wide = {name for name in linear_layers(plain) if not plain.get_submodule(name).weight.shape[-1] % BLOCK}
    assert set(quantised_layers(model)) >= wide
    assert {p.dtype for p in model.parameters() if not hasattr(p, "quant_state")} == {torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert count_parameters(model) == count_parameters(plain)
    before, now = plain.state_dict(), model.state_dict()
    for name in before:
        if name.removesuffix(".weight") not in linear_layers(plain):
            assert torch.equal(now[name], before[name]), name
    held = sum(layer.weight.numel() * layer.weight.element_size() for layer in quantised_layers(model).values())
    assert held * 8 == sum(plain.get_submodule(name).weight.numel() * 4 for name in quantised_layers(model))


def test_a_score_head_stays_whole(base: Path, how: BitsAndBytesConfig) -> None:
    for heads in (1, 3):
        model = load_scorer(base, fresh_head=True, heads=heads, quantised=how)
        assert type(model.score) is nn.Linear and model.score.weight.dtype == torch.float32
        assert any(name.endswith(("down_proj", "c_proj")) for name in quantised_layers(model))


# What is trained


def test_the_losses_are_those_on_a_base_of_the_weights_that_are_left(base: Path, how: BitsAndBytesConfig) -> None:
    found = []
    quantised = load_causal_lm(base, quantised=how)
    for model in (whole_with_these_weights(quantised, base), quantised, load_causal_lm(base)):
        torch.manual_seed(1)
        found.append(losses(add_adapters(model, SETTINGS, "sft.lora", tokens=[7, 8]), steps=6))
    expected, mine, unquantised = found
    assert mine == pytest.approx(expected, abs=1e-4)
    assert mine[-1] < mine[0] - 0.05, "it learns"
    assert mine != pytest.approx(unquantised, abs=1e-3)


def test_gradients_pass_through_every_layer_after_a_pass_without_them(base: Path, how: BitsAndBytesConfig) -> None:
    model = load_causal_lm(base, quantised=how)
    before = {name: layer.weight.data.clone() for name, layer in quantised_layers(model).items()}
    adapted = add_adapters(model, SETTINGS, "sft.lora")
    losses(adapted, steps=1)
    adapted(input_ids=torch.arange(5, 25).unsqueeze(0), labels=torch.arange(5, 25).unsqueeze(0)).loss.backward()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    for name, layer in quantised_layers(model).items():
        assert torch.equal(layer.weight.data, before[name.replace(".base_layer", "")]), "the base stays as it is"


def test_what_was_learned_is_added_to_the_bases_own_weights(base: Path, how: BitsAndBytesConfig) -> None:
    """W + alpha / rank B A, with the W of the files, by hand."""
    torch.manual_seed(1)
    adapted = add_adapters(load_causal_lm(base, quantised=how), SETTINGS, "sft.lora", tokens=[7, 8])
    losses(adapted, steps=3)
    learned = learned_weights(adapted)
    whole = add_adapters(load_causal_lm(base), SETTINGS, "sft.lora", tokens=[7, 8])
    give_weights(whole, learned)
    plain, before = merged(whole).state_dict(), load_causal_lm(base).state_dict()
    pairs = {name.removesuffix(".lora_A.weight"): name for name in learned if name.endswith(".lora_A.weight")}
    for name, first in pairs.items():
        key = name.removeprefix("base_model.model.") + ".weight"
        delta = 2.0 * learned[first.replace("lora_A", "lora_B")] @ learned[first]
        turned = delta if delta.shape == before[key].shape and "c_" not in key else delta.T  # Conv1D is [in, out]
        torch.testing.assert_close(plain[key], before[key] + turned, atol=1e-6, rtol=1e-5)
    assert {name.removeprefix("base_model.model.") for name in pairs} == linear_layers(load_causal_lm(base))


def test_drawing_and_training_may_differ_by_what_the_layers_compute_in(base: Path, how: BitsAndBytesConfig) -> None:
    assert tolerance_of(load_causal_lm(base)) == tolerance_of(load_causal_lm(base, quantised=how)) == 0.02
    how.bnb_4bit_compute_dtype = torch.bfloat16
    assert (
        tolerance_of(load_causal_lm(base, quantised=how)) == tolerance_of(load_causal_lm(base, torch.bfloat16)) == 0.5
    )


# What is refused


def test_without_the_package_it_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)
    for stage in ("sft", "reward"):
        with pytest.raises(
            UserError, match=rf"{stage}\.lora\.quantised: bitsandbytes is not installed; .*\[quantised\]"
        ):
            check_quantisation(recipe_of(stage), stage)
    check_quantisation(load_recipe(str(TINY_RECIPE), ["sft.lora={}"]), "sft")
    (tmp_path / "judge").mkdir()
    check_quantisation(recipe_of("reward", f"reward.from={tmp_path / 'judge'}", "reward.collect=null"), "reward")


@pytest.mark.parametrize("broken", [lambda *_, **__: 1 / 0, lambda numbers, **_: (numbers * 0, None)])
def test_a_machine_on_which_it_doesnt_work_is_named(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[..., object]
) -> None:
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    with pytest.raises(UserError, match=r"sft\.lora\.quantised: bitsandbytes doesn't work on this machine"):
        quantisation.quantisation(recipe_of("sft"), "sft")


def test_in_ppo_it_belongs_to_the_layout_adapters() -> None:
    with pytest.raises(RecipeError, match="in layout full all weights are trained; take layout: adapters"):
        recipe_of("ppo")
    lora = recipe_of("ppo", "ppo.layout=adapters").ppo
    assert lora is not None and lora.lora.quantised == "nf4"


# The stages

WIDE = ("model.width=64", "model.mlp_width=128")  # rows of whole blocks


@pytest.fixture(scope="module")
def finished_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the one in conftest, a little wider."""
    folder = tmp_path_factory.mktemp("wide")
    rlhf("run", "all", "--recipe", str(TINY_RECIPE), *WIDE, cwd=folder)
    return folder


def overrides(stage: str) -> list[str]:
    found = [*WIDE, f"{stage}.lora={{rank: 4, quantised: nf4}}"]
    return [*found, "ppo.layout=adapters", "ppo.learning_rate=0.01"] if stage == "ppo" else found


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_every_stage_trains_on_4_bits_is_killed_goes_on_and_saves_a_plain_model(
    finished_chain: Path, tmp_path: Path, stage: str
) -> None:
    command = arguments(stage, *overrides(stage))
    whole = begin(finished_chain, tmp_path / "whole", stage)
    said = rlhf(*command, cwd=tmp_path / "whole")
    assert "the base's linear layers in 4 bits, nf4 (as asked; without a GPU it takes longer)" in said
    assert "gemm_4bit" not in said, "bitsandbytes is quiet"
    directory = begin(finished_chain, tmp_path, stage)
    process = start(*command, cwd=tmp_path)
    until(lambda: list((directory / "checkpoints").glob("step-*[0-9]")), process)
    process.kill()
    process.communicate()
    assert not (directory / "summary.json").exists()
    assert f"{stage}: goes on from the checkpoint of step" in rlhf(*command, cwd=tmp_path)
    assert differences(directory, whole) == []
    _check_saved(stage, directory, finished_chain / "runs/tiny")


def _check_saved(stage: str, directory: Path, chain: Path) -> None:
    """model/ is what transformers loads without bitsandbytes: the base's own weights with adapter/ on them."""
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["quantised"] == "nf4"
    assert "on a base held in 4 bits (nf4)" in (directory / "model/README.md").read_text()
    assert "quantization_config" not in json.loads((directory / "model/config.json").read_text())
    with safe_open(directory / "adapter/adapter_model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    learned = torch.cat([tensor.flatten() for name, tensor in tensors.items() if "lora_B" in name])
    assert learned.dtype == torch.float32 and not torch.equal(learned, learned.bfloat16().float()), "none is rounded"
    kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    plain = kind.from_pretrained(directory / "model")
    assert summary["parameters"] == sum(parameter.numel() for parameter in plain.parameters())
    if stage == "sft":
        return  # its base lacks tokens: tests/test_sft.py loads such an adapter
    base = kind.from_pretrained(chain / "sft/model", **({"num_labels": 1} if stage == "reward" else {}))
    ids = torch.arange(20).unsqueeze(0)
    expected = plain.eval()(input_ids=ids).logits
    model = PeftModel.from_pretrained(base, directory / "adapter").eval()
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_sft_on_4_bits_is_sft_on_a_base_of_the_weights_that_are_left(
    finished_chain: Path, tmp_path: Path, how: BitsAndBytesConfig
) -> None:
    base = finished_chain / "runs/tiny/pretrain/model"
    shutil.copytree(base, tmp_path / "left")
    left = whole_with_these_weights(load_causal_lm(base, quantised=how), base)
    left.save_pretrained(tmp_path / "left")
    sft = yaml.safe_load(TINY_RECIPE.read_text())["sft"]
    summaries, logged = [], []
    for name, start_from, lora in (("a", base, SETTINGS), ("b", tmp_path / "left", LoraSection(rank=4, alpha=8.0))):
        section = {**sft, "steps": 30, "lora": lora.model_dump(mode="json")}
        recipe = {"name": name, "threads": 1, "stages": ["sft"], "base": str(start_from), "sft": section}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        rlhf("run", "sft", "--recipe", f"{name}.yaml", cwd=tmp_path)
        directory = tmp_path / f"runs/{name}/sft"
        summaries.append(json.loads((directory / "summary.json").read_text()))
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        logged.append([line["loss"] for line in lines if "loss" in line])
    mine, expected = summaries
    assert logged[0] == pytest.approx(logged[1], abs=1e-3)
    for key in ("validation_nats_per_token_before", "validation_nats_per_token"):
        assert mine[key] == pytest.approx(expected[key], abs=1e-3)
    assert mine["parameters_trained"] == expected["parameters_trained"]
    assert mine["validation_nats_per_token_merged"] != pytest.approx(mine["validation_nats_per_token"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_two_processes_on_4_bits_do_what_one_does(finished_chain: Path, tmp_path: Path, stage: str) -> None:
    key = {"sft": "validation_nats_per_token", "reward": "validation_loss", "ppo": "score_after"}[stage]
    found = []
    for processes in ("1", "2"):
        directory = begin(finished_chain, tmp_path / processes, stage)
        rlhf(*arguments(stage, *overrides(stage), "--processes", processes), cwd=tmp_path / processes)
        found.append(json.loads((directory / "summary.json").read_text())[key])
    assert found[1] == pytest.approx(found[0], abs=1e-3)


@pytest.mark.slow
def test_in_ppo_the_judge_stands_on_the_4_bits_that_it_was_trained_on(finished_chain: Path, tmp_path: Path) -> None:
    run = begin(finished_chain, tmp_path, "reward").parent
    rlhf("run", "reward", "--recipe", str(TINY_RECIPE), *overrides("reward"), cwd=tmp_path)
    both = (*overrides("reward"), *overrides("ppo"), "ppo.learning_rate=1e-9", "ppo.keep.rule=last")
    said = rlhf("run", "ppo", "--recipe", str(TINY_RECIPE), *both, cwd=tmp_path)
    assert "the critic is an adapter that starts as the reward model" in said
    assert "reference: on the policy's weights, 0 MiB" in said
    summary = json.loads((run / "ppo/summary.json").read_text())
    assert abs(summary["kl"]) < 1e-3
    saved, before = (load_file(run / f"{stage}/model/model.safetensors") for stage in ("ppo", "sft"))
    assert all(torch.allclose(saved[name], before[name], atol=1e-5) for name in before), "nothing was quantised in it"
