"""FSDP2: models in pieces on two CPU processes come to what whole ones come to, and go on under any number of them.

The oracle is the same stage with whole models (DDP), which other tests hold against one process.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf.checkpoint import Piece, copy_tree, load_tree, rows_of, save_pieces, save_tree
from tests.conftest import ROOT, TINY_RECIPE, rlhf
from tests.equal_runs import differences
from tests.test_resume import sealed, start, until

TINY = ("--recipe", str(TINY_RECIPE), "stages=[tokenizer, pretrain, sft, reward, ppo]")
SHARDED = ("--launch-config", "fsdp2-cpu")
WHOLE = ("--processes", "2")
CLOSE = 1e-5  # of weights up to 3.7; seen: 7e-7
OTHERWISE_ADDED = 1e-4  # where another number of processes has summed: Adam magnifies what is near nothing; seen: 9e-6

# Checkpoints in pieces


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_rows_are_cut_as_torch_cuts_them(rows: int, size: int) -> None:
    chunks = [chunk.tolist() for chunk in torch.arange(rows).chunk(size)] if rows else []
    chunks += [[]] * (size - len(chunks))
    assert [list(rows_of(rows, rank, size)) for rank in range(size)] == chunks


@pytest.mark.parametrize("writers", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 2, 4])
def test_pieces_of_any_number_of_processes_are_put_together(tmp_path: Path, writers: int, readers: int) -> None:
    whole = {"matrix": torch.arange(35.0).view(7, 5), "vector": torch.arange(3).to(torch.bfloat16)}

    def tree(rank: int, size: int) -> dict[str, object]:
        cut = {name: value[list(rows_of(len(value), rank, size))] for name, value in whole.items()}
        held = {name: Piece(cut[name], tuple(value.shape), rank, size) for name, value in whole.items()}
        return {"moments": [held["vector"], held["matrix"]], "step": 3, "plain": torch.ones(2)}

    for rank in range(writers):
        save_pieces(tree(rank, writers), tmp_path, "state")
    save_tree(tree(0, writers), tmp_path, "state")
    for rank in range(readers):
        found, wanted = load_tree(tmp_path, "state", (rank, readers)), tree(rank, readers)
        assert (found["step"], found["plain"].tolist()) == (3, [1.0, 1.0])
        for mine, theirs in zip(found["moments"], wanted["moments"], strict=True):  # type: ignore[call-overload]
            if readers == 1:
                assert torch.equal(mine, whole["matrix" if mine.dim() == 2 else "vector"])
            else:
                assert (mine.shape, mine.rank, mine.size) == (theirs.shape, rank, readers)
                assert torch.equal(mine.local, theirs.local)
                assert mine.local.dtype == theirs.local.dtype


def test_a_copied_piece_has_memory_of_its_own() -> None:
    piece = Piece(torch.zeros(2), (4,), 0, 2)
    copied = copy_tree({"a": [piece]})["a"][0]
    piece.local.fill_(1.0)
    assert copied.local.tolist() == [0.0, 0.0]
    assert copied.shape == (4,)


# A model in pieces, on two processes

SCRIPT = """
import copy, torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from rlhf.pieces import ABSENT, is_absent, put, weights_of, whole
from rlhf.runtime import Sharding
from rlhf.sharding import ShardedModels, gathered
from rlhf.team import join_team
from rlhf.worker import leave

team = join_team()
holding = ShardedModels(team, Sharding(), bfloat16=False)
same = dict(vocab_size=33, hidden_size=12, num_hidden_layers=2)
models = [
    LlamaConfig(**same, num_attention_heads=2, intermediate_size=7, tie_word_embeddings=True),
    GPT2Config(vocab_size=33, n_embd=12, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
]
for config, kind in zip(models, (LlamaForCausalLM, GPT2LMHeadModel)):
    torch.manual_seed(1)
    model = kind(config)
    plain, names = copy.deepcopy(model), list(model.state_dict())
    held = holding.learning(model)
    twin = held.learner
    local = sum(p.to_local().numel() for p in twin.parameters())
    total = sum(p.numel() for p in plain.parameters())
    assert abs(local - total / 2) < 40, (local, total)  # half of it; 7 and 33 rows are not halved evenly
    assert is_absent(model) and all(p.device == ABSENT for p in model.parameters())
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-6, fused=True) for m in (twin, plain)]
    for step in range(4):
        ids = torch.randint(0, 33, (2, 9), generator=torch.Generator().manual_seed(step))
        twin(ids[team.rank :][:1], labels=ids[team.rank :][:1]).loss.backward()
        plain(ids, labels=ids).loss.backward()
        norms = [float(whole(nn.utils.clip_grad_norm_(m.parameters(), 0.5))) for m in (twin, plain)]
        assert abs(norms[0] - norms[1]) < 1e-5 * norms[1], norms
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step == 1:
            kept = weights_of(twin)
            kept = {name: p.__class__(p.local.clone(), p.shape, p.rank, p.size) if hasattr(p, "local") else p
                    for name, p in kept.items()}
            before = copy.deepcopy(plain.state_dict())
    with gathered(held), gathered(held), torch.inference_mode():
        # processes may do different numbers of passes here
        for _ in range(1 + 2 * team.rank):
            found = model(ids, use_cache=False).logits
        assert (found - plain(ids, use_cache=False).logits).abs().max() < 1e-5
        assert list(model.state_dict()) == names
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert is_absent(model)
    put(twin, kept)
    held.settle()
    assert all((value - before[name]).abs().max() < 1e-6 for name, value in model.state_dict().items())
    frozen = copy.deepcopy(plain).requires_grad_(False)
    wanted = frozen(ids).logits
    rests = holding.resting(frozen)
    assert is_absent(frozen)
    with rests.gathered():
        assert torch.equal(frozen(ids).logits, wanted)
    rounding = ShardedModels(team, Sharding(), bfloat16=True)
    half = rounding.learning(plain)
    logits = half.learner(ids).logits
    assert logits.dtype == torch.bfloat16
    with rounding.computing(), half.gathered(), torch.no_grad():
        assert torch.equal(plain(ids).logits, logits)
    with half.gathered():
        assert plain.dtype == torch.float32  # measured in what is saved
    half.settle()
    assert plain.dtype == torch.float32  # what is saved is not rounded
torch.manual_seed(team.rank)
try:
    holding.learning(nn.Linear(2, 2))
except Exception as error:
    print(error)
team.wait()
leave(0)  # as a stage's process does
"""


def test_a_model_in_pieces_learns_what_the_whole_one_learns(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "GLOO_SOCKET_IFNAME": "lo",
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
        assert "disagrees with rank 0 on the weights before they are cut into pieces" in said


# Stages


def apart(one: Path, other: Path) -> float:
    """The largest difference of two models' weights."""
    first, second = (load_file(folder / "model/model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    assert {value.dtype for value in second.values()} == {torch.float32}
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def losses(stage: Path, key: str) -> list[float]:
    lines = map(json.loads, (stage / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny chain has run on two processes with whole models; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    rlhf("run", "all", *TINY, *WHOLE, "ppo.keep.rule=last", cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "key"), [("pretrain", "loss"), ("sft", "loss"), ("reward", "loss"), ("ppo", "kl")])
def test_a_stage_in_pieces_comes_to_what_it_comes_to_with_whole_models(
    chain: Path, tmp_path: Path, stage: str, key: str
) -> None:
    shutil.copytree(chain / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / f"runs/tiny/{stage}")
    command = ("run", stage, *TINY, "ppo.keep.rule=last")
    said = rlhf(*command, *SHARDED, cwd=tmp_path)
    assert "2 processes on this machine's CPUs (FSDP2 over gloo)" in said
    there, here = (home / "runs/tiny" / stage for home in (chain, tmp_path))
    assert list(here.glob("checkpoints/step-*/**/*.1-of-2.safetensors")), "each process writes its pieces"
    assert apart(there, here) < CLOSE
    assert losses(here, key) == pytest.approx(losses(there, key), abs=1e-5)


VARIANTS = {
    "muon, gradient checkpointing, documents apart, z-loss, gradients added up": (
        "pretrain",
        [
            "pretrain.optimizer=muon",
            "pretrain.gradient_checkpointing=true",
            "pretrain.isolate_documents=true",
            "pretrain.z_loss=0.001",
            "pretrain.microbatch_size=2",
        ],
    ),
    "adapters, packed rows, gradient checkpointing": (
        "sft",
        ["sft.lora={rank: 4}", "sft.packing=true", "sft.gradient_checkpointing=true"],
    ),
    "early stopping": ("sft", ["sft.early_stopping={every: 10, patience: 2, min_gain: 0.5}"]),
    "adapters, an ensemble": ("reward", ["reward.lora={rank: 4}", "reward.heads=3"]),
    "a shared trunk": ("ppo", ["ppo.layout=shared", "ppo.keep.rule=last"]),
    "adapters, the judge too, gradient checkpointing": (
        "ppo",
        ["ppo.layout=adapters", "ppo.keep.rule=last", "reward.lora={rank: 4}", "ppo.gradient_checkpointing=true"],
    ),
    "texts, back-off, more processes than rows": (
        "ppo",
        [
            "ppo.ptx={train: [{builtin: tinyworld, rows: 60}], tokens_per_minibatch: 192, sequence_length: 64}",
            "ppo.microbatch_size=1",
            "ppo.doctor.action=back_off",
            "ppo.episodes_per_update=6",
            "ppo.keep.rule=last",
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(chain: Path, tmp_path: Path, name: str) -> None:
    stage, overrides = VARIANTS[name]
    for how, words in (("whole", WHOLE), ("pieces", SHARDED)):
        shutil.copytree(chain / "runs", tmp_path / how / "runs")
        before = ["reward"] if any("reward." in word for word in overrides) and stage == "ppo" else []
        for each in (*before, stage):
            rlhf(
                "run",
                each,
                *TINY,
                "stages=[tokenizer, pretrain, sft, reward, ppo]",
                *overrides,
                *words,
                cwd=tmp_path / how,
            )
    assert apart(*(tmp_path / how / "runs/tiny" / stage for how in ("whole", "pieces"))) < CLOSE


Ways = list[tuple[tuple[str, ...], tuple[str, ...]]]  # how a stage was begun, and how it goes on
GOES_ON: Ways = [(SHARDED, SHARDED), (SHARDED, ()), (SHARDED, WHOLE), ((), SHARDED)]
STEPS = {"pretrain": 7, "sft": 20, "reward": 5, "ppo": 1}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STEPS)
def test_killed_it_goes_on_with_as_many_processes_and_with_others(chain: Path, tmp_path: Path, stage: str) -> None:
    """-9 to a process; then the same command, one process, or two with whole models; and the other way round."""
    killed(chain, tmp_path, stage)


@pytest.mark.slow
def test_killed_adapters_go_on(chain: Path, tmp_path: Path) -> None:
    killed(chain, tmp_path, "sft", "sft.lora={rank: 4}", "sft.early_stopping={every: 10, patience: 9}")


@pytest.mark.slow
def test_interrupted_it_ends_with_the_same_bits_even_with_dropout(chain: Path, tmp_path: Path) -> None:
    work, whole = tmp_path / "runs/tiny/sft", tmp_path / "undisturbed"
    shutil.copytree(chain / "runs", tmp_path / "runs")
    often = ("checkpoints.every_steps=20", "checkpoints.keep=9")
    command = ("run", "sft", *TINY, *SHARDED, *often, "sft.lora={rank: 4, dropout: 0.2}")
    rlhf(*command, cwd=tmp_path)
    shutil.copytree(work, whole)
    shutil.rmtree(work / "model")
    (work / "summary.json").unlink()
    for step in (40, 60):
        shutil.rmtree(work / f"checkpoints/step-{step}")
    assert "goes on from the checkpoint of step 20" in rlhf(*command, cwd=tmp_path)
    assert differences(whole, work) == []


def killed(chain: Path, home: Path, stage: str, *overrides: str, ways: Ways = GOES_ON) -> None:
    work, ends = home / "runs/tiny" / stage, []
    shutil.copytree(chain / "runs", home / "runs")
    command = (
        "run",
        stage,
        *TINY,
        "checkpoints.every_steps=1",
        "checkpoints.keep=99",
        "ppo.keep.rule=last",
        *overrides,
    )
    for number, (began, then) in enumerate(ways):
        shutil.rmtree(work, ignore_errors=True)
        process = start(*command, *began, cwd=home)
        until(lambda: len(sealed(work)) >= STEPS[stage], process)
        last = "ranks/rank-1.json" if began else "ranks/rank-0.json"
        os.kill(json.loads((work / last).read_text())["pid"], signal.SIGKILL)
        process.communicate(timeout=120)
        said = rlhf(*command, *then, cwd=home)
        assert "goes on from the checkpoint of step" in said
        assert ("is gone on from with" in said) == (began == () or then == ())
        ends.append(work.rename(home / f"end-{number}"))
    others = ends[1:] if overrides else [*ends[1:], chain / "runs/tiny" / stage]
    assert max(apart(ends[0], other) for other in others) < OTHERWISE_ADDED


@pytest.mark.slow
def test_a_spike_is_rolled_back_in_pieces(chain: Path, tmp_path: Path) -> None:
    rolled_back(chain, tmp_path, SHARDED)


def rolled_back(chain: Path, home: Path, pieces: Sequence[str]) -> None:
    """Models in pieces, held as these words say, go back where whole ones do."""
    overrides = ["pretrain.learning_rate=0.9", "pretrain.spikes.good_every=3", "pretrain.spikes.most_in_a_row=2"]
    said = {}
    for how, words in (("whole", WHOLE), ("pieces", pieces)):
        shutil.copytree(chain / "runs", home / how / "runs")
        done = subprocess.run(
            [sys.executable, "-m", "rlhf", "run", "pretrain", *TINY, *overrides, *words],
            cwd=home / how,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        said[how] = [line.split(": the loss")[0] for line in done.stdout.splitlines() if "a spike at step" in line]
    assert said["pieces"] == said["whole"] != []


@pytest.mark.slow
def test_what_is_not_done_in_pieces_is_refused(chain: Path, tmp_path: Path) -> None:
    shutil.copytree(chain / "runs", tmp_path / "runs")
    said = rlhf("run", "pretrain", *TINY, *SHARDED, "pretrain.compile=true", cwd=tmp_path, code=2)
    assert "pretrain.compile: not where models are sharded (FSDP2, ZeRO-3)" in said
