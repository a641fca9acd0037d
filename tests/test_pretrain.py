"""Pretraining's parts against naive ones."""

import copy
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from rlhf import runtime
from rlhf.checkpoint import copy_tree
from rlhf.data.tokens import PackedTokens, ReplayedTokens, pack
from rlhf.errors import RecipeError, StageFailed, UserError
from rlhf.functional.compute_optimal import inner_parameters, shape_of_depth, training_of
from rlhf.functional.schedules import learning_rate_share
from rlhf.functional.spikes import RECENT, usual_loss
from rlhf.model import build_causal_lm, causal_lm_config, checkpoint_layers, count_parameters, decay_groups
from rlhf.recipe import PretrainSection, Recipe, SpikesSection, dump_recipe, parse_recipe, result_fields
from rlhf.runtime import uses_bfloat16
from rlhf.sharding import Moving
from rlhf.team import Team
from stages.pretrain import loss as loss_module
from stages.pretrain.loss import TokenLoss, positions_in_documents
from stages.pretrain.plan import Plan
from stages.pretrain.speed import flops_per_token, peak_flops
from stages.pretrain.spikes import Guard
from stages.pretrain.training import Training

VOCABULARY, BEGIN = 50, 1


class OneProcess:
    """An Accelerator's face for one process."""

    device = torch.device("cpu")


def make_model(architecture: str, sliding: bool = False, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    config = causal_lm_config(
        architecture,
        vocab_size=VOCABULARY,
        layers=2,
        width=32,
        heads=2,
        kv_heads=None,
        mlp_width=None,
        context=64,
        rope_theta=1e4,
        initializer_range=0.2,
        sliding_window=3 if sliding else None,
        sliding_layers=(0,) if sliding else (),
        tie_embeddings=tied,
        special={"bos_token_id": BEGIN, "eos_token_id": 2, "pad_token_id": 0},
    )
    return build_causal_lm(config, "wide").eval()


def packed_in(folder: Path, name: str = "tokens.bin", seed: int | None = 3, first: int = 3) -> PackedTokens:
    rng = np.random.default_rng(0)
    documents = ([BEGIN, *map(int, rng.integers(first, VOCABULARY, n))] for n in rng.integers(3, 12, 60))
    pack(((ids, len(ids)) for ids in documents), folder / name, VOCABULARY)
    return PackedTokens(folder / name, VOCABULARY, 16, seed=seed)


@pytest.fixture
def packed(tmp_path: Path) -> PackedTokens:
    return packed_in(tmp_path)


def section(**more: Any) -> PretrainSection:
    source = [{"builtin": "tinyworld", "rows": 10}]
    needed = {"train": source, "validation": source, "tokens": 1000, "tokens_per_step": 100, "sequence_length": 10}
    return PretrainSection.model_validate({**needed, "learning_rate": 1.0, **more})


# The plan


def test_learning_rate_by_hand() -> None:
    # 10 steps, peak 1, 20 % warm-up = 2 steps, floor 0.1; step 6 is halfway down the cosine: 0.1 + 0.9 / 2
    plan = Plan(section(warmup=0.2))
    rates = [plan.learning_rate(step) for step in range(10)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.55)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0.1 < rates[9] < 0.15


def test_each_schedule_by_hand() -> None:
    # warm-up to 20 of 100 tokens; at 60 half of the way down is gone
    def at(start: int, name: Any) -> float:
        return learning_rate_share(start, start + 10, 20, 100, name, floor=0.2, decay=0.4)

    for name in ("cosine", "linear", "wsd", "constant"):
        assert at(0, name) == pytest.approx(0.5)
        assert at(10, name) == at(20, name) == pytest.approx(1.0)
    assert at(60, "linear") == pytest.approx(0.6)
    assert at(60, "cosine") == pytest.approx(0.6)
    assert at(40, "linear") == pytest.approx(0.8)
    assert at(40, "cosine") == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)
    assert at(60, "wsd") == pytest.approx(1.0)  # stable up to 60
    assert at(70, "wsd") == pytest.approx(1 - 0.8 * 0.25**0.5)  # a quarter of its fall is behind it
    assert [at(100, name) for name in ("linear", "cosine", "wsd")] == pytest.approx([0.2] * 3)
    assert at(90, "constant") == 1.0


def test_a_ramp_by_hand() -> None:
    # rows of 10; steps of 20, 40, 60, then 80 tokens; an even growth from 20 to 80 over 120 tokens reaches 40 at 40
    # tokens, 60 at 80, 80 at 120: two steps of 20, one of 40, one of 60 (it begins below 120, and ends at 140), then 80
    plan = Plan(section(tokens=500, tokens_per_step=80, ramp={"from": 20, "tokens": 120}))
    rows = [plan.part_of(step).rows for step in range(plan.steps)]
    assert rows == [2, 2, 4, 6, 8, 8, 8, 8, 8]
    assert [plan.rows_before(step) for step in range(plan.steps + 1)] == [0, 2, 4, 8, 14, 22, 30, 38, 46, 54]
    assert plan.tokens == 540


@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 4000), st.integers(1, 6000))
def test_a_ramp_never_loses_a_token(unit: int, times: int, over: int, tokens: int) -> None:
    plan = Plan(section(tokens=tokens, tokens_per_step=10 * unit * times, ramp={"from": 10 * unit, "tokens": over}))
    done, step = 0, 0
    while done < tokens:  # the rule as its docstring says it, a step at a time
        grown = 10 * unit + (10 * unit * times - 10 * unit) * min(1.0, done / over)
        size = min(times, max(1, int(grown // (10 * unit) + 1e-9)))
        assert plan.part_of(step).rows in (size * unit, (size - 1) * unit)  # rounding at the very edge
        assert plan.rows_before(step) * 10 == done
        done += plan.part_of(step).rows * 10
        step += 1
    assert (plan.steps, plan.tokens) == (step, done)


def test_the_rate_follows_the_root_of_the_batch() -> None:
    common = {"tokens": 400, "tokens_per_step": 80, "schedule": "constant", "warmup": 0.0}
    plain = Plan(section(**common, ramp={"from": 20, "tokens": 100}))
    root = Plan(section(**common, ramp={"from": 20, "tokens": 100, "learning_rate": "square_root"}))
    assert plain.learning_rate(1) == 1.0
    assert root.learning_rate(1) == pytest.approx((root.part_of(1).rows / 8) ** 0.5)
    assert root.learning_rate(root.steps - 1) == 1.0


# The rows


def test_rows_as_given_stand_as_in_the_file(tmp_path: Path) -> None:
    packed = packed_in(tmp_path, seed=None)
    flat = np.fromfile(tmp_path / "tokens.bin", dtype=np.uint16)
    inputs, targets = packed.batch(range(packed.rows + 2))
    assert inputs[1].tolist() == flat[16:32].tolist()
    assert targets[1].tolist() == flat[17:33].tolist()
    assert inputs[packed.rows :].tolist() == inputs[:2].tolist()  # the next pass


def test_replayed_rows_come_in_their_share_and_none_is_left_out(tmp_path: Path) -> None:
    new, old = packed_in(tmp_path, "new", None), packed_in(tmp_path, "old", None, first=30)
    mixed = ReplayedTokens(new, old, 0.3)
    inputs, targets = mixed.batch(range(50))
    naive_new = iter(new.batch(range(50))[0].tolist())
    naive_old = iter(old.batch(range(50))[0].tolist())
    owed = 0.0
    for number, row in enumerate(inputs.tolist()):
        owed += 0.3
        from_old = round(owed, 9) >= 1
        owed -= from_old
        assert row == next(naive_old if from_old else naive_new), number
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    parts = [mixed.batch(range(7, 20))[0], mixed.batch(range(20, 31))[0]]
    assert torch.equal(torch.cat(parts), inputs[7:31])


def test_positions_begin_anew_with_each_document() -> None:
    ids = torch.tensor([[7, 8, BEGIN, 5, 6, BEGIN, 9], [BEGIN, 4, 4, 4, BEGIN, BEGIN, 3]])
    assert positions_in_documents(ids, BEGIN).tolist() == [[0, 1, 0, 1, 2, 0, 1], [0, 1, 2, 3, 0, 0, 1]]


@pytest.mark.parametrize(("architecture", "sliding"), [("llama", False), ("qwen3", True), ("gpt2", False)])
def test_an_isolated_document_has_the_logits_it_has_alone(architecture: str, sliding: bool) -> None:
    model = make_model(architecture, sliding)
    first, second = torch.tensor([[BEGIN, 5, 6, 7, 8]]), torch.tensor([[BEGIN, 9, 10, 11]])
    row = torch.cat([first, second], 1)
    with torch.no_grad():
        isolated = model(input_ids=row, position_ids=positions_in_documents(row, BEGIN), use_cache=False).logits
        together = model(input_ids=row, use_cache=False).logits
        torch.testing.assert_close(isolated[:, :5], model(first, use_cache=False).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(isolated[:, 5:], model(second, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert (together[:, 5:] - isolated[:, 5:]).abs().max() > 0.01


# The loss and its gradient


def bare_training(model: PreTrainedModel, rows: PackedTokens, microbatch: int, begin: int | None, z: float) -> Training:
    """A training without the stage around it."""
    training = object.__new__(Training)
    training.rows, training.microbatch, training.begin = rows, microbatch, begin
    training.accelerator = OneProcess()  # type: ignore[assignment]
    training.moving = Moving(TokenLoss(model, z), {})
    training._waited = 0.0
    return training


@pytest.mark.parametrize(("begin", "z", "sliced"), [(None, 0.0, False), (BEGIN, 0.01, False), (BEGIN, 0.01, True)])
def test_a_steps_gradient_is_that_of_the_mean_over_its_tokens(
    packed: PackedTokens, begin: int | None, z: float, sliced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In microbatches, uneven ones too, and with logits made in parts of 7 tokens."""
    if sliced:
        monkeypatch.setattr(loss_module, "LOGITS_BYTES", 4 * VOCABULARY * 7)
    found = []
    for size in (1, 3, 4):
        model = make_model("llama").double()
        loss = bare_training(model, packed, size, begin, z).add_gradient(range(8, 12))
        found.append((float(loss), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    naive = make_model("llama").double()
    inputs, targets = packed.batch(range(8, 12))
    nats = extra = torch.zeros((), dtype=torch.float64)
    for row, target in zip(inputs, targets, strict=True):
        starts = [0, *[i for i in range(1, 16) if begin is not None and row[i] == begin], 16]
        for start, end in pairwise(starts):  # every document on its own
            logits = naive(input_ids=row[start:end].unsqueeze(0), use_cache=False).logits[0]
            nats = nats + cross_entropy(logits, target[start:end], reduction="sum")
            extra = extra + z * sum(each.exp().sum().log() ** 2 for each in logits)
    ((nats + extra) / targets.numel()).backward()
    mean = float(nats.detach()) / targets.numel()
    expected = [p.grad for p in naive.parameters() if p.grad is not None]
    for loss_value, gradients in found:
        assert loss_value == pytest.approx(mean, rel=1e-6)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_gradient_checkpointing_changes_no_gradient(packed: PackedTokens) -> None:
    found = []
    for checkpointing in (False, True):
        model = make_model("qwen3").train()
        if checkpointing:
            checkpoint_layers(model, "a key")
        bare_training(model, packed, 4, None, 0.0).add_gradient(range(4))
        found.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = make_model("gpt2")
    decayed, free = decay_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


# Speed


def test_flops_by_hand() -> None:
    tied, untied = make_model("llama"), make_model("llama", tied=False)
    attention = 12 * 2 * 32 * 16  # two layers, width 32, rows of 16
    assert flops_per_token(tied, 16) == 6 * count_parameters(tied) + attention
    assert flops_per_token(untied, 16) == flops_per_token(tied, 16)  # a second table that is only looked up
    local = make_model("qwen3", sliding=True)  # its first layer sees 3 tokens
    assert flops_per_token(local, 16) == 6 * count_parameters(local) + 12 * 32 * (3 + 16)
    gpt2 = make_model("gpt2")
    assert flops_per_token(gpt2, 16) == 6 * (count_parameters(gpt2) - 64 * 32) + attention


def test_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model("gpt2").train()
    ids = torch.randint(3, VOCABULARY, (2, 16))
    with FlopCounterMode(display=False) as counter:
        TokenLoss(model, 0.0)(ids, ids).objective.backward()
    # 1-2 %: norms and biases are parameters that no matrix product has, and attention's backward is counted apart
    assert counter.get_total_flops() / ids.numel() == pytest.approx(flops_per_token(model, 16), rel=0.1)


def test_the_machine_has_a_peak() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e14


# Spikes


def test_usual_losses_by_hand() -> None:
    # median 3; from step to step 2 1 2 97: their median 2
    usual = usual_loss([1.0, 3.0, 2.0, 4.0, 101.0], deviations=2.0, rise=0.5)
    assert usual.median == 3.0
    assert usual.deviation == pytest.approx(1.4826 * 2**0.5)
    assert usual.limit == pytest.approx(3.0 + 2 * 1.4826 * 2**0.5)
    assert usual_loss([1.0, 1.0], deviations=8.0, rise=0.5).limit == 1.5
    normal = np.random.default_rng(0).normal(5.0, 0.3, 20_000)
    assert usual_loss(normal.tolist(), 1.0, 0.0).deviation == pytest.approx(0.3, rel=0.03)
    falling = usual_loss([10 - 0.05 * step for step in range(100)], deviations=8.0, rise=0.0)
    assert falling.limit < 10 - 0.05 * 80  # not taken in by what the loss was long ago


def guard_of(steps: int = 1000, **settings: Any) -> Guard:
    return Guard(SpikesSection(good_every=10, **settings), guessing=20.0, steps=steps)


def test_a_spike_is_above_the_limit_or_no_number() -> None:
    guard = guard_of(rise=0.5)
    for _ in range(RECENT):
        assert guard.fault(50.0, 1.0) == ""  # too early to tell
        guard.passed(2.0)
    assert guard.fault(2.5, 1.0) == ""
    assert "2.510" in guard.fault(2.51, 1.0)
    assert "nan" in guard.fault(float("nan"), 1.0)
    assert "inf" in guard.fault(2.0, float("inf"))
    ignoring = guard_of(action="ignore")
    assert ignoring.fault(float("nan"), 1.0) == ""


def test_no_more_is_skipped_than_the_training_is_long() -> None:
    behind = []
    for steps in (4, 1000):
        guard = guard_of(steps)
        guard.keep(lambda: {"step": 0, "place": 0})
        behind.append(guard.back(2, "why", place=16, rows=8).behind)
    assert behind == [16 + 8 + 4 * 8, 16 + 8 + 10 * 8]


def test_a_loss_far_beyond_guessing_is_a_spike_at_any_step() -> None:
    guard = guard_of()
    assert guard.fault(60.0, 1.0) == ""
    assert "3 times that of guessing" in guard.fault(60.1, 1.0)


def state_at(step: int) -> dict[str, Any]:
    return {"step": step, "place": 4 * step}


def test_it_goes_back_to_the_last_state_that_was_followed_by_another() -> None:
    guard = guard_of()
    for step in (0, 10, 20):
        assert guard.wants_state(step)
        guard.keep(partial(state_at, step))
        assert not guard.wants_state(step)
        assert not guard.wants_state(step + 5)
    back = guard.back(23, "cause", place=92, rows=4)
    assert back.step == 10
    assert back.behind == 92 + 4 + 10 * 4  # the spike's own rows, and ten steps' more
    assert back.record["skipped_rows"] == [40, 136]


def test_each_rollback_in_a_row_skips_twice_as_much_until_it_gives_up() -> None:
    guard = guard_of(most_in_a_row=3)
    guard.keep(partial(state_at, 0))
    guard.keep(partial(state_at, 10))
    skipped = [guard.back(12, "cause", place=0, rows=1).behind for _ in range(3)]
    assert skipped == [11, 21, 41]
    with pytest.raises(StageFailed, match="after 3 rollbacks in a row"):
        guard.back(12, "cause", place=0, rows=1)


def test_getting_past_the_spike_ends_the_row() -> None:
    guard = guard_of(most_in_a_row=2)
    guard.keep(partial(state_at, 0))
    guard.back(12, "cause", place=0, rows=1)
    guard.keep(partial(state_at, 10))  # not past it yet
    guard.back(12, "cause", place=0, rows=1)
    guard.keep(partial(state_at, 10))
    guard.keep(partial(state_at, 20))
    assert guard.back(21, "cause", place=0, rows=1).record["in_a_row"] == 1
    assert [record["in_a_row"] for record in guard.rollbacks] == [1, 2, 1]


def test_a_guard_goes_on_from_its_state() -> None:
    first, second = guard_of(), guard_of()
    for step in range(40):
        if first.wants_state(step):
            first.keep(partial(state_at, step))
        first.passed(2.0 + step % 3)
    second.load(copy.deepcopy(first.state()))
    assert second.fault(90.0, 1.0) == first.fault(90.0, 1.0) != ""
    assert second.back(40, "c", 160, 4) == first.back(40, "c", 160, 4)
    assert second.state() == first.state()


def test_stop_ends_the_stage() -> None:
    guard = guard_of(action="stop")
    assert not guard.wants_state(0)
    with pytest.raises(StageFailed, match="a spike at step 3: cause"):
        guard.back(3, "cause", 0, 1)


def test_a_copied_tree_is_its_own() -> None:
    weight = torch.ones(2)
    tree = {"a": [weight, (1, "x")], "b": None}
    copied = copy_tree(tree)
    weight.zero_()
    assert copied["a"][0].tolist() == [1.0, 1.0]
    assert copied["a"][1] == (1, "x")
    assert Team().add([2.0]) == [2.0]


# One dial


def test_the_shape_and_training_of_a_depth_by_hand() -> None:
    assert shape_of_depth(12) == (12, 768, 12, 2048)  # GPT-2's shape; 1,536 tokens of context, up to a power of two
    assert shape_of_depth(3).context == 512
    inner = inner_parameters(12, 768, 2048, gated=True)
    assert inner == 12 * (4 * 768**2 + 3 * 768 * 2048)
    tokens, per_step, rate = training_of(inner, 50304 * 768, 2048)
    assert tokens == 20 * (inner + 50304 * 768)
    # the Step Law by logarithms: 0.58 exp(0.571 ln 2.47e9) = 133,000 = 65 rows; 1.79 exp(-0.713 ln 8.49e7 + 0.307 ln D)
    assert per_step == 64 * 2048
    assert rate == pytest.approx(1.79 * np.exp(-0.713 * np.log(inner) + 0.307 * np.log(tokens)), rel=0.02)


@pytest.mark.parametrize(("architecture", "kv_heads"), [("llama", None), ("qwen3", 1), ("gpt2", None)])
def test_inner_parameters_are_those_of_the_model(architecture: str, kv_heads: int | None) -> None:
    config = causal_lm_config(
        architecture, vocab_size=VOCABULARY, layers=3, width=64, heads=2, kv_heads=kv_heads, mlp_width=160, context=32,
        rope_theta=1e4, initializer_range=0.02, sliding_window=None, sliding_layers=(), tie_embeddings=True, special={},
    )  # fmt: skip
    model = build_causal_lm(config)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2 and id(p) not in tables)
    gated = architecture != "gpt2"
    assert inner_parameters(3, 64, 160, gated, (kv_heads or 2) / 2) == matrices


def test_a_recipe_follows_from_its_depth_where_it_says_nothing_else() -> None:
    source = [{"builtin": "tinyworld", "rows": 10}]
    raw: dict[str, Any] = {
        "name": "dial",
        "stages": ["tokenizer", "pretrain"],
        "tokenizer": {"train": source, "vocab_size": 50304},
        "model": {"depth": 12},
        "pretrain": {"train": source, "validation": source},
    }
    recipe = parse_recipe(raw, "here")
    assert recipe.pretrain is not None
    assert (recipe.model.layers, recipe.model.width, recipe.model.heads, recipe.model.context) == (12, 768, 12, 2048)
    expected = training_of(inner_parameters(12, 768, 2048, True), 50304 * 768, 2048)
    found = recipe.pretrain
    assert (found.tokens, found.tokens_per_step, found.learning_rate) == expected
    assert found.sequence_length == 2048
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)), "here")
    assert again == recipe
    written = yaml.safe_load(dump_recipe(recipe))
    del written["model"]["depth"]  # all that follows from it is there, and decides
    assert result_fields(parse_recipe(written, "here").model) == result_fields(recipe.model)
    raw["model"] |= {"width": 512, "heads": 8, "context": 1024}
    raw["pretrain"] |= {"learning_rate": 0.5, "tokens": 10**9}
    mine = parse_recipe(raw, "here")
    assert mine.pretrain is not None
    assert (mine.model.layers, mine.model.width, mine.pretrain.learning_rate, mine.pretrain.tokens) == (
        12,
        512,
        0.5,
        10**9,
    )
    assert mine.pretrain.sequence_length == 1024
    assert mine.pretrain.tokens_per_step == 2 ** round(np.log2(0.58 * 1e9**0.571 / 1024)) * 1024


def test_heads_follow_a_width_of_ones_own() -> None:
    source = [{"builtin": "tinyworld", "rows": 10}]

    def heads(**model: int) -> int:
        sections = {"model": {"depth": 3, **model}, "pretrain": {"train": source, "validation": source}}
        raw = {"name": "dial", "stages": ["tokenizer", "pretrain"], "tokenizer": {"train": source}, **sections}
        return parse_recipe(raw, "here").model.heads

    assert heads() == 3
    assert heads(width=256) == 4  # of 64 channels each; 3 don't divide 256
    assert heads(width=384) == 6
    assert heads(width=256, heads=8) == 8
    assert heads(width=96) == 3


def test_an_editor_asks_for_nothing_that_depth_gives() -> None:
    assert Recipe.model_json_schema()["$defs"]["PretrainSection"]["required"] == ["train", "validation"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"depth": 0}}, "greater than or equal to 1"),
        ({"model": {"depth": "deep"}}, "model.depth"),
        ({"model": {"layers": 2}}, "pretrain.tokens: missing"),
        ({"base": "some/model"}, "either `base`, whose tokenizer is kept, or the stage tokenizer"),
        ({"stages": ["pretrain"]}, "come together, or `base` names the model"),
        ({"stages": ["pretrain"], "base": "x"}, "with `base` the architecture is the base's"),
        ({"model": {"depth": 2}, "pretrain.replay": {"share": 0.5}}, "train: missing"),
        ({"pretrain.ramp": {"from": 100, "tokens": 10}}, "ramp.from 100 must be a multiple"),
        ({"pretrain.schedule": "wsd", "pretrain.warmup": 0.9}, "more than all tokens"),
        ({"pretrain.schedule": "wds"}, "did you mean 'wsd'"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], words: str) -> None:
    source = [{"builtin": "tinyworld", "rows": 10}]
    raw: dict[str, Any] = {
        "name": "dial",
        "stages": ["tokenizer", "pretrain"],
        "tokenizer": {"train": source},
        "model": {"depth": 2},
        "pretrain": {"train": source, "validation": source},
    }
    for key, value in change.items():
        section, _, field = key.partition(".")
        if field:
            raw[section] = {**raw[section], field: value}
        else:
            raw[key] = value
    with pytest.raises(RecipeError, match=re.escape(words)):
        parse_recipe(raw, "here")


def test_two_validation_sources_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two sources are called builtin:tinyworld"):
        section(validation=[{"builtin": "tinyworld", "rows": 1}, {"builtin": "tinyworld", "rows": 2}])


def test_bfloat16_is_for_hardware_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not uses_bfloat16("auto")  # these tests run without a GPU
    monkeypatch.setattr(runtime, "_cpu_has_bfloat16", lambda: False)
    with pytest.raises(UserError, match="no hardware for bfloat16"):
        uses_bfloat16("bfloat16")
    monkeypatch.setattr(runtime, "_cpu_has_bfloat16", lambda: True)
    assert uses_bfloat16("bfloat16")
    assert not uses_bfloat16("float32")
