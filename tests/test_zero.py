"""DeepSpeed's ZeRO-3 on two CPU processes comes to what whole models come to, and goes on under any way of holding.

The oracle is the same stage with whole models (DDP), which other tests hold against one process.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlhf import runtime
from rlhf.errors import UserError
from rlhf.launch_file import open_launch_file
from rlhf.runtime import Sharding, take_over_sharding
from tests.conftest import ROOT, rlhf
from tests.test_sharding import SHARDED, STEPS, TINY, VARIANTS, WHOLE, Ways, apart, chain, killed, losses, rolled_back

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")

ZERO = ("--launch-config", "zero3-cpu")
CLOSE = 5e-5  # of weights up to 3.7; seen: 1.2e-5, where Adam magnifies what is near nothing

__all__ = ["chain"]  # the fixture

# What is asked for


def test_without_the_package_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"deepspeed, which is not installed; .* pip install 'rlhf\[deepspeed\]'"):
        open_launch_file("zero3-cpu", None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as `accelerate launch` by itself tells a process
    with pytest.raises(UserError, match="deepspeed, which is not installed"):
        take_over_sharding()


def test_what_the_launcher_says_of_deepspeed_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate and transformers are not to see it."""
    monkeypatch.setattr(runtime, "find_spec", lambda name: name)
    told = {"ZERO_STAGE": "3", "OFFLOAD_PARAM_DEVICE": "none", "ZERO3_INIT": "false"}
    for name, value in told.items():
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert take_over_sharding() == Sharding(zero=True)
    assert not [name for name in os.environ if name.startswith(("ACCELERATE_DEEPSPEED", "ACCELERATE_GRADIENT"))]
    for name, value in (("ZERO_STAGE", "2"), ("OFFLOAD_PARAM_DEVICE", "cpu"), ("CONFIG_FILE", "mine.json")):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
        with pytest.raises(UserError, match=f"with {name.lower()}: {value}, and only {name.lower()}: .* is followed"):
            take_over_sharding()


# A model, on two processes

SCRIPT = """
import copy, warnings, torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from rlhf.checkpoint import Piece, copy_tree
from rlhf.errors import UserError
from rlhf.pieces import cut_of, is_absent, put, shape_of, weights_of
from rlhf.runtime import Sharding
from rlhf.sharding import gathered, sharded_models
from rlhf.team import join_team
from rlhf.worker import leave

warnings.simplefilter("ignore")
team = join_team()
holding = sharded_models(team, Sharding(zero=True), "float32")


class Two(nn.Module):
    # of which a pass takes one
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, which, ids):
        return getattr(self, which)(ids, labels=ids, use_cache=False).loss


def optimizers_of(two):
    return {
        which: torch.optim.AdamW(getattr(two, which).parameters(), lr=1e-2, eps=1e-4, fused=True)
        for which in ("first", "second")
    }


def rows(step):
    return torch.randint(0, 33, (2, 9), generator=torch.Generator().manual_seed(step))


same, sure = dict(vocab_size=33, hidden_size=12, num_hidden_layers=2), dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
torch.manual_seed(1)
model = Two(
    LlamaForCausalLM(LlamaConfig(**same, num_attention_heads=2, intermediate_size=7, tie_word_embeddings=True)),
    GPT2LMHeadModel(GPT2Config(vocab_size=33, n_embd=12, n_layer=2, n_head=2, **sure)),
)
plain, names = copy.deepcopy(model), list(model.state_dict())
held = holding.learning(model)
assert is_absent(model)
cuts = {id(cut_of(p)): cut_of(p) for p in held.learner.parameters()}.values()
assert sum(cut.piece.numel() for cut in cuts) * 2 - sum(p.numel() for p in plain.parameters()) < len(cuts)  # half
assert [shape_of(p) for p in held.learner.parameters()] == [tuple(p.shape) for p in plain.parameters()]
moving, theirs = held.moving(held.called, optimizers_of(held.learner)), optimizers_of(plain)


def step(number, taken=True, may_move=("first", "second")):
    for which in ("first", "second"):
        for part in range(2):  # gradients add up over passes
            ids = rows(10 * number + part)
            moving.backward(moving.module(which, ids[team.rank :][:1]) / 2)
            (plain(which, ids) / 2).backward()
        parameters = [p for group in theirs[which].param_groups for p in group["params"]]
        norms = [moving.clip(0.5, which), float(nn.utils.clip_grad_norm_(parameters, 0.5))]
        assert abs(norms[0] - norms[1]) < 1e-5 * norms[1], norms
        if taken and which in may_move:
            moving.step(which)
            theirs[which].step()
        moving.forget()
        theirs[which].zero_grad()


def apart():
    with gathered(held), gathered(held):
        found = model.state_dict()
        assert list(found) == names
        assert model.first.get_input_embeddings().weight is model.first.get_output_embeddings().weight
        return max(float((found[name] - value).abs().max()) for name, value in plain.state_dict().items())


step(0)
step(1, taken=False)
step(2, may_move=("second",))
assert apart() < 2e-6, apart()
kept = copy_tree({"weights": weights_of(held.learner), "moving": moving.state()})
assert any(isinstance(value, Piece) for value in kept["weights"].values())
before = copy.deepcopy(plain.state_dict()), {which: copy.deepcopy(o.state_dict()) for which, o in theirs.items()}
step(3)
moving.backward(moving.module("first", rows(0)[:1]))  # a step begun, as before a spike is rolled back
put(held.learner, kept["weights"])
moving.load(copy_tree(kept["moving"]))
moving.forget()
plain.load_state_dict(before[0])
for which, optimizer in theirs.items():
    optimizer.load_state_dict(before[1][which])
assert apart() < 2e-6, apart()
step(4)
assert apart() < 2e-6, apart()
with held.gathered(), torch.inference_mode():
    for _ in range(1 + 2 * team.rank):  # processes may do different numbers of passes here
        found = model.first(rows(0), use_cache=False).logits
    assert (found - plain.first(rows(0), use_cache=False).logits).abs().max() < 1e-4
held.settle()
assert not is_absent(model)
frozen = copy.deepcopy(plain.first).requires_grad_(False)
wanted = frozen(rows(0)).logits
rests = holding.resting(frozen)
assert is_absent(frozen)
with rests.gathered():
    assert torch.equal(frozen(rows(0)).logits, wanted)
try:
    again = holding.learning(plain.second)
    again.moving(again.called, {"muon": torch.optim.SGD(again.learner.parameters())})
except UserError as error:
    print(error)
torch.manual_seed(team.rank)
try:
    holding.learning(nn.Linear(2, 2))
except Exception as error:
    print(error)
team.wait()
leave(0)  # as a stage's process does
"""


@needs_deepspeed
def test_a_model_in_pieces_learns_what_the_whole_one_learns(tmp_path: Path) -> None:
    """Where there is no compiler: DeepSpeed would have some of its own compiled."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={
                **os.environ,
                "PATH": str(tmp_path),
                "PYTHONPATH": str(ROOT),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
                "RLHF_RENDEZVOUS": str(tmp_path / "meeting"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0, said
        assert "pretrain.optimizer: Muon needs whole rows" in said
        assert "disagrees with rank 0 on the weights before they are cut into pieces" in said


# Stages


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "key"), [("pretrain", "loss"), ("sft", "loss"), ("reward", "loss"), ("ppo", "kl")])
def test_a_stage_comes_to_what_it_comes_to_with_whole_models(chain: Path, tmp_path: Path, stage: str, key: str) -> None:
    shutil.copytree(chain / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / f"runs/tiny/{stage}")
    said = rlhf("run", stage, *TINY, "ppo.keep.rule=last", *ZERO, cwd=tmp_path)
    assert "2 processes on this machine's CPUs (DeepSpeed ZeRO-3 over gloo)" in said
    assert "[WARNING]" not in said and "built successfully" not in said  # DeepSpeed's
    there, here = (home / "runs/tiny" / stage for home in (chain, tmp_path))
    assert list(here.glob("checkpoints/step-*/**/*.1-of-2.safetensors")), "each process writes its pieces"
    assert apart(there, here) < CLOSE
    assert losses(here, key) == pytest.approx(losses(there, key), abs=1e-5)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(chain: Path, tmp_path: Path, name: str) -> None:
    stage, overrides = VARIANTS[name]
    overrides = [word for word in overrides if word != "pretrain.optimizer=muon"]
    for how, words in (("whole", WHOLE), ("pieces", ZERO)):
        shutil.copytree(chain / "runs", tmp_path / how / "runs")
        before = ["reward"] if any("reward." in word for word in overrides) and stage == "ppo" else []
        for each in (*before, stage):
            command = ("run", each, *TINY, *overrides)
            rlhf(*command, *words, cwd=tmp_path / how)
    assert apart(*(tmp_path / how / "runs/tiny" / stage for how in ("whole", "pieces"))) < CLOSE


GOES_ON: Ways = [(ZERO, ZERO), (ZERO, ()), (ZERO, WHOLE), ((), ZERO), (ZERO, SHARDED), (SHARDED, ZERO)]


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", STEPS)
def test_killed_it_goes_on_as_it_was_and_in_other_ways(chain: Path, tmp_path: Path, stage: str) -> None:
    """-9 to a process; then the same command, one process, two with whole models, FSDP2; and the other way round."""
    ways = GOES_ON if stage in ("pretrain", "sft") else GOES_ON[:4]
    killed(chain, tmp_path, stage, ways=ways)


@needs_deepspeed
@pytest.mark.slow
def test_a_spike_is_rolled_back(chain: Path, tmp_path: Path) -> None:
    rolled_back(chain, tmp_path, ZERO)


@needs_deepspeed
@pytest.mark.slow
def test_what_is_not_done_is_refused(chain: Path, tmp_path: Path) -> None:
    shutil.copytree(chain / "runs", tmp_path / "runs")
    said = rlhf("run", "pretrain", *TINY, *ZERO, "pretrain.optimizer=muon", cwd=tmp_path, code=2)
    assert "pretrain.optimizer: Muon needs whole rows of matrices" in said
