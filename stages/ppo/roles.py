"""The roles of PPO - policy, critic, reference, judge - and the three ways of laying them out.

    full       four models: the policy and the critic learn, the reference and the judge are frozen
    shared     policy and critic on one trunk, the critic being a value head; reference and judge as in full
    adapters   one frozen base: policy and critic are low-rank adapters on it, and so is a reward model that was trained
               with `lora` on that base; the reference is the base without any

What learns, `Actors`, is taken in passes: policy and critic have each a forward and a backward pass of their own, so
that the activations and gradients of only one of them are held at a time; on one trunk they share a pass.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.functional.masked import widened
from rlhf.judge import Judge, judge_models
from rlhf.likelihood import Hide, TokenReader
from rlhf.model import Critic, checkpoint_layers, last_gain
from rlhf.pieces import is_absent
from rlhf.sharding import Held, Holding
from stages.lora import SameAdapter, merged_in_place, using_adapter, with_named_adapter
from stages.ppo.episodes import Trajectory

POLICY, CRITIC, REWARD = "policy", "critic", "reward"  # names of adapters

Who = Literal["policy", "critic"]


class Likelihoods(NamedTuple):
    """What the policy says of a trajectory's response tokens, [B, T], zero behind the mask."""

    logprobs: Tensor
    entropy: Tensor


class Actors(nn.Module, ABC):
    """What learns: the policy, whose logits are divided by the temperature, and the critic.

    `end_ids` can't be drawn at the first `least` - 1 tokens of a response.
    """

    policy: PreTrainedModel
    _reader: TokenReader

    def __init__(self, temperature: float, end_ids: list[int], least: int) -> None:
        super().__init__()
        self._temperature, self._end_ids, self._least = temperature, end_ids, least

    def policy_states(self, ids: Tensor) -> Tensor:
        """What the policy's log-probabilities are read from, at all positions of ids [B, L]."""
        return self._reader.states(ids)

    @abstractmethod
    def values(self, rows: Trajectory, policy_states: Tensor | None = None) -> Tensor:
        """The critic's values [B, T] of the states before each of the response's tokens.

        A critic on the policy's trunk uses the policy's states, where they are at hand.
        """

    def passes(self, called: Any) -> list["Pass"]:
        """What learns, in the order in which it is taken; `called` is called as these actors, for their gradients."""
        return [Pass(self, called, "policy"), Pass(self, called, "critic")]

    def forward(self, who: tuple[Who, ...], rows: Trajectory | None, texts: Tensor | None) -> "Outputs | Tensor":
        """What policy, critic or both say of the rows; or the policy's nats for texts, see `nats_of`."""
        if rows is None:
            assert texts is not None
            return self.nats_of(texts)
        states = self.policy_states(rows.ids) if "policy" in who else None
        likelihoods = self.policy_says(rows, states) if states is not None else None
        return Outputs(likelihoods, self.values(rows, states) if "critic" in who else None)

    def _trunk(self, ids: Tensor) -> Tensor:
        """The last hidden states [B, L, H] of the policy's body."""
        states: Tensor = self.policy.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def drawing(self) -> AbstractContextManager[PreTrainedModel]:
        """The policy as a causal LM to draw from, within."""
        return nullcontext(self.policy)

    def plain_policy(self) -> PreTrainedModel:
        """The policy as a plain model, to be saved; nothing can be learned afterwards."""
        return self.policy

    def checkpoint_layers(self, key: str) -> None:
        """Has what learns hold less and compute its layers twice, see rlhf.model.checkpoint_layers."""
        checkpoint_layers(self.policy, key)

    @abstractmethod
    def policy_parameters(self) -> list[nn.Parameter]:
        """Those that the policy's optimiser moves."""

    @abstractmethod
    def critic_parameters(self) -> list[nn.Parameter]:
        """Those that the critic's optimiser moves."""

    def policy_says(self, rows: Trajectory, states: Tensor) -> Likelihoods:
        """What the policy says of the response's tokens, from its states of all positions."""
        return self.read(self._reader, states, rows)

    def nats_of(self, texts: Tensor) -> Tensor:
        """The policy's nats for texts [n, L + 1], all but their first tokens, summed."""
        states = self.policy_states(texts[:, :-1])
        return -self._reader.read(states.flatten(0, 1), texts[:, 1:].flatten()).logprobs.sum()

    def read(self, reader: TokenReader, states: Tensor, rows: Trajectory) -> Likelihoods:
        """What a model says of the response's tokens, from its states [B, L, H] of all positions."""
        before, tokens = _before(states, rows)[rows.mask], rows.tokens()[rows.mask]
        found = reader.read(before, tokens, self._temperature, self._hide(rows))
        return Likelihoods(_spread(found.logprobs, rows.mask), _spread(found.entropy, rows.mask))

    def _hide(self, rows: Trajectory) -> Hide | None:
        support, least = rows.allowed(), self._least
        if support:
            return support.hide_others  # the ends are not in it where they were banned
        if least == 1:
            return None
        early = (torch.arange(rows.mask.shape[1], device=rows.ids.device) < least - 1).expand_as(rows.mask)[rows.mask]
        ends = torch.tensor(self._end_ids, device=rows.ids.device)

        def hide(logits: Tensor, start: int) -> Tensor:
            banned = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
            banned[:, ends] = early[start : start + len(logits)].unsqueeze(1)
            return logits.masked_fill(banned, float("-inf"))

        return hide


def _before(values: Tensor, rows: Trajectory) -> Tensor:
    """[B, T, ...] of [B, L, ...]: what stands at the place before each of the response's tokens."""
    places = rows.places(-1)
    return values[torch.arange(len(places), device=places.device).unsqueeze(1), places]


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values [N] of the places that count, as [B, T] with zeros elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


class FullActors(Actors):
    """Two models."""

    def __init__(
        self, policy: PreTrainedModel, critic: Critic, temperature: float, end_ids: list[int], least: int
    ) -> None:
        super().__init__(temperature, end_ids, least)
        self.policy, self.critic = policy, critic
        self._reader = TokenReader(policy)

    def values(self, rows: Trajectory, policy_states: Tensor | None = None) -> Tensor:
        """See Actors."""
        return torch.where(rows.mask, _before(self.critic(rows.ids), rows), 0.0)

    def checkpoint_layers(self, key: str) -> None:
        """See Actors."""
        super().checkpoint_layers(key)
        checkpoint_layers(self.critic.backbone, key)

    def policy_parameters(self) -> list[nn.Parameter]:
        """See Actors."""
        return list(self.policy.parameters())

    def critic_parameters(self) -> list[nn.Parameter]:
        """See Actors."""
        return list(self.critic.parameters())


class ValueHead(nn.Module):
    """A value of each state, zero at first.

    It reads states of size 1, whatever gain the model's last norm has: behind a small one it would learn slowly.
    """

    def __init__(self, like: PreTrainedModel) -> None:
        super().__init__()
        self.scale = 1.0 / (float(last_gain(like).square().mean().sqrt()) or 1.0)
        self.layer = nn.Linear(like.config.get_text_config().hidden_size, 1, device=like.device, dtype=like.dtype)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Values [...], at least float32, of states [..., H]."""
        return widened(self.layer(states * self.scale).squeeze(-1))

    @torch.no_grad()
    def begin_as(self, weight: Tensor, bias: float) -> None:
        """Gives the values `states @ weight + bias`, of weight [H]."""
        self.layer.weight.copy_(weight.unsqueeze(0) / self.scale)
        self.layer.bias.fill_(bias)


class SharedActors(Actors):
    """One trunk with the policy's head and a value head."""

    def __init__(self, policy: PreTrainedModel, temperature: float, end_ids: list[int], least: int) -> None:
        super().__init__(temperature, end_ids, least)
        self.policy, self.head = policy, ValueHead(policy)
        self._reader = TokenReader(policy)

    def values(self, rows: Trajectory, policy_states: Tensor | None = None) -> Tensor:
        """See Actors."""
        states = policy_states if policy_states is not None and self._reader.apart else self._trunk(rows.ids)
        return torch.where(rows.mask, self.head(_before(states, rows)), 0.0)

    def passes(self, called: Any) -> list["Pass"]:
        """See Actors."""
        return [Pass(self, called, "policy", "critic")]

    def policy_parameters(self) -> list[nn.Parameter]:
        """See Actors: the trunk's, which the value loss moves too."""
        return list(self.policy.parameters())

    def critic_parameters(self) -> list[nn.Parameter]:
        """See Actors."""
        return list(self.head.parameters())


class AdapterActors(Actors):
    """Two adapters on one frozen base; `base` is a causal LM in which adapters POLICY and CRITIC have been put."""

    def __init__(
        self,
        base: PreTrainedModel,
        temperature: float,
        end_ids: list[int],
        least: int,
        whole: Callable[[], PreTrainedModel] | None = None,
    ) -> None:
        """`whole` loads the base's own weights, where it is quantised."""
        super().__init__(temperature, end_ids, least)
        self._whole = whole
        self.policy, self.head = base, ValueHead(base)
        with using_adapter(base, None):
            self._reader = TokenReader(base)

    def policy_states(self, ids: Tensor) -> Tensor:
        """See Actors."""
        with using_adapter(self.policy, POLICY):
            return self._reader.states(ids)

    def values(self, rows: Trajectory, policy_states: Tensor | None = None) -> Tensor:
        """See Actors."""
        with using_adapter(self.policy, CRITIC):
            states = self._trunk(rows.ids)
        return torch.where(rows.mask, self.head(_before(states, rows)), 0.0)

    @contextmanager
    def drawing(self) -> Iterator[PreTrainedModel]:
        """See Actors."""
        with using_adapter(self.policy, POLICY):
            yield self.policy

    def plain_policy(self) -> PreTrainedModel:
        """See Actors. Where the base is quantised, its own weights are loaded for it, on the CPU."""
        if self._whole is None:
            return merged_in_place(self.policy, POLICY)
        return merged_in_place(with_named_adapter(self._whole(), self.policy, POLICY), POLICY)

    def checkpoint_layers(self, key: str) -> None:
        """See Actors."""
        checkpoint_layers(self.policy, key, SameAdapter(self.policy))

    def policy_parameters(self) -> list[nn.Parameter]:
        """See Actors."""
        return [p for name, p in self.policy.named_parameters() if f".{POLICY}." in name]

    def critic_parameters(self) -> list[nn.Parameter]:
        """See Actors."""
        found = [p for name, p in self.policy.named_parameters() if f".{CRITIC}." in name]
        return [*found, *self.head.parameters()]


class Outputs(NamedTuple):
    """What a pass gives; None is what is not in it."""

    likelihoods: Likelihoods | None
    values: Tensor | None


class Pass(nn.Module):
    """A forward and backward pass of policy, critic or both, with the parameters that it moves and no others.

    So processes that share a gradient share just these.
    """

    def __init__(self, actors: Actors, called: Any, *who: Who) -> None:
        """See `Actors.passes`."""
        super().__init__()
        self.who = who
        parameters = {"policy": actors.policy_parameters, "critic": actors.critic_parameters}
        self.trained = nn.ModuleDict({each: nn.ParameterList(parameters[each]()) for each in who})
        self._called = (called,)  # in a tuple it is no part of this module

    def forward(self, rows: Trajectory | None = None, texts: Tensor | None = None) -> Outputs | Tensor:
        """See `Actors.forward`: it is one call, whatever wraps the actors."""
        (called,) = self._called
        found: Outputs | Tensor = called(self.who, rows, texts)
        return found


class Reference:
    """The model that the policy started from."""

    def __init__(self, model: PreTrainedModel, *, without_adapters: bool = False) -> None:
        self.model, self._plain = model, without_adapters
        with self._as_it_was():
            self._reader = TokenReader(model)

    def _as_it_was(self) -> AbstractContextManager[None]:
        return using_adapter(self.model, None) if self._plain else nullcontext()

    @torch.inference_mode()
    def logprobs(self, actors: Actors, rows: Trajectory) -> Tensor:
        """Log-probabilities [B, T] of the response's tokens, among those that the policy could draw."""
        with self._as_it_was():
            return actors.read(self._reader, self._reader.states(rows.ids), rows).logprobs


class Roles(NamedTuple):
    """The models of PPO."""

    actors: Actors
    reference: Reference
    judge: Judge
    second_judge: Judge | None


class HeldRoles(NamedTuple):
    """How the processes hold the models; those of a judge may be several, or none."""

    actors: Held
    reference: Held
    judge: list[Held]
    second_judge: list[Held]


def hold(roles: Roles, holding: Holding) -> HeldRoles:
    """Whole or in pieces, the frozen ones too. A model on the policy's weights is gathered with these."""
    actors = holding.learning(roles.actors)

    def resting(model: PreTrainedModel) -> list[Held]:
        lent = [actors] if is_absent(model) else []
        own = [holding.resting(model)] if model is not roles.actors.policy else []
        return [*lent, *own]

    def judged(judge: Judge | None) -> list[Held]:
        return [held for _, model in judge_models(judge) for held in resting(model)]

    *_, reference = [actors, *resting(roles.reference.model)]
    return HeldRoles(actors, reference, judged(roles.judge), judged(roles.second_judge))
