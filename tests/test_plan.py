"""Plans: memory counted without numbers, what is refused, what is told, what to change."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from rlhf.errors import RlhfError, UserError
from rlhf.footprint import GRADIENTS, OPTIMISER, WORKING, Footprint, is_traced, tracing
from rlhf.likelihood import head_stands_apart
from rlhf.model import accelerator_bytes, build_causal_lm, count_parameters, planning_for
from rlhf.plan import machine_of, run_plan
from rlhf.recipe import Recipe, StageName, load_recipe
from rlhf.rundir import RunDir
from stages.plan import GIB, Context, Machine, passes, plan_stage, sft
from stages.plan.machine import GPUS, Work
from stages.sft import Row
from tests.conftest import TINY_RECIPE, VOCAB_SIZE, rlhf

# Counting


def test_tensors_are_counted_while_something_holds_them() -> None:
    with tracing() as footprint:
        with footprint.phase("one"):
            a = torch.zeros(1000)  # 4,000 bytes
            b = a + 1
            view = b[10:]
            del a, b
            assert is_traced(view)
        with footprint.phase("two"):
            torch.zeros(100, dtype=torch.float64)
        del view
        with footprint.phase("three"):
            pass
    assert [moment.total for moment in footprint.moments] == [8000, 4000 + 800, 0]
    assert footprint.peak().phase == "one"


def test_a_training_step_by_hand() -> None:
    """One linear layer of 50 x 100 weights without bias, on 8 rows: what autograd and Adam hold is known."""
    weights = 4 * 50 * 100
    with tracing() as footprint:
        with footprint.role("weights"):
            layer = nn.Linear(100, 50, bias=False)
        footprint.name_gradients(layer.parameters())
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        inputs = torch.zeros(8, 100)
        for _ in range(2):
            with footprint.phase("step"):
                layer(inputs).square().sum().backward()
                with footprint.role(OPTIMISER):
                    optimizer.step()
                optimizer.zero_grad()
    # in the first step: the optimiser has two moments, and a count of steps
    assert footprint.moments[0].roles == {
        "weights": weights,
        GRADIENTS: weights,
        OPTIMISER: 2 * weights + 4,
        WORKING: 4 * 8 * 100,  # the inputs
    }
    # in the second one the inputs, the outputs, their squares and gradients come on top while the gradient is made
    most = 3 * weights + 4 + weights + 4 * (8 * 100 + 3 * 8 * 50)
    assert 4 * weights < footprint.peak().total <= most


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_counted_without_numbers_is_what_there_is_with_them(kind: str) -> None:
    """The same operations on real tensors, counted by the same counter: the bytes are the same."""
    if kind == "llama":
        config: LlamaConfig | GPT2Config = LlamaConfig(
            vocab_size=300,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    else:
        config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)

    def step(footprint: Footprint) -> int:
        model = build_causal_lm(config)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            with footprint.phase("step"):
                ids = torch.zeros(3, 20, dtype=torch.long)
                model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return footprint.peak().total

    with tracing() as traced:
        without = step(traced)
    with Footprint() as counted:
        found = step(counted)
    assert without == pytest.approx(found, rel=0.05)  # some backward passes are split otherwise


def test_a_copy_has_no_contents_either() -> None:
    """Torch's own would be a tensor whose memory belongs to somebody else: what is written to it breaks the process."""
    with tracing() as footprint, footprint.phase("copy"):
        layer = nn.Linear(10, 5)
        made = copy.deepcopy(layer)
        assert is_traced(made.weight) and isinstance(made.weight, nn.Parameter) and made.weight is not layer.weight
        tied = nn.ModuleList([layer, layer])
        both = copy.deepcopy(tied)
        assert both[0].weight is both[1].weight
    assert footprint.peak().total == 3 * 4 * 55


def test_a_model_without_numbers_is_asked_by_its_configuration() -> None:
    with tracing():
        plain = build_causal_lm(LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
        assert head_stands_apart(plain)
        plain.config.final_logit_softcapping = 30.0
        assert not head_stands_apart(plain)


def test_what_is_sized_by_a_gpu_is_sized_by_the_one_that_is_planned_for() -> None:
    with planning_for(8 * GIB):
        assert accelerator_bytes(torch.device("cpu"), 0.25) == 2 * GIB
    with planning_for(0):
        assert accelerator_bytes(torch.device("cuda"), 0.25) == 0
    assert accelerator_bytes(torch.device("cpu"), 0.25) == 0


# Stages


def context(*overrides: str, processes: int = 1, memory: float = 0) -> Context:
    recipe = load_recipe(str(TINY_RECIPE), list(overrides))
    return Context(recipe, RunDir(Path("nowhere")), Machine(processes, round(memory * GIB)))


def test_weights_gradients_and_moments_are_those_of_the_parameters() -> None:
    plan = plan_stage(context("model.width=128", "model.layers=3"), "pretrain")
    assert plan.memory is not None
    weights = 4 * plan.parameters
    assert plan.memory.roles["weights"] == pytest.approx(weights, rel=1e-3)  # and the rotary frequencies
    # 12 layer matrices' worth a layer: 4 d^2 of attention, 3 d x 352 of the MLP, norms; and the tied embedding
    assert plan.parameters == 600 * 128 + 3 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) + 128
    optimiser = plan.memory.roles[OPTIMISER]
    assert 2 * weights <= optimiser < 2.01 * weights
    assert plan.memory.roles["good states, to go back to after a spike"] >= weights


def test_microbatches_and_checkpointing_make_memory_smaller() -> None:
    large = ("model.width=64", "pretrain.tokens_per_step=4096", "pretrain.microbatch_size=64")

    def working(*more: str) -> int:
        memory = plan_stage(context(*large, *more), "pretrain").memory
        assert memory is not None
        return memory.roles[WORKING]

    whole, half = working(), working("pretrain.microbatch_size=32")
    assert half == pytest.approx(whole / 2, rel=0.15)
    assert working("pretrain.gradient_checkpointing=true") < 0.7 * whole


def test_packed_rows_are_what_the_stage_packs() -> None:
    """Four conversations of a length in rows for two: a microbatch is two rows."""
    settings = context("sft.packing=true", "sft.max_tokens=20").recipe.sft
    assert settings is not None
    chat = Row(np.arange(10, dtype=np.int32), np.array([False, *[True] * 9]))
    assert sft.microbatch_of(settings, [chat] * 4) == sft.Shape(rows=2, tokens=20, trained=20)


@pytest.mark.parametrize(
    ("stage", "batch"),
    [
        ("sft", "sft.dialogues_per_step=256"),
        ("reward", "reward.pairs_per_step=64"),
        ("ppo", "ppo.microbatch_tokens=4096"),
    ],
)
def test_layers_that_are_computed_twice_hold_less(stage: str, batch: str) -> None:
    large = ("model.layers=8", batch)
    found = []
    for more in ((), (f"{stage}.gradient_checkpointing=true",)):
        memory = plan_stage(context(*large, *more), stage).memory  # type: ignore[arg-type]  # one of the three
        assert memory is not None
        found.append(memory.total)
    assert found[1] < 0.9 * found[0]


def test_dropout_that_no_stage_has_is_not_counted() -> None:
    """GPT-2's configuration asks for it, and a stage that loads one switches it off."""
    wide = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64}
    found = []
    for rate in (0.0, 0.1):
        config = GPT2Config(**wide, resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate)
        with tracing() as footprint, footprint.phase("a pass"):
            model = passes.causal_lm(config, context().machine).train()
            model(input_ids=passes.ids(4, 32)).logits.sum().backward()
        found.append(max(moment.total for moment in footprint.moments))
    assert found[0] == found[1]


def test_muon_keeps_one_moment_of_the_layers_matrices() -> None:
    adamw, muon = (
        plan_stage(context("model.width=256", f"pretrain.optimizer={kind}"), "pretrain") for kind in ("adamw", "muon")
    )
    assert adamw.memory is not None and muon.memory is not None
    inner = 4 * 2 * (4 * 256**2 + 3 * 256 * 672)  # bytes
    assert adamw.memory.roles[OPTIMISER] - muon.memory.roles[OPTIMISER] == pytest.approx(inner, rel=0.01)
    assert adamw.disk - muon.disk == pytest.approx(3 * 3 * inner)  # three checkpoints of three states each


def test_texts_that_are_mixed_into_ppo_are_read() -> None:
    plain = plan_stage(context(), "ppo").memory
    ptx = "ppo.ptx={train: [{builtin: tinyworld, rows: 10}], tokens_per_minibatch: 8000, sequence_length: 100}"
    mixed = plan_stage(context(ptx), "ppo").memory
    assert plain is not None and mixed is not None
    assert mixed.phase == "the policy's step on texts" and mixed.total > plain.total


def test_ppo_holds_what_its_layout_holds() -> None:
    found = {}
    for layout in ("full", "shared", "adapters"):
        plan = plan_stage(context(f"ppo.layout={layout}", "model.width=128"), "ppo")
        assert plan.memory is not None
        found[layout] = {role: size for role, size in plan.memory.roles.items() if ":" in role}
    weights = found["full"]["policy: weights"]
    assert found["full"]["reference: weights"] == weights and "critic: optimiser" in found["full"]
    assert "critic: optimiser" not in found["shared"] or found["shared"]["critic: optimiser"] < weights / 10
    assert "reference: weights" not in found["adapters"] and "critic: weights" not in found["adapters"]
    assert sum(found["adapters"].values()) < sum(found["shared"].values()) < 0.7 * sum(found["full"].values())


def test_a_shared_trunk_is_passed_once() -> None:
    """Its policy and critic read the same states, so a step holds hardly more than the policy's own in layout full."""
    working = {}
    for layout in ("full", "shared"):
        overrides = (f"ppo.layout={layout}", "ppo.sampling.max_tokens=100", "ppo.microbatch_tokens=4000")
        plan = plan_stage(context("model.layers=8", "model.width=64", *overrides), "ppo")
        assert plan.memory is not None and plan.memory.phase == "the policy's step"
        working[layout] = plan.memory.roles[WORKING]
    assert working["shared"] < 1.2 * working["full"]


def test_attention_as_asked_for_is_what_is_counted() -> None:
    """Eager attention holds its weights, of every head, as a square of the row: here they are most of all there is."""
    long = ("model.context=512", "pretrain.sequence_length=512", "pretrain.tokens_per_step=1024", "model.heads=8")
    recipe = load_recipe(str(TINY_RECIPE), [*long, "attention=eager", "model.width=64"])
    eager, sdpa = (
        plan_stage(Context(recipe, RunDir(Path("nowhere")), machine), "pretrain").memory
        for machine in (machine_of(recipe, 0, None, None), Machine(1, 0))
    )
    assert eager is not None and sdpa is not None
    weights = 4 * 2 * 2 * 8 * 512**2  # float32, two layers, two rows, eight heads
    assert eager.roles[WORKING] - sdpa.roles[WORKING] > weights


def test_every_judge_is_held() -> None:
    one, three = (
        plan_stage(context(*more), "ppo").memory
        for more in ((), ("ppo.judge=[{model: reward}, {model: reward, name: a}, {model: reward, name: b}]",))
    )
    assert one is not None and three is not None
    judges = {role: size for role, size in three.roles.items() if role.startswith("judge")}
    assert len(judges) == 3 and len(set(judges.values())) == 1
    assert sum(role.startswith("judge") for role in one.roles) == 1


def test_a_base_without_a_pad_token_is_planned_in_every_stage(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """GPT-2, Llama and many more have none; transformers' classifiers then refuse more than one row."""
    GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=200, n_embd=32, n_layer=1, n_head=2)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    stages: tuple[StageName, ...] = ("sft", "reward", "ppo", "evaluate")
    planned = context(f"base={tmp_path}", f"stages=[{','.join(stages)}]", "evaluate.judge=[{model: reward}]")
    for stage in stages:
        memory = plan_stage(planned, stage).memory
        assert memory is not None and memory.total > 0
    long = context(f"base={tmp_path}", f"stages=[{','.join(stages)}]", "sft.max_tokens=500")
    with pytest.raises(UserError, match=r"sft.max_tokens is 500, more than the model's context of 200 tokens"):
        plan_stage(long, "sft")
    for stage, section in (("sft", "sft"), ("reward", "reward"), ("ppo", "ppo")):
        long = context(f"base={tmp_path}", f"stages=[{','.join(stages)}]", f"{section}.sampling.max_tokens=200")
        with pytest.raises(UserError, match=f"{section}.*: no prompt leaves room for a response of 200 tokens"):
            plan_stage(long, stage)


def test_a_base_in_four_bits_takes_an_eighth() -> None:
    """Of the linear layers; embeddings, norms and the activations stay."""
    plain, packed = (
        plan_stage(context("model.width=256", f"sft.lora={{rank: 4, quantised: {kind}}}"), "sft").memory
        for kind in ("null", "nf4")
    )
    assert plain is not None and packed is not None
    layers = 2 * (4 * 256**2 + 3 * 256 * 672)
    assert plain.roles["weights"] - packed.roles["weights"] == pytest.approx(layers * (4 - 0.5 - 1 / 64), rel=0.01)


def test_in_pieces_each_process_holds_its_share() -> None:
    large = ("model.width=256", "model.layers=4", "pretrain.tokens_per_step=16384", "pretrain.microbatch_size=64")
    whole = plan_stage(context(*large, processes=4), "pretrain").memory
    recipe = load_recipe(str(TINY_RECIPE), list(large))
    pieces = plan_stage(Context(recipe, RunDir(Path("nowhere")), Machine(4, 0, sharded=True)), "pretrain").memory
    assert whole is not None and pieces is not None
    for role in ("weights", OPTIMISER):
        assert pieces.roles[role] == pytest.approx(whole.roles[role] / 4, rel=0.01)
    assert whole.roles["gradients on their way (DDP)"] == pytest.approx(whole.roles["weights"], rel=0.01)
    layer = 4 * 256**2 + 3 * 256 * 672 + 2 * 256
    assert "step" in pieces.phase  # two layers at a time, and what stands outside of them
    assert pieces.roles["weights gathered from their pieces"] == 4 * (600 * 256 + 256 + 2 * layer)


def test_work_by_hand() -> None:
    """6 operations a parameter and token, and attention's; on two GPUs half as long."""
    plan = plan_stage(context(), "pretrain")
    # attention: 12 x width x positions a layer and token
    assert plan.work.flops == pytest.approx(plan.tokens * (6 * plan.parameters + 2 * 12 * 32 * 64))
    gpu = GPUS[0]
    assert plan.work.hours(gpu, 2) == pytest.approx(plan.work.flops / (0.4 * gpu.flops * 2) / 3600)
    decoding = Work(0.0, steps=3600, step_bytes=0.5 * gpu.bandwidth)
    assert decoding.hours(gpu, 4) == pytest.approx(1.0)  # a step reads for a second, however many GPUs there are
    together = Work(1.0, 10, 100.0) + Work(2.0, 30, 200.0)
    assert (together.flops, together.steps, together.step_bytes) == (3.0, 40, 175.0)


def test_a_response_in_many_pairs_is_read_once() -> None:
    few, many = (
        plan_stage(context(f"reward.collect.responses_per_prompt={each}", "reward.pairs_per_step=90"), "reward")
        for each in (2, 10)
    )
    assert "60 comparisons at most" in few.lines[0] and "2,700 comparisons at most" in many.lines[0]
    assert many.tokens == 5 * few.tokens and few.tokens == 60 * 2 * 96
    assert few.memory and many.memory and many.memory.total < few.memory.total


def test_a_ranking_is_read_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = LlamaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    build_causal_lm(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    row = {"prompt": "hot", "responses": ["one", "two", "six"], "ranks": [1, 2, 3]}  # three pairs of three responses
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    files = ("reward.collect=null", "reward.train=[{path: rows.jsonl}]", "reward.test=[{path: rows.jsonl}]")
    together, alone = (
        plan_stage(
            context(
                f"base={tmp_path}",
                f"data.root={tmp_path}",
                "stages=[sft,reward]",
                *files,
                "reward.pairs_per_step=3",
                f"reward.microbatch_size={size}",
                "reward.epochs=1",
            ),
            "reward",
        )
        for size in (3, 1)
    )
    assert alone.tokens == pytest.approx(2 * together.tokens, rel=0.2)


def test_questions_without_a_tokenizer_are_unknown_not_none() -> None:
    plan = plan_stage(context("evaluate.prompts=[]"), "evaluate")
    assert " 0 tokens" not in plan.lines[0] and "few-shot" in plan.unchecked[-1]


def test_muon_is_refused_under_deepspeed_as_a_run_refuses_it() -> None:
    muon = load_recipe(str(TINY_RECIPE), ["pretrain.optimizer=muon"])
    with pytest.raises(UserError, match="Muon needs whole rows"):
        machine_of(muon, None, None, None, "zero3-cpu")
    assert machine_of(muon, None, None, None, "fsdp2-cpu").sharded


def test_what_is_planned_for() -> None:
    plain = load_recipe(str(TINY_RECIPE))
    made_for = load_recipe(str(TINY_RECIPE), ["hardware={gpus: 8, gpu_memory: 80, launch: fsdp2}"])
    assert machine_of(plain, 0, None, None).on_gpus is False
    assert machine_of(plain, 4, 24, None) == Machine(4, 24 * GIB, False, True)
    assert machine_of(made_for, None, None, None) == Machine(8, 80 * GIB, True, True)
    assert machine_of(made_for, 2, 40, None) == Machine(2, 40 * GIB, False, True)
    assert machine_of(made_for, 0, None, None) == Machine(1, 0)
    assert machine_of(plain, None, None, None, "cpu-2") == Machine(2, 0)
    assert machine_of(made_for, None, None, None, "cpu-2") == Machine(2, 0)  # what is said goes before the recipe
    assert machine_of(made_for, None, None, None, "machines-2") == Machine(16, 80 * GIB, False, True)
    assert machine_of(plain, 1, 80, None, "fsdp2") == Machine(1, 80 * GIB, False, True)  # one process has no pieces
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--gpu-memory"):
            machine_of(plain, 4, None, None)


@pytest.mark.parametrize(
    ("gpus", "memory", "processes", "launch", "told"),
    [
        (0, 80, None, "", "--gpus 0 means"),
        (4, 80, 2, "", "--gpus 4 and --processes 2"),
        (4, 80, None, "cpu-2", "starts processes on CPUs"),
        (None, 80, None, "fsdp2-cpu", "starts processes on CPUs"),
        (0, None, None, "fsdp2", "starts processes on GPUs"),
        (None, None, 3, "cpu-2", "--processes 3 and"),
        (8, 80, None, "machines-2", "num_processes: 16"),
    ],
)
def test_options_that_contradict_are_refused(
    gpus: int | None, memory: float | None, processes: int | None, launch: str, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        machine_of(load_recipe(str(TINY_RECIPE)), gpus, memory, processes, launch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("launch", ["gpus", "fsdp2"])
def test_gpus_that_are_not_here_must_be_told(launch: str) -> None:
    with pytest.raises(UserError, match="--gpu-memory"):
        machine_of(load_recipe(str(TINY_RECIPE)), None, None, None, launch)


def test_hours_are_told_for_large_gpus_and_else_said_to_be_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(str(TINY_RECIPE))
    for memory, told in ((141, "H200 141 GB"), (1000, "not known: no GPU with 1000 GiB")):
        run_plan(recipe, ("pretrain",), tmp_path, Machine(1, memory * GIB), as_json=False)
        assert told in capsys.readouterr().out


# The command


def test_the_command_tells_all_and_changes_nothing(tmp_path: Path) -> None:
    said = rlhf("plan", "--recipe", str(TINY_RECIPE), cwd=tmp_path)
    for stage in ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate"):
        assert f"] {stage}: would run" in said
    assert "everything fits" in said and "activations" in said and "unchecked" in said
    assert list(tmp_path.iterdir()) == []


def test_planned_for_a_small_gpu_it_says_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["model.width=512", "pretrain.tokens_per_step=65536", "pretrain.microbatch_size=1024"]

    def said(*more: str) -> str:
        recipe = load_recipe(str(TINY_RECIPE), [*overrides, *more])
        run_plan(recipe, ("pretrain",), tmp_path, Machine(1, GIB, bfloat16=True), as_json=False)
        return capsys.readouterr().out

    first = said()
    assert "does not fit: pretrain" in first
    (told,) = (line for line in first.splitlines() if "too large" in line)
    assert "everything fits" in said(*told.split(": with ")[1].split(" it fits")[0].split())


def test_a_finished_chain_is_planned_with_its_own_tokenizer(
    finished_chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = rlhf("run", "all", "--recipe", str(TINY_RECIPE), "--dry-run", cwd=finished_chain)
    assert "done, would be skipped" in said and "⟦" in said and "isn't here yet" not in said
    recipe = load_recipe(str(TINY_RECIPE))
    capsys.readouterr()
    run_plan(recipe, recipe.stages, finished_chain / "runs", Machine(1, 0), as_json=True)
    found = json.loads(capsys.readouterr().out)
    for stage in ("pretrain", "sft", "reward", "ppo", "evaluate"):
        summary = json.loads((finished_chain / "runs/tiny" / stage / "summary.json").read_text())
        assert found["stages"][stage]["memory_mib"] > 100
        assert summary["peak_memory_mib"] > summary["libraries_memory_mib"] > 100
        assert found["stages"][stage]["parameters"] == summary["parameters"]


GOOD = '{"prompt": "a", "completion": "b"}\n'
PAIR = '{"prompt": "What is the opposite of hot?", "chosen": "It is cold.", "rejected": "c"}\n'


def bad(*keys: str) -> str:
    """Overrides that read the file whose fourth row is bad at these keys."""
    return " & ".join(f"{key}=[{{path: bad.jsonl}}]" for key in keys)


@pytest.mark.parametrize(
    ("stage", "override", "told"),
    [
        ("sft", "sft.train=[{path: missing.jsonl}]", "missing.jsonl"),
        ("sft", bad("sft.train"), "bad.jsonl, line 4"),
        ("sft", "sft.dialogues_per_step=15 & sft.microbatch_size=4", "does not divide"),
        ("tokenizer", bad("tokenizer.train"), "bad.jsonl, line 4"),
        ("pretrain", bad("pretrain.train"), "bad.jsonl, line 4"),
        ("pretrain", bad("pretrain.validation"), "bad.jsonl, line 4"),
        ("reward", f"{bad('reward.collect.prompts')} & reward.collect.labeller=person", "bad.jsonl, line 4"),
        ("reward", "reward.collect=null & reward.train=[{path: pairs.jsonl}] & reward.test=[{path: pairs.jsonl}] "
            "& reward.max_tokens=8", "no comparison of at most 8 tokens"),
        ("ppo", bad("ppo.prompts"), "bad.jsonl, line 4"),
        ("ppo", "ppo.ptx={train: [{path: bad.jsonl}]}", "bad.jsonl, line 4"),
        ("ppo", "ppo.ptx={train: [{path: texts.jsonl}], sequence_length: 256}", "ptx.sequence_length is 256"),
        ("ppo", "ppo.sampling.max_tokens=160", "no prompt leaves room"),
        ("ppo", "ppo.doctor.off=[entropy_colapses]", "did you mean entropy_collapses"),
        ("ppo", "ppo.layout=shared & ppo.critic_from=reward", "in layout shared"),
        ("evaluate", bad("evaluate.texts"), "bad.jsonl, line 4"),
        ("evaluate", bad("evaluate.comparisons"), "bad.jsonl, line 4"),
    ],
)  # fmt: skip
def test_what_a_run_would_refuse_is_refused(
    tmp_path: Path, finished_chain: Path, monkeypatch: pytest.MonkeyPatch, stage: StageName, override: str, told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = {"bad": GOOD.replace("completion", "text") * 3 + "{}\n", "pairs": PAIR * 3, "texts": '{"text": "a"}\n'}
    if stage == "sft":
        rows["bad"] = GOOD * 3 + "{}\n"
    if "comparisons" in override:
        rows["bad"] = PAIR * 3 + "{}\n"
    for name, text in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    recipe = load_recipe(str(TINY_RECIPE), override.split(" & "))
    with pytest.raises(RlhfError, match=told):
        run_plan(recipe, (stage,), finished_chain / "runs", Machine(1, 0), as_json=False)


def recipe_on(base: Path, data: Path, *overrides: str) -> Recipe:
    """SFT, reward and PPO on a base with a few rows."""
    for name, row in {"chats": GOOD, "pairs": PAIR}.items():
        (data / f"{name}.jsonl").write_text(row * 20)
    chats, pairs = "[{path: chats.jsonl}]", "[{path: pairs.jsonl}]"
    read = {"sft.train": chats, "sft.validation": chats, "reward.train": pairs, "reward.test": pairs}
    read |= {"ppo.prompts": pairs, "ppo.test_prompts": pairs, "stages": "[sft, reward, ppo]"}
    small = ["sft.steps=3", "sft.dialogues_per_step=4", "sft.max_tokens=64", "sft.sampling.max_tokens=8"]
    small += ["ppo.sampling.max_tokens=8", "ppo.episodes_per_update=8", "reward.pairs_per_step=4"]
    said = [f"{key}={value}" for key, value in read.items()]
    return load_recipe("align", [f"base={base}", f"data.root={data}", *said, *small, *overrides])


def saved(folder: Path, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A base of random weights."""
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TINY: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4),  # no cache of slots holds its states
        Gemma2Config(**TINY, **HEADS, head_dim=8, sliding_window=32),  # what is behind its head reads no hidden states
        MixtralConfig(**TINY, **HEADS, num_local_experts=4),
    ],
    ids=lambda config: config.model_type,
)
def test_odd_models_are_planned(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_on(saved(tmp_path / "base", config, tokenizer), tmp_path, "ppo.layout=shared")
    run_plan(recipe, recipe.stages, tmp_path, Machine(1, 0), as_json=True)
    found = json.loads(capsys.readouterr().out)["stages"]
    assert all(stage["memory_mib"] > 100 and not stage["unchecked"] for stage in found.values())


def test_a_model_that_cannot_be_gone_through_is_said_to_be_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def numbers(*_: object, **__: object) -> None:
        raise RuntimeError("it wants numbers")

    monkeypatch.setattr("stages.plan.pretrain.TokenLoss.forward", numbers)
    run_plan(load_recipe(str(TINY_RECIPE)), ("pretrain",), tmp_path, Machine(1, 0), as_json=True)
    plan = json.loads(capsys.readouterr().out)["stages"]["pretrain"]
    assert plan["memory_mib"] is None and plan["fits"] is None and "it wants numbers" in plan["unchecked"][0]


def test_what_a_base_cannot_do_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    base = saved(tmp_path / "base", LlamaConfig(**TINY, **HEADS), tokenizer)

    def refused(told: str, stage: StageName, *overrides: str, of: Path = base) -> None:
        with pytest.raises(RlhfError, match=told):
            run_plan(recipe_on(of, tmp_path, *overrides), (stage,), tmp_path, Machine(1, 0), as_json=False)

    refused("sft.max_tokens is 200, more than the model's context of 128", "sft", "sft.max_tokens=200")
    refused("has no chat template", "reward", "stages=[reward, ppo]")
    small = saved(tmp_path / "small", LlamaConfig(**{**TINY, "vocab_size": 300}, **HEADS), tokenizer)
    refused("384 tokens, its model 300 embeddings", "sft", of=small)
    granite = saved(tmp_path / "granite", GraniteConfig(**TINY, **HEADS), tokenizer)
    refused("no sequence classifier for granite", "reward", of=granite)
    (base / "model.safetensors").unlink()
    refused("no weights", "sft")
    recipe = recipe_on(small, tmp_path, "sft.lora={quantised: nf4}")
    with pytest.raises(RlhfError, match="can't lie in pieces"):
        run_plan(recipe, ("sft",), tmp_path, Machine(2, 0, sharded=True), as_json=False)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_is_planned_where_that_is_allowed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("nobody is to be asked"))
    base = saved(tmp_path / "base", LlamaConfig(**TINY, **HEADS), tokenizer)
    (base / "own.py").write_text(OWN_CODE)
    config = json.loads((base / "config.json").read_text())
    brought = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": brought}))
    recipe = recipe_on(base, tmp_path, f"trust_remote_code=[{base}]")
    run_plan(recipe, ("sft",), tmp_path, Machine(1, 0), as_json=False)
    with pytest.raises(RlhfError, match="no sequence classifier for own"):
        run_plan(recipe, ("reward",), tmp_path, Machine(1, 0), as_json=False)
    with pytest.raises(RlhfError, match="custom code"):
        run_plan(recipe_on(base, tmp_path), ("sft",), tmp_path, Machine(1, 0), as_json=False)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{hub: FOLDER}", "train.jsonl, line 2|row 2"),
        ("{hub: FOLDER, split: train_sft}", "train_sft"),
        ("{hub: /nowhere/at/all}", "/nowhere/at/all"),
    ],
)
def test_faults_of_a_folder_in_the_hubs_shape_are_the_users(tmp_path: Path, source: str, told: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl").write_text(GOOD + '{"prompt": "a", "completion": ""}\n')
    recipe = load_recipe(str(TINY_RECIPE), [f"tokenizer.train=[{source.replace('FOLDER', str(folder))}]"])
    with pytest.raises(RlhfError, match=told):
        run_plan(recipe, ("tokenizer",), tmp_path, Machine(1, 0), as_json=False)
    far = load_recipe(str(TINY_RECIPE), ["tokenizer.train=[{hub: no/such}]"])
    run_plan(far, ("tokenizer",), tmp_path, Machine(1, 0), as_json=False)  # nobody can tell


def test_what_will_be_redone_is_planned_anew(finished_chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wider model: pretrain is stale, and all that stands on it, whose models are those that will be."""
    recipe = load_recipe(str(TINY_RECIPE), ["model.width=64"])
    run_plan(recipe, recipe.stages, finished_chain / "runs", Machine(1, 0), as_json=False)
    said = capsys.readouterr().out
    assert "tokenizer: done, would be skipped" in said
    assert "pretrain: would be redone, since model.width: 32 -> 64" in said
    assert said.count("isn't done (the old one is moved aside)") == 4  # sft, reward, ppo, evaluate
    made = plan_stage(context("model.width=64"), "pretrain").parameters
    assert said.count(f" {made:,} parameters") == 4  # the four causal LMs
    run_plan(recipe, ("ppo",), finished_chain / "runs", Machine(1, 0), as_json=False)
    assert "ppo: can't run yet: the stage sft, which it stands on, is stale" in capsys.readouterr().out
    same = load_recipe(str(TINY_RECIPE))
    run_plan(same, ("sft",), finished_chain / "runs", Machine(1, 0), as_json=False, fresh=True)
    assert "sft: would be redone, since --fresh" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_a_base_to_chat_with_is_asked_for_before_anything_runs(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, chat_tokenizer: PreTrainedTokenizerBase, stage: StageName
) -> None:
    build_causal_lm(
        LlamaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    (tmp_path / "judge.py").write_text("def judge(rows):\n    return [0.0] * len(rows)\n")
    tokenizer.save_pretrained(tmp_path)
    judge = "ppo.judge=[{python: judge.py:judge}]"
    planned = context(f"base={tmp_path}", f"data.root={tmp_path}", f"stages=[{stage}]", judge)
    with pytest.raises(UserError, match="has no chat template; run the stage sft first, or name a chat model as base"):
        plan_stage(planned, stage)
    one_token = copy.deepcopy(chat_tokenizer)
    one_token.pad_token = one_token.eos_token
    one_token.save_pretrained(tmp_path)
    if stage == "ppo":
        with pytest.raises(UserError, match=r"has one token, '<\|end\|>', as pad and as end token; run the stage sft"):
            plan_stage(planned, stage)
    else:
        assert plan_stage(planned, stage).memory


def test_parameters_are_counted_once() -> None:
    with tracing():
        model = build_causal_lm(LlamaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
        assert count_parameters(model) == sum(p.numel() for p in model.parameters())
