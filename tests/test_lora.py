"""Low-rank adapters: they change what they should and nothing else; merging leaves a plain model that says the same."""

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from rlhf.errors import RecipeError, UserError
from rlhf.model import resize_for, save_model
from rlhf.recipe import LoraSection
from rlhf.tokenizer import prepare_for_chat
from stages.lora import add_adapters, merged, save_adapter, trained_parameters
from tests.conftest import VOCAB_SIZE

KINDS = [(name, tied) for name in ("llama", "qwen3", "gpt2") for tied in (True, False)]
SETTINGS = LoraSection(rank=4, alpha=8.0)
TOKENS = [3, 5]


def fresh(name: str, tied: bool, vocab_size: int = 64) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "gpt2":
        sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64}
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, tie_word_embeddings=tied, **sizes, **off))
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 64, "vocab_size": vocab_size}
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=tied, head_dim=8, **sizes))
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **sizes))


def learn(model: torch.nn.Module, ids: torch.Tensor, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def some_ids() -> torch.Tensor:
    return torch.randint(0, 64, (4, 20), generator=torch.Generator().manual_seed(1))  # 3 and 5 among them, and others


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize(("name", "tied"), KINDS)
def test_merging_keeps_what_was_learned_and_leaves_a_plain_model(name: str, tied: bool, tmp_path: Path) -> None:
    base = fresh(name, tied)
    ids, before, kind = some_ids(), copy.deepcopy(base.state_dict()), type(base)
    adapted = add_adapters(base, SETTINGS, "sft.lora", tokens=TOKENS)
    assert torch.equal(logits(adapted, ids), logits(fresh(name, tied), ids)), "adapters change nothing at first"
    learn(adapted, ids)
    learned = logits(adapted, ids)
    assert (learned - logits(fresh(name, tied), ids)).abs().max() > 0.01

    plain = merged(adapted)
    assert type(plain) is kind
    assert list(plain.state_dict()) == list(before)
    assert not any("lora" in module or "adapter" in module for module, _ in plain.named_modules())
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert (logits(plain, ids) - learned).abs().max() < 1e-5

    tables = [plain.get_input_embeddings().weight, plain.get_output_embeddings().weight]
    assert (tables[0] is tables[1]) == tied
    originals = [fresh(name, tied).get_input_embeddings().weight, fresh(name, tied).get_output_embeddings().weight]
    for table, original in zip(tables, originals, strict=True):
        assert (table != original).any(1).nonzero().flatten().tolist() == TOKENS

    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(plain, ids))


@pytest.mark.parametrize(("name", "tied"), KINDS)
def test_every_linear_layer_but_the_head_gets_an_adapter(name: str, tied: bool) -> None:
    adapted = add_adapters(fresh(name, tied), SETTINGS, "sft.lora")
    wrapped = {
        module.rpartition(".lora_A")[0].rpartition(".")[2]
        for module, _ in adapted.named_modules()
        if ".lora_A." in module
    }
    by_hand = {"c_attn", "c_proj", "c_fc"} if name == "gpt2" else {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert wrapped == by_hand | (set() if name == "gpt2" else {"gate_proj", "up_proj", "down_proj"})
    trained = {parameter for parameter, weights in adapted.named_parameters() if weights.requires_grad}
    assert all("lora_" in parameter for parameter in trained)


def test_only_named_layers_get_an_adapter_and_its_size_is_the_rank_asked_for() -> None:
    adapted = add_adapters(fresh("llama", True), LoraSection(rank=3, targets=("q_proj", "v_proj")), "sft.lora")
    # q_proj: 32 -> 32, v_proj: 32 -> 16; two layers; rank x (in + out)
    assert trained_parameters(adapted) == 2 * 3 * ((32 + 32) + (32 + 16))


@pytest.mark.parametrize("target", ["query", "lm_head", "embed_tokens", "model.layers.0.self_attn.q_proj"])
def test_an_unknown_target_is_refused_with_the_names_that_there_are(target: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"sft\.lora\.targets: LlamaForCausalLM .* '{target}'.*q_proj, k_proj.*down_proj"
    ):
        add_adapters(fresh("llama", True), LoraSection(targets=("q_proj", target)), "sft.lora")


def test_a_head_with_a_bias_cant_learn_single_tokens_and_says_so() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    model = PhiForCausalLM(PhiConfig(vocab_size=64, max_position_embeddings=64, **sizes))
    with pytest.raises(UserError, match="output head has a bias"):
        add_adapters(model, SETTINGS, "sft.lora", tokens=TOKENS)
    assert trained_parameters(add_adapters(model, SETTINGS, "sft.lora"))


def test_a_classifier_trains_its_head_too() -> None:
    config = fresh("llama", True).config
    config.num_labels, config.pad_token_id = 2, 0
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    before = copy.deepcopy(model.state_dict())
    adapted = add_adapters(model, SETTINGS, "reward.lora", kind="classifier")
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    ids = some_ids().clamp(min=1)
    for _ in range(3):
        adapted(input_ids=ids, use_cache=False).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = logits(adapted, ids)
    plain = merged(adapted)
    assert (logits(plain, ids) - learned).abs().max() < 1e-5
    changed = {name for name, weights in plain.state_dict().items() if not torch.equal(weights, before[name])}
    assert "score.weight" in changed and "model.embed_tokens.weight" not in changed
    assert list(plain.state_dict()) == list(before)


@pytest.mark.parametrize("tied", [True, False])
def test_trls_own_loss_reaches_the_rows_of_single_tokens(tied: bool) -> None:
    """On a GPU the trainer takes it; its gradient must be the one of the model's own loss."""
    ids = some_ids()
    gradients = []
    for fused in (True, False):
        torch.manual_seed(2)
        adapted = add_adapters(fresh("llama", tied), SETTINGS, "sft.lora", tokens=TOKENS)
        if fused:
            add_fused_lm_head(adapted.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
        adapted(
            input_ids=ids, labels=ids, use_cache=False, **({"fused_lm_head": True} if fused else {})
        ).loss.backward()
        gradients.append({name: weights.grad for name, weights in adapted.named_parameters() if weights.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-7), name
    assert any("token_adapter" in name and gradient.abs().max() > 1e-4 for name, gradient in gradients[0].items())


@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("qwen3", False), ("gpt2", True)])
def test_a_saved_adapter_is_a_plain_peft_directory(
    tokenizer: PreTrainedTokenizerBase, name: str, tied: bool, tmp_path: Path
) -> None:
    """Also where tokens were added: a resized base gets their rows from the adapter."""
    base = fresh(name, tied, VOCAB_SIZE)
    save_model(base, tokenizer, tmp_path / "base", "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    chat = copy.deepcopy(tokenizer)
    given = prepare_for_chat(chat, "chatml")
    resize_for(model, chat, given.added)
    adapted = add_adapters(model, SETTINGS, "sft.lora", tokens=given.untrained)
    ids = torch.cat([some_ids(), torch.tensor([given.added * 2] * 4)], dim=1)
    learn(adapted, ids)
    save_adapter(adapted, chat, tmp_path / "adapter", "# how it was made")
    assert (tmp_path / "adapter/README.md").read_text() == "# how it was made"

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path / "adapter")), mean_resizing=False)
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert (logits(loaded, ids) - logits(adapted, ids)).abs().max() < 1e-5
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors"))
    assert size < 4 * trained_parameters(adapted) + 20_000, "the base's embedding is not in it"


# Embeddings of new tokens


@pytest.mark.parametrize(("name", "tied"), KINDS)
@pytest.mark.parametrize("reserve", [0, 1, 10])
def test_new_tokens_start_at_the_mean_of_the_others(
    tokenizer: PreTrainedTokenizerBase, name: str, tied: bool, reserve: int
) -> None:
    """Whether the model needs more rows for them or has some in reserve; the others stay as they were."""
    chat = copy.deepcopy(tokenizer)
    given = prepare_for_chat(chat, "chatml")
    rows = []
    for _ in range(2):
        model = fresh(name, tied, VOCAB_SIZE + reserve)
        before = [copy.deepcopy(t.weight) for t in (model.get_input_embeddings(), model.get_output_embeddings())]
        torch.manual_seed(7)
        resize_for(model, chat, given.added)
        after = [table.weight for table in (model.get_input_embeddings(), model.get_output_embeddings())]
        for old, new in zip(before, after, strict=True):
            assert new.shape[0] == max(VOCAB_SIZE + reserve, len(chat))
            assert torch.equal(new[:VOCAB_SIZE], old[:VOCAB_SIZE])
            for token in given.added:
                assert torch.allclose(new[token], old[:VOCAB_SIZE].mean(0), atol=1e-3)
        assert (after[0] is after[1]) == tied
        rows.append([table[given.added].detach() for table in after])
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True)), "the same seed gives the same rows"
