"""PPO's update against a naive one, episode by episode; and the faults that TRL's PPO had."""

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf.errors import UserError
from rlhf.judge import Conversation, Scores
from rlhf.model import critic_from_policy, critic_from_scorer, load_scorer
from rlhf.recipe import PpoSection
from rlhf.rollout import Response
from rlhf.sharding import WholeModels
from rlhf.team import Team
from stages.common import Start
from stages.lora import add_adapter, using_adapter
from stages.ppo.episodes import Episode, Prompt, Trajectory, Vocabulary
from stages.ppo.layouts import build_roles
from stages.ppo.learner import Learner
from stages.ppo.roles import CRITIC, POLICY, Actors, AdapterActors, FullActors, Reference, Roles, SharedActors, hold
from stages.ppo.rollout import Budget, Setup, observed

PAD, BOS, END, VOCABULARY = 0, 1, 2, 24


@pytest.fixture(autouse=True)
def norms_of_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' norm works in float32 whatever the model is, which would hide what float64 is to show."""

    def forward(self: Any, states: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(states.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (states * scale)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END,
        **more,
    )


def settings(**more: Any) -> PpoSection:
    values: dict[str, Any] = {
        "prompts": [{"builtin": "tinyworld"}],
        "test_prompts": [{"builtin": "tinyworld"}],
        "updates": 1,
        "episodes_per_update": 6,
        "epochs": 1,
        "minibatches": 2,
        "sampling": {"max_tokens": 6, "temperature": 0.7},
        "learning_rate": 1e-2,
        "kl": {"coefficient": 0.3},
        "value_coefficient": 0.5,
        **more,
    }
    return PpoSection.model_validate(values)


class LengthJudge:
    """Scores a conversation by its number of tokens."""

    def scores(self, conversations: Sequence[Conversation]) -> Scores:
        return Scores([float(len(c.ids)) for c in conversations])


class Device:
    """An Accelerator's face for one process, in float64."""

    device = torch.device("cpu")

    def prepare(self, *things: Any) -> tuple[Any, ...]:
        return things

    def reduce(self, tensor: torch.Tensor, _: str) -> torch.Tensor:
        return tensor

    def no_sync(self, model: Any) -> Any:
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, largest: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, largest)


THREE = Budget(tokens=10**6, episodes=3)


def make_actors(section: PpoSection, dtype: torch.dtype) -> Actors:
    torch.manual_seed(1)
    policy = LlamaForCausalLM(config()).double().eval()
    drawn = (section.sampling.temperature, [END], section.sampling.min_tokens)
    if section.layout == "full":
        scorer = LlamaForSequenceClassification(config(num_labels=1)).double().eval()
        return FullActors(policy, critic_from_scorer(scorer, 0.25), *drawn).to(dtype)
    if section.layout == "shared":
        shared = SharedActors(policy, *drawn)
        shared.head.begin_as(torch.randn(16).double(), 0.1)
        return shared.to(dtype)
    policy.requires_grad_(False)
    for name in (POLICY, CRITIC):
        add_adapter(policy, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), name)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("lora" in name)
        if "lora_B" in name:  # zero at first, and then half of the gradients are
            torch.nn.init.normal_(parameter, std=0.3)
    actors = AdapterActors(policy.double(), *drawn)
    actors.head.begin_as(torch.randn(16).double(), 0.1)
    return actors.to(dtype)


def make_learner(section: PpoSection, budget: Budget = THREE, dtype: torch.dtype = torch.float64) -> Learner:
    actors = make_actors(section, dtype)
    if section.layout == "adapters":
        reference = Reference(actors.policy, without_adapters=True)
    else:
        torch.manual_seed(2)
        reference = Reference(LlamaForCausalLM(config()).to(dtype).eval())
    device: Any = Device()
    nobody: Any = None  # draws
    roles = Roles(actors, reference, LengthJudge(), None)
    holding = WholeModels(device)
    held = hold(roles, holding)
    return Learner(Setup(Team(), 5, section, roles, VOCABULARY_OF, budget, device, holding, held), nobody, PROMPTS)


def logits_of(actors: Actors, ids: torch.Tensor) -> torch.Tensor:
    """The policy's logits [L, V], by the plain forward pass of the model."""
    with using_adapter(actors.policy, POLICY):
        logits: torch.Tensor = actors.policy(input_ids=ids).logits[0]
    return logits


def values_of(actors: Actors, ids: torch.Tensor) -> torch.Tensor:
    """The critic's values [L], from the definition of each layout."""
    if isinstance(actors, FullActors):
        values: torch.Tensor = actors.critic(ids)[0]
        return values
    assert isinstance(actors, SharedActors | AdapterActors)
    with using_adapter(actors.policy, CRITIC):
        states = actors.policy(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    return states @ actors.head.layer.weight[0] * actors.head.scale + actors.head.layer.bias


def reference_logits_of(learner: Learner, ids: torch.Tensor) -> torch.Tensor:
    with using_adapter(learner._setup.roles.reference.model, None), torch.no_grad():
        logits: torch.Tensor = learner._setup.roles.reference.model(input_ids=ids).logits[0]
    return logits


def parameters_of(learner: Learner) -> list[torch.nn.Parameter]:
    actors = learner._setup.roles.actors
    return [*actors.policy_parameters(), *actors.critic_parameters()]


def gradients_of(learner: Learner) -> list[torch.Tensor]:
    found = [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in parameters_of(learner)]
    learner._setup.roles.actors.zero_grad()
    return found


class Decoder:
    """A tokenizer's face: ids as text."""

    pad_token_id = PAD

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


DECODER: Any = Decoder()
VOCABULARY_OF = Vocabulary(DECODER, [END])
PROMPTS = [Prompt([{"role": "user", "content": str(i)}], [BOS, *([5 + i] * (i % 3 + 1))]) for i in range(6)]


def drawn(learner: Learner, temperature: float = 0.7) -> list[Response]:
    """Responses of 1 to 6 tokens with the policy's own log-probabilities, one that does not end among them."""
    rng = np.random.default_rng(0)
    found = []
    for i, prompt in enumerate(PROMPTS):
        ids = [int(token) for token in rng.integers(3, VOCABULARY, i)] + [END if i != 3 else 7]
        logits = logits_of(learner._setup.roles.actors, torch.tensor([prompt.ids + ids])).detach()
        rows = (logits / temperature).log_softmax(-1)
        logprobs = [float(rows[len(prompt.ids) - 1 + t, token]) for t, token in enumerate(ids)]
        found.append(Response(ids, logprobs, i != 3))
    return found


def episodes_of(learner: Learner, responses: list[Response], scores: list[float] | None = None) -> list[Episode]:
    found = observed(learner._setup, PROMPTS, responses)
    return [e._replace(score=s) for e, s in zip(found, scores, strict=True)] if scores else found


def evaluated(learner: Learner, responses: list[Response], scores: list[float] | None = None) -> Trajectory:
    return learner._evaluate(episodes_of(learner, responses, scores))[0]


def naive_gradient(learner: Learner, responses: list[Response], minibatch: list[int], s: PpoSection) -> Any:
    """The loss of a minibatch from its definition: one episode at a time, Python loops, no padding anywhere."""
    actors = learner._setup.roles.actors
    every: list[dict[str, Any]] = []
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = torch.tensor([prompt.ids + response.ids])
        start, n = len(prompt.ids), len(response.ids)
        reference = (reference_logits_of(learner, ids) / s.sampling.temperature).log_softmax(-1)
        values = values_of(actors, ids)[start - 1 : start + n - 1].tolist()
        other = [float(reference[start - 1 + t, response.ids[t]]) for t in range(n)]
        rewards = [0.0] * n
        if s.kl.placement == "reward":
            rewards = [-s.kl.coefficient * (response.logprobs[t] - other[t]) for t in range(n)]
        rewards[-1] += float(ids.shape[1]) - (0.0 if response.ended else s.no_end_penalty)
        advantages, following = [0.0] * n, 0.0
        for t in reversed(range(n)):
            after = values[t + 1] if t + 1 < n else 0.0
            following = rewards[t] + s.discount * after - values[t] + s.discount * s.gae_lambda * following
            advantages[t] = following
        every.append({"ids": ids, "start": start, "n": n, "values": values, "advantages": advantages, "other": other})
    flat = np.concatenate([e["advantages"] for e in every])
    mean, deviation = flat.mean(), np.sqrt(flat.var() + 1e-8)
    tokens = sum(every[i]["n"] for i in minibatch)
    loss, value_coefficient = torch.zeros((), dtype=torch.float64), s.value_coefficient or 0.0
    for i in minibatch:
        e, response = every[i], responses[i]
        rows = (logits_of(actors, e["ids"]) / s.sampling.temperature).log_softmax(-1)
        new_values = values_of(actors, e["ids"])
        for t in range(e["n"]):
            place = e["start"] - 1 + t
            logprob = rows[place, response.ids[t]]
            ratio = (logprob - response.logprobs[t]).exp()
            advantage = (e["advantages"][t] - mean) / deviation
            gain = torch.min(ratio * advantage, ratio.clamp(1 - s.clip_ratio, 1 + s.clip_ratio) * advantage)
            if s.dual_clip and advantage < 0:
                gain = torch.max(gain, torch.tensor(s.dual_clip * advantage))
            target = e["advantages"][t] + e["values"][t]
            near = e["values"][t] + (new_values[place] - e["values"][t]).clamp(-s.clip_value, s.clip_value)
            worse = torch.max((new_values[place] - target) ** 2, (near - target) ** 2)
            entropy = -(rows[place].exp() * rows[place]).sum()
            loss = loss - gain + value_coefficient * 0.5 * worse - s.entropy_coefficient * entropy
            if s.kl.placement == "loss":
                loss = loss + s.kl.coefficient * 0.5 * (logprob - e["other"][t]) ** 2  # k2
    (loss / tokens).backward()
    return gradients_of(learner)


def our_gradient(learner: Learner, responses: list[Response], minibatch: list[int]) -> Any:
    trajectory = evaluated(learner, responses)
    for part in learner._passes:
        learner._minibatch_gradient(part, trajectory, torch.tensor(minibatch))
    return gradients_of(learner)


LOSSES: list[dict[str, Any]] = [
    {},
    {"layout": "shared"},
    {"layout": "adapters"},
    {"kl": {"coefficient": 0.3, "placement": "loss", "estimator": "k2"}, "entropy_coefficient": 0.1, "dual_clip": 1.1},
]


@pytest.mark.parametrize("minibatch", [[0, 1, 2, 3, 4, 5], [3, 0, 5], [4]])
@pytest.mark.parametrize("more", LOSSES)
def test_the_gradient_equals_a_naive_one(minibatch: list[int], more: dict[str, Any]) -> None:
    section = settings(**more)
    learner = make_learner(section)
    responses = [r._replace(logprobs=[p - 0.1 * t for t, p in enumerate(r.logprobs)]) for r in drawn(learner)]
    ours, expected = our_gradient(learner, responses, minibatch), naive_gradient(learner, responses, minibatch, section)
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 1e-3
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.parametrize("layout", ["full", "shared", "adapters"])
def test_layers_that_are_computed_twice_change_no_gradient(layout: str) -> None:
    """Adapters: when a layer is computed again, the pass has long given the base back its other adapter."""
    section = settings(layout=layout)
    responses = drawn(make_learner(section))
    found, computed = [], [0, 0]
    for twice in (0, 1):
        learner = make_learner(section)
        actors = learner._setup.roles.actors

        def count(*_: Any, which: int = twice) -> None:
            computed[which] += 1

        if twice:
            actors.checkpoint_layers("a key")
        actors.train()
        actors.policy.base_model.layers[0].self_attn.register_forward_hook(count)
        found.append(our_gradient(learner, responses, [0, 1, 2, 3, 4, 5]))
    assert computed[1] > computed[0]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("more", LOSSES[:3])
def test_float32_is_near_the_naive_gradient(more: dict[str, Any]) -> None:
    section = settings(**more)
    exact = make_learner(section)
    responses = drawn(exact)
    expected = naive_gradient(exact, responses, [0, 1, 2, 3, 4, 5], section)
    ours = our_gradient(make_learner(section, dtype=torch.float32), responses, [0, 1, 2, 3, 4, 5])
    far = sum(float((a.double() - b).square().sum()) for a, b in zip(ours, expected, strict=True)) ** 0.5
    assert far < 1e-4 * sum(float(b.square().sum()) for b in expected) ** 0.5


@pytest.mark.parametrize("microbatch", [Budget(10**6, 1), Budget(10**6, 2), Budget(1, 6), Budget(12, 6)])
def test_the_microbatch_changes_nothing(microbatch: Budget) -> None:
    section = settings()
    responses = drawn(make_learner(section))
    everyone = [0, 1, 2, 3, 4, 5]
    whole = our_gradient(make_learner(section, Budget(10**6, 6)), responses, everyone)
    ours = our_gradient(make_learner(section, microbatch), responses, everyone)
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_what_the_padding_holds_changes_nothing() -> None:
    section = settings()
    learner = make_learner(section)
    responses = drawn(learner)
    trajectory = evaluated(learner, responses, [1.0] * 6)
    places = torch.arange(trajectory.ids.shape[1])
    real = places < (trajectory.prompt_lengths + trajectory.mask.sum(1)).unsqueeze(1)
    garbage = trajectory._replace(
        ids=torch.where(real, trajectory.ids, 17),
        logprobs=torch.where(trajectory.mask, trajectory.logprobs, float("nan")),
        values=torch.where(trajectory.mask, trajectory.values, float("inf")),
        advantages=torch.where(trajectory.mask, trajectory.advantages, float("nan")),
        returns=torch.where(trajectory.mask, trajectory.returns, float("nan")),
    )
    found = []
    for batch in (trajectory, garbage):
        figures = learner._minibatch_gradient(learner._passes[0], batch, torch.arange(6))
        gradients = [p.grad.clone() for p in learner._setup.roles.actors.policy.parameters() if p.grad is not None]
        found.append((figures, gradients))
        learner._setup.roles.actors.policy.zero_grad()
    assert found[0][0] == found[1][0]  # the logged entropy, KL and clip fraction too
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)


def test_every_minibatch_is_an_optimiser_step_whatever_the_microbatch() -> None:
    """TRL: num_mini_batches had no effect under gradient accumulation."""
    section = settings(epochs=3, minibatches=2)
    for microbatch in (1, 3):
        learner = make_learner(section, Budget(10**6, microbatch))
        steps: list[int] = []
        optimizer = learner._passes[0].moving.optimizers["policy"]
        optimizer.step = lambda steps=steps, step=optimizer.step: (steps.append(1), step())
        trajectory = evaluated(learner, drawn(learner), [1.0] * 6)
        learner._optimise(trajectory, 0)
        assert len(steps) == 6


@pytest.mark.parametrize("layout", ["full", "shared", "adapters"])
def test_an_update_ends_where_the_policy_is_too_far_but_not_before_it_has_moved(layout: str) -> None:
    section = settings(layout=layout, epochs=3, minibatches=2, stop_kl=1e-12)
    learner = make_learner(section)
    before = [parameter.detach().clone() for parameter in parameters_of(learner)]
    figures = learner._optimise(evaluated(learner, drawn(learner), [1.0] * 6), 0)
    assert figures["optimiser_steps"] == 2  # the second sees how far the first went
    assert {"critic_gradient_norm", "value_loss"} <= figures.keys()
    assert any(not torch.equal(a, b) for a, b in zip(parameters_of(learner), before, strict=True))


def test_gradients_are_clipped() -> None:
    """TRL: max_grad_norm was ignored."""
    section = settings(gradient_clipping=1e-3, minibatches=1)
    learner = make_learner(section)
    norms = []
    optimizer = learner._passes[0].moving.optimizers["policy"]
    step = optimizer.step

    def watched() -> None:
        parameters = learner._setup.roles.actors.policy_parameters()
        total = sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)
        norms.append(total**0.5)
        step()

    optimizer.step = watched
    trajectory = evaluated(learner, drawn(learner), [1.0] * 6)
    figures = learner._optimise(trajectory, 0)
    assert figures["policy_gradient_norm"] > 1e-2  # what is logged is the norm before clipping
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_minibatches_hold_every_episode_once_an_epoch_in_new_orders() -> None:
    learner = make_learner(settings(epochs=2, minibatches=3))
    found = [part.tolist() for part in learner._minibatches(6, 0)]
    assert [len(part) for part in found] == [2] * 6
    first = [place for part in found[:3] for place in part]
    second = [place for part in found[3:] for place in part]
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    assert [part.tolist() for part in learner._minibatches(6, 0)] == found
    assert [part.tolist() for part in learner._minibatches(6, 1)] != found


def test_the_score_of_a_response_falls_on_its_end_token_not_behind_it() -> None:
    """TRL: the score landed one token after EOS."""
    learner = make_learner(settings(kl={"coefficient": 0.0}, gae_lambda=0.0, discount=1.0))
    responses = drawn(learner)
    actors: Any = learner._setup.roles.actors
    for parameter in actors.critic.parameters():
        parameter.data.zero_()
    actors.critic.mean = 0.0
    trajectory = evaluated(learner, responses, [100.0 + i for i in range(6)])
    # with lambda 0, no values and no KL, a token's return is its reward
    for row, response in enumerate(responses):
        last = len(response.ids) - 1
        assert trajectory.ids[row, len(PROMPTS[row].ids) + last] == response.ids[-1]
        expected = [0.0] * last + [100.0 + row - (0.0 if response.ended else 1.0)]
        assert trajectory.returns[row, : last + 1].tolist() == expected
        assert not trajectory.returns[row, last + 1 :].any()


def test_a_critic_from_the_policy_begins_at_zero_and_one_from_the_judge_at_its_scores(tmp_path: Any) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[BOS, 5, 6, 7], [BOS, 9, 10, END]])
    assert not critic_from_policy(LlamaForCausalLM(config()))(ids).any()
    scorer: PreTrainedModel = LlamaForSequenceClassification(config(num_labels=1)).eval()
    scorer.save_pretrained(tmp_path)
    loaded = load_scorer(tmp_path)
    expected = loaded(input_ids=ids).logits[:, 0].detach() - 0.5
    values = critic_from_scorer(load_scorer(tmp_path), 0.5)(ids)[:, -1].detach()
    torch.testing.assert_close(values, expected)


def test_a_critic_from_an_ensemble_begins_at_the_mean_of_its_heads(tmp_path: Any) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[BOS, 5, 6, 7], [BOS, 9, 10, END]])
    LlamaForSequenceClassification(config(num_labels=3, score_heads=3)).save_pretrained(tmp_path)
    logits = load_scorer(tmp_path)(input_ids=ids).logits.detach()
    expected = [sum(float(row[k]) - (0.5, -1.0, 2.0)[k] for k in range(3)) / 3 for row in logits]
    values = critic_from_scorer(load_scorer(tmp_path), (0.5 - 1.0 + 2.0) / 3)(ids)[:, -1].tolist()
    assert values == pytest.approx(expected, abs=1e-6)


def test_equal_pad_and_end_are_refused(tmp_path: Any) -> None:
    """TRL: pad == eos corrupted the masks."""
    tokenizer: Any = SimpleNamespace(pad_token_id=END, eos_token_id=END, eos_token="<end>", chat_template="any")
    recipe: Any = SimpleNamespace(ppo=settings())
    nothing: Any = None  # it is refused before anything is loaded
    with pytest.raises(UserError, match="one token, '<end>', as pad and as end token"):
        build_roles(recipe, nothing, Start(str(tmp_path), False, None), tokenizer, torch.device("cpu"))


def test_learning_rates_fall_linearly_and_the_critic_learns_faster() -> None:
    found = []
    for section in (settings(updates=4), settings(updates=4, schedule="constant", critic_learning_rate=3e-2)):
        learner = make_learner(section)
        rates = []
        for number in range(4):
            learner._set_rates(number, 0.5)
            moved = {who: part.moving.optimizers[who] for part in learner._passes for who in part.who}
            rates.append([moved[who].param_groups[0]["lr"] for who in ("policy", "critic")])
        found.append(rates)
    assert found[0] == [[pytest.approx(5e-3 * s), pytest.approx(2.5e-2 * s)] for s in (1, 0.75, 0.5, 0.25)]
    assert found[1] == [[5e-3, 1.5e-2]] * 4


@pytest.mark.parametrize(("layout", "expected"), [("full", 0.5), ("shared", 0.01)])
def test_on_a_shared_trunk_the_value_loss_counts_less(layout: str, expected: float) -> None:
    assert make_learner(settings(layout=layout, value_coefficient=None))._value_coefficient == expected


@pytest.mark.parametrize(
    ("layout", "updates", "asked", "expected"),
    [("full", 20, None, 0), ("shared", 20, None, 2), ("shared", 2, None, 0), ("shared", 20, 0, 0), ("full", 20, 3, 3)],
)
def test_a_critic_that_knows_nothing_learns_first(layout: str, updates: int, asked: int | None, expected: int) -> None:
    learner = make_learner(settings(layout=layout, updates=updates, critic_warmup=asked))
    assert learner._warmup == expected
    trajectory = evaluated(learner, drawn(learner), [1.0] * 6)
    policy = [parameter.detach().clone() for parameter in learner._setup.roles.actors.policy_parameters()]
    critic = [parameter.detach().clone() for parameter in learner._setup.roles.actors.critic_parameters()]
    learner._optimise(trajectory, 0)
    moved = [
        any(not torch.equal(a, b) for a, b in zip(now, before, strict=True))
        for now, before in (
            (learner._setup.roles.actors.policy_parameters(), policy),
            (learner._setup.roles.actors.critic_parameters(), critic),
        )
    ]
    assert moved == [expected == 0, True]
