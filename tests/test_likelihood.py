"""Reading tokens' likelihood in parts, against all logits at once."""

from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from rlhf import likelihood
from rlhf.likelihood import TokenReader

V = 31
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, initializer_range=0.3, **SIZES))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def capped() -> PreTrainedModel:
    """Its logits are bent behind the head, and no head of hidden states gives them."""
    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=V, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.3, **SIZES)
    )


@pytest.fixture(params=[llama, gpt2, capped])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = request.param().double().eval()
    return made


IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]])


def whole(model: PreTrainedModel, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    rows = (model(input_ids=IDS, use_cache=False).logits[:, :-1].flatten(0, 1) / temperature).log_softmax(-1)
    return rows.gather(1, IDS[:, 1:].reshape(-1, 1)).squeeze(1), -(rows.exp() * rows).sum(1)


@pytest.mark.parametrize("at_once", [10**6, 3 * V, 1])
def test_parts_give_what_all_logits_give_and_their_gradient(
    model: PreTrainedModel, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", at_once)
    reader = TokenReader(model)
    states = reader.states(IDS)[:, :-1].flatten(0, 1)
    found, expected = reader.read(states, IDS[:, 1:].flatten(), 0.7), whole(model, 0.7)
    torch.testing.assert_close(found.logprobs, expected[0])
    torch.testing.assert_close(found.entropy, expected[1])
    gradients = []
    for logprobs, entropy in (found, expected):
        model.zero_grad()
        (logprobs.square().sum() + 0.3 * entropy.sum()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_knows_where_the_head_stands_apart() -> None:
    assert TokenReader(llama()).apart
    assert not TokenReader(capped()).apart
    barely = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=V, head_dim=8, final_logit_softcapping=30.0, initializer_range=0.1, **SIZES)
    )
    assert not TokenReader(barely).apart  # its logits are bent by 3e-4 here, and by more where they are larger


def test_hidden_tokens_have_no_part_in_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 3 * V)
    torch.manual_seed(0)
    model = llama().double().eval()
    reader = TokenReader(model)
    allowed = torch.zeros(8, V, dtype=torch.bool)
    tokens = IDS[:, 1:].flatten()
    for row, token in enumerate(tokens.tolist()):
        allowed[row, [token, (token + 5) % V, 1]] = True

    def hide(logits: torch.Tensor, start: int) -> torch.Tensor:
        return logits.masked_fill(~allowed[start : start + len(logits)], float("-inf"))

    found = reader.read(reader.states(IDS)[:, :-1].flatten(0, 1), tokens, 1.0, hide)
    logits = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    for row, token in enumerate(tokens.tolist()):
        few = logits[row, allowed[row]].softmax(0)
        assert found.logprobs[row].item() == pytest.approx(
            (logits[row, token].exp() / logits[row, allowed[row]].exp().sum()).log().item()
        )
        assert found.entropy[row].item() == pytest.approx(-(few * few.log()).sum().item())
    (found.logprobs.sum() + found.entropy.sum()).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None)
