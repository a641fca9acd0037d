"""The doctor: names what goes wrong while PPO learns, with the evidence and what to change.

Each sign is a function from the figures of the updates so far to evidence, or None. The thresholds are wide: what they
find is no matter of taste.
"""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from statistics import median
from typing import Any, NamedTuple

from rlhf.errors import RecipeError

Figures = Mapping[str, float]
History = Sequence[Figures]  # of the updates so far, the newest last; what a sign looks at is in KNOWN


class Finding(NamedTuple):
    """Something that is wrong."""

    name: str
    evidence: str
    advice: str

    def __str__(self) -> str:
        return f"{self.name}: {self.evidence}; {self.advice}"


class Sign(NamedTuple):
    """What is looked for."""

    name: str
    advice: str
    look: Callable[[History], str | None]


SIGNS: list[Sign] = []


def sign(advice: str) -> Callable[[Callable[[History], str | None]], Callable[[History], str | None]]:
    """Adds what is decorated to what is looked for, under its own name."""

    def added(look: Callable[[History], str | None]) -> Callable[[History], str | None]:
        SIGNS.append(Sign(look.__name__, advice, look))
        return look

    return added


KNOWN = (
    "score", "score_deviation", "score_length_correlation", "kl", "kl_coefficient", "approximate_kl", "clip_fraction",
    "policy_gradient_norm", "critic_gradient_norm", "entropy", "response_tokens", "ended", "misplaced", "drift",
    "explained_variance",
)  # fmt: skip


@sign("take a smaller learning_rate, fewer epochs, or stop_kl")
def steps_too_large(history: History) -> str | None:
    """An update moves the policy too far for its estimates to hold."""
    now = history[-1]
    if now["approximate_kl"] > 0.1:
        return f"within the update the policy moved {now['approximate_kl']:.3g} nats a token (over 0.1)"
    if now["clip_fraction"] > 0.5:
        return f"{now['clip_fraction']:.0%} of the tokens were clipped (over 50 %)"
    for name in ("policy_gradient_norm", "critic_gradient_norm"):
        before = [figures[name] for figures in history[:-1]]
        if len(before) >= 5 and now[name] > 20 * median(before) and now[name] > 10:
            return f"{name.replace('_', ' ')} {now[name]:.3g}, the median so far is {median(before):.3g}"
    return None


@sign("take a larger kl.coefficient, kl.target, or a smaller learning_rate")
def kl_runs_away(history: History) -> str | None:
    """The policy has left the reference."""
    now = history[-1]
    per_token = now["kl"] / max(now["response_tokens"], 1.0)
    if per_token > 1.0:
        return f"KL {now['kl']:.1f} nats an episode, {per_token:.2f} a token (over 1)"
    return None


@sign("the policy will leave what the judge knows: give kl.coefficient, or at least keep.kl_budget")
def kl_costs_nothing(history: History) -> str | None:
    """Nothing keeps the policy near the reference, and it goes."""
    now = history[-1]
    if now["kl_coefficient"] > 0 or len(history) < 5:
        return None
    rising = all(a["kl"] < b["kl"] for a, b in zip(history[-5:], history[-4:], strict=False))
    if now["kl"] > 1.0 and rising:
        return f"the coefficient is 0 and KL has risen to {now['kl']:.1f} nats an episode, in each of 5 updates"
    return None


@sign("log-probabilities are of another distribution than the one drawn from")
def kl_negative(history: History) -> str | None:
    """What is called KL can not be one."""
    recent = [figures["kl"] for figures in history[-3:]]
    if len(recent) == 3 and max(recent) < -0.2:
        return f"KL {recent[-1]:.2f} nats an episode for 3 updates; a mean below 0 can't be"
    return None


@sign("take a smaller learning_rate, a larger kl.coefficient or an entropy_coefficient")
def entropy_collapses(history: History) -> str | None:
    """The policy says the same whatever is drawn."""
    first, now = history[0]["entropy"], history[-1]["entropy"]
    if first > 0.02 and now < 0.1 * first:
        return f"{now:.4f} nats a token, at first {first:.3f}"
    return None


@sign("the judge pays for length: add a judge against it, or train another")
def score_follows_length(history: History) -> str | None:
    """Longer responses score higher, and responses become longer."""
    first, recent = history[0]["response_tokens"], history[-3:]
    longer = recent[-1]["response_tokens"] / first
    if len(recent) == 3 and longer > 1.25 and min(f["score_length_correlation"] for f in recent) > 0.7:
        found = recent[-1]["score_length_correlation"]
        return f"score and length correlate by {found:.2f}, and responses have become {longer:.2f} times as long"
    return None


@sign("look at the samples; a larger no_end_penalty or kl.coefficient may help")
def longer_for_nothing(history: History) -> str | None:
    """Responses become longer and no better."""
    if len(history) < 5:
        return None
    first, now = history[0], history[-1]
    longer = now["response_tokens"] / first["response_tokens"]
    if longer > 1.5 and now["score"] <= first["score"] + 0.1 * first["score_deviation"]:
        scores = f"{first['score']:.3f} to {now['score']:.3f}"
        return f"responses are {longer:.2f} times as long, and the score went from {scores}"
    return None


@sign("raise sampling.max_tokens, or see whether SFT taught the end token (responses_ended)")
def never_ends(history: History) -> str | None:
    """Responses stop only because they must."""
    recent = [figures["ended"] for figures in history[-2:]]
    if len(recent) == 2 and max(recent) < 0.5:
        return f"{recent[-1]:.0%} of the responses end by themselves"
    return None


@sign("try critic_warmup, another critic_from or critic_learning_rate")
def critic_explains_nothing(history: History) -> str | None:
    """The values are worse than a constant."""
    recent = [figures["explained_variance"] for figures in history[-5:]]
    if len(history) >= 10 and max(recent) < 0.0:
        return f"explained variance {recent[-1]:.2f}, below 0 for 5 updates: a constant would do better"
    return None


@sign("every response is worth the same to it, so nothing can be learned: look at the judge")
def judge_is_constant(history: History) -> str | None:
    """The judge says the same of everything."""
    now = history[-1]
    if now["score_deviation"] > 1e-6 * abs(now["score"]):
        return None
    return f"the scores of an update have a standard deviation of {now['score_deviation']:.2g}"


@sign("pad and end tokens of model and tokenizer don't fit together")
def tokens_misplaced(history: History) -> str | None:
    """Pads or end tokens stand within responses."""
    count = history[-1]["misplaced"]
    return f"{count:.0f} responses hold a pad, or an end token before their end" if count else None


@sign("try engine: generate, or another precision")
def rollout_drifts(history: History) -> str | None:
    """The engine and the training pass see different distributions."""
    drift = history[-1]["drift"]
    if drift > 0.05:
        return f"rollout and training disagree by {drift:.3g} nats a token before the first step (over 0.05)"
    return None


SMALLER_STEPS_HELP = ("steps_too_large", "kl_runs_away", "entropy_collapses")


class Doctor:
    """Looks at the figures of each update."""

    def __init__(self, off: Sequence[str] = ()) -> None:
        names = [sign.name for sign in SIGNS]
        for name in off:
            if name not in names:
                near = get_close_matches(name, names, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise RecipeError(f"ppo.doctor.off: there is no finding {name!r}, only {', '.join(names)}{hint}")
        self._off = frozenset(off)
        self._history: list[dict[str, float]] = []
        self.found: dict[str, list[int]] = {}  # in which updates each finding was made

    def state(self) -> dict[str, Any]:
        """What the next look depends on."""
        return {"history": list(self._history), "found": {name: list(updates) for name, updates in self.found.items()}}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self._history, self.found = list(state["history"]), {name: list(u) for name, u in state["found"].items()}

    def look(self, update: int, figures: Figures) -> list[Finding]:
        """What is wrong after this update, counted from 1."""
        self._history.append({name: float(figures[name]) for name in KNOWN})
        findings = []
        for sign in SIGNS:
            evidence = None if sign.name in self._off else sign.look(self._history)
            if evidence:
                findings.append(Finding(sign.name, evidence, sign.advice))
                self.found.setdefault(sign.name, []).append(update)
        return findings
