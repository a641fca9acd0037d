"""What PPO consists of beside its arithmetic: microbatches, the policy that is kept, the doctor, adapters."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.errors import RecipeError
from rlhf.functional.intervals import mean_estimate
from rlhf.model import disable_dropout, end_ids
from rlhf.recipe import PpoSection
from rlhf.rollout import Response
from rlhf.tokenizer import Messages
from stages.gold import best_gold, gold_rewards
from stages.ppo.course import best_of_points
from stages.ppo.doctor import KNOWN, SIGNS, Doctor
from stages.ppo.episodes import Episode, Prompt, microbatches_of
from stages.ppo.keep import Keeper, Point, choose
from stages.ppo.measure import Measured
from tests.conftest import TINY_RECIPE, rlhf


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_microbatches_hold_every_row_once_within_the_budget(ranks: int) -> None:
    lengths = [random.Random(3).randint(5, 60) for _ in range(40)]
    parts = microbatches_of(lengths, tokens=130, most=4, ranks=ranks)
    assert sorted(row for part in parts for row in part) == list(range(40))
    for part in parts:
        for rank in range(ranks):
            mine = part[rank::ranks]
            assert len(mine) <= 4
            assert len(mine) * max(lengths[row] for row in part) <= 130
    assert microbatches_of([50, 70], tokens=10, most=9, ranks=1) == [[1], [0]]  # a row that is too long stands alone


# Which policy is kept

COURSE = [
    Point(0, 0.0, 9.9, 0.2, 0.9, 10.0, 0.1, 1.0),  # a score that not ending costs most of
    Point(5, 1.0, 0.5, 0.9, 0.1, 10.0, 0.5, 1.0),
    Point(10, 2.0, 0.8, 0.9, 0.2, 10.0, 0.8, 1.0),
    Point(15, 4.0, 1.5, 0.3, 0.3, 10.0, 1.5, 1.0),
]


@pytest.mark.parametrize(
    ("rule", "budget", "expected"),
    [
        ("score", None, 15),
        ("score", 2.0, 10),
        ("score", 0.5, 0),
        ("second_judge", None, 5),  # the first of equal ones
        ("second_judge", 0.5, 0),
        ("last", None, 15),
        ("last", 3.0, 10),
    ],
)
def test_the_rule_chooses_by_judges_and_kl_alone(rule: str, budget: float | None, expected: int) -> None:
    assert choose(COURSE, rule, budget).update == expected
    turned = [point._replace(gold=None if point.update else 5.0) for point in COURSE]
    assert choose(turned, rule, budget).update == expected


SMALL_SECTION = {
    "prompts": [{"builtin": "tinyworld"}],
    "test_prompts": [{"builtin": "tinyworld"}],
    "updates": 1,
    "episodes_per_update": 4,
    "sampling": {"max_tokens": 4},
    "learning_rate": 1.0,
}


class FakeActors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.policy, self.critic = nn.Linear(2, 2), nn.Linear(2, 1)

    def policy_parameters(self) -> list[nn.Parameter]:
        return list(self.policy.parameters())


def test_the_weights_that_are_kept_are_those_of_the_best_point(tmp_path: Path) -> None:
    section = PpoSection.model_validate(SMALL_SECTION)
    actors: Any = FakeActors()
    checkpoints = tmp_path / "checkpoints"
    keeper = Keeper(section, actors, tmp_path / "kept", checkpoints, writes=True)
    scores = [0.0, 1.0, 3.0, 2.0, 4.0, 1.0]
    for update, score in enumerate(scores):
        nn.init.constant_(actors.policy.weight, float(update))
        nn.init.constant_(actors.critic.weight, float(update))
        if update == 3:  # from here on a run goes on at update 3 at the earliest
            (checkpoints / "step-3").mkdir(parents=True)
        assert keeper.add(Point(update, 0.0, score, None, None, 1.0, score, 1.0)) == (update in (0, 1, 2, 4))
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "update-2.safetensors",
        "update-4.safetensors",
    ]
    assert set(load_file(tmp_path / "kept/update-4.safetensors")) == {"policy.weight", "policy.bias"}
    again = Keeper(section, actors, tmp_path / "kept", checkpoints, writes=True)
    again.load(json.loads(json.dumps(keeper.state())))
    assert again.restore().update == 4
    assert actors.policy.weight[0, 0].item() == 4.0
    assert actors.critic.weight[0, 0].item() == 5.0  # the critic isn't kept


def test_weights_of_a_course_that_was_given_up_are_not_taken_for_the_best(tmp_path: Path) -> None:
    section = PpoSection.model_validate(SMALL_SECTION)
    actors: Any = FakeActors()
    (tmp_path / "checkpoints/step-0").mkdir(parents=True)

    def keep(keeper: Keeper, update: int, score: float) -> None:
        nn.init.constant_(actors.policy.weight, score)
        keeper.add(Point(update, 0.0, score, None, None, 1.0, score, 1.0))

    keeper = Keeper(section, actors, tmp_path / "kept", tmp_path / "checkpoints", writes=True)
    keep(keeper, 0, 0.0)
    begun = keeper.state()
    for update, score in ((1, 1.0), (2, 2.0), (3, 3.0)):
        keep(keeper, update, score)
    keeper.load(begun)  # back off
    for update, score in ((1, 4.0), (2, 1.0)):
        keep(keeper, update, score)
    assert keeper.restore().update == 1
    assert actors.policy.weight[0, 0].item() == 4.0
    assert {path.stem for path in (tmp_path / "kept").iterdir()} == {"update-0", "update-1"}


@pytest.mark.slow
def test_the_model_that_ppo_began_with_can_be_kept(finished_chain: Path, tmp_path: Path) -> None:
    run = with_chain(finished_chain, tmp_path, "tokenizer", "pretrain", "sft", "reward")
    for layout in ("full", "adapters"):
        more = (f"ppo.layout={layout}", "ppo.learning_rate=0.05", "ppo.keep={rule: last, kl_budget: 1e-9}")
        said = rlhf("run", "ppo", "--recipe", str(TINY_RECIPE), *more, cwd=tmp_path)
        assert "what is kept is the model that PPO began with" in said
        summary = json.loads((run / "ppo/summary.json").read_text())
        assert summary["kept_update"] == 0
        assert summary["score_after"] == summary["score_before"]
        before, after = (load_file(run / f"{stage}/model/model.safetensors") for stage in ("sft", "ppo"))
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_best_of_n_takes_the_best_by_score_and_tells_its_gold() -> None:
    def episode(score: float, gold: float | None) -> Episode:
        return Episode(Prompt([], []), Response([1], [0.0], True), score, {}, gold, [], [])

    points = best_of_points([[episode(1.0, 0.0), episode(0.0, 1.0)], [episode(5.0, 0.5), episode(7.0, 0.3)]])
    assert [(point.n, point.score, point.gold) for point in points] == [(1, 3.25, 0.45), (2, 4.0, 0.15)]
    assert best_of_points([[episode(1.0, None), episode(0.0, None)]])[0].gold is None
    mixed = best_of_points([[episode(1.0, None), episode(0.0, None)], [episode(5.0, 0.5), episode(7.0, 0.3)]])
    assert [point.gold for point in mixed] == [0.4, 0.3]
    judged = best_of_points([[episode(1.0, None), episode(0.0, None)]], [[3.0, 9.0]])
    assert [(point.second, point.gold) for point in judged] == [(6.0, None), (3.0, None)]


def test_what_was_gained_is_told_prompt_by_prompt() -> None:
    def measured(scores: list[float]) -> Measured:
        estimate = mean_estimate(scores)
        each: dict[str, list[float]] = {"score": scores, "second": [], "gold": []}
        return Measured(estimate, {}, None, estimate, estimate, estimate, None, estimate.mean, each)

    before, after = measured([-9.0, 0.0, 9.0]), measured([-8.5, 1.0, 10.5])
    gain = after.gain_over(before, "score")
    # differences 0.5, 1, 1.5: standard deviation 0.5, its mean's error 0.5 / sqrt(3) = 0.288675
    assert gain is not None
    assert gain == pytest.approx((1.0, 1 - 1.959964 * 0.288675, 1 + 1.959964 * 0.288675), abs=1e-5)
    assert after.score.low < before.score.high  # the two intervals overlap widely
    assert after.gain_over(before, "gold") is None
    assert Measured.from_facts(json.loads(json.dumps(after.facts()))) == after


# The doctor

HEALTHY = {
    "score": 0.1,
    "score_deviation": 1.0,
    "score_length_correlation": 0.2,
    "kl": 0.5,
    "kl_coefficient": 0.05,
    "approximate_kl": 0.01,
    "clip_fraction": 0.05,
    "policy_gradient_norm": 0.4,
    "critic_gradient_norm": 0.4,
    "entropy": 0.4,
    "response_tokens": 14.0,
    "ended": 1.0,
    "misplaced": 0.0,
    "drift": 1e-6,
    "explained_variance": 0.3,
}


def findings_of(updates: list[dict[str, float]], off: tuple[str, ...] = ()) -> dict[str, list[int]]:
    doctor = Doctor(off)
    for number, figures in enumerate(updates, 1):
        doctor.look(number, HEALTHY | figures)
    return doctor.found


def test_it_looks_at_what_there_is() -> None:
    assert set(KNOWN) == set(HEALTHY)


def test_it_is_silent_while_all_is_well() -> None:
    course = [
        {"score": 0.05 * i, "kl": 0.12 * i, "entropy": 0.4 - 0.014 * i, "response_tokens": 13.0 + 0.2 * i}
        for i in range(20)
    ]
    course[0]["explained_variance"] = -0.4  # a critic begins so
    course[1] |= {"score": 1e-8, "score_deviation": 1e-8}  # a judge may count in any unit
    assert findings_of(course) == {}


@pytest.mark.parametrize(
    ("name", "course"),
    [
        ("steps_too_large", [{"approximate_kl": 0.3}]),
        ("steps_too_large", [{"clip_fraction": 0.6}]),
        ("steps_too_large", [*[{}] * 5, {"policy_gradient_norm": 30.0}]),
        ("steps_too_large", [*[{"policy_gradient_norm": 0.0}] * 5, {"policy_gradient_norm": 30.0}]),
        ("kl_runs_away", [{"kl": 40.0}]),
        ("kl_costs_nothing", [{"kl_coefficient": 0.0, "kl": 0.4 * i} for i in range(1, 7)]),
        ("kl_negative", [{"kl": -0.5}] * 3),
        ("entropy_collapses", [{}, {"entropy": 0.01}]),
        ("score_follows_length", [{}, *[{"response_tokens": 20.0, "score_length_correlation": 0.9}] * 3]),
        ("longer_for_nothing", [*[{}] * 4, {"response_tokens": 24.0}]),
        ("never_ends", [{"ended": 0.1}] * 2),
        ("critic_explains_nothing", [{"explained_variance": -0.2}] * 10),
        ("judge_is_constant", [{"score_deviation": 0.0}]),
        ("judge_is_constant", [{"score": 5.0, "score_deviation": 1e-7}]),
        ("tokens_misplaced", [{"misplaced": 1.0}]),
        ("rollout_drifts", [{"drift": 0.2}]),
    ],
)
def test_it_names_what_is_wrong(name: str, course: list[dict[str, float]]) -> None:
    found = findings_of(course)
    assert set(found) == {name}
    assert found[name][-1] == len(course)
    assert findings_of(course, off=(name,)) == {}


def test_what_is_switched_off_must_exist() -> None:
    with pytest.raises(RecipeError, match=r"no finding 'entropy_colapses'.*did you mean entropy_collapses"):
        Doctor(("entropy_colapses",))


def test_it_goes_on_from_its_state() -> None:
    doctor = Doctor()
    for number in range(9):
        doctor.look(number, HEALTHY | {"explained_variance": -1.0})
    other = Doctor()
    other.load(json.loads(json.dumps(doctor.state())))
    assert [finding.name for finding in other.look(10, HEALTHY | {"explained_variance": -1.0})] == [
        "critic_explains_nothing"
    ]


# In real runs


def test_the_readme_explains_every_figure_and_every_finding(finished_chain: Path) -> None:
    text = (TINY_RECIPE.parent.parent / "README.md").read_text(encoding="utf-8")
    lines = (finished_chain / "runs/tiny/ppo/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    names = {name for line in lines for name in json.loads(line)} - {"update", "time", "judge/reward"}
    assert len(names) > 30
    for name in {*names, *(sign.name for sign in SIGNS)}:
        short = name.removeprefix("validation") if name != "validation_kl" else name
        assert f"`{short}`" in text, name


def with_chain(finished_chain: Path, folder: Path, *stages: str) -> Path:
    for stage in stages:
        shutil.copytree(finished_chain / "runs/tiny" / stage, folder / "runs/tiny" / stage)
    return folder / "runs/tiny"


def test_adapters_stand_on_one_base_with_the_reward_model(finished_chain: Path, tmp_path: Path) -> None:
    run = with_chain(finished_chain, tmp_path, "tokenizer", "pretrain", "sft")
    common = ("--recipe", str(TINY_RECIPE), "reward.lora={rank: 4}", "ppo.learning_rate=1e-9", "ppo.keep.rule=last")
    rlhf("run", "reward", *common, cwd=tmp_path)
    rlhf("run", "ppo", *common, cwd=tmp_path)
    full = json.loads((run / "ppo/summary.json").read_text())
    said = rlhf("run", "ppo", *common, "ppo.layout=adapters", cwd=tmp_path)
    found = json.loads((run / "ppo/summary.json").read_text())
    assert "the critic is an adapter that starts as the reward model" in said
    assert "reference: on the policy's weights, 0 MiB" in said
    for figure in ("score_before", "score_after", "gold_after"):  # the judge is the one that stands by itself in `full`
        assert found[figure] == pytest.approx(full[figure], abs=2e-3)
    explained = []
    for stage in ("ppo", "ppo.stale-1"):
        lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        explained.append(next(line["explained_variance"] for line in lines if line["update"] == 1))
    assert explained[0] == pytest.approx(explained[1], abs=1e-3)  # the critics are alike
    saved = load_file(run / "ppo/model/model.safetensors")
    before = load_file(run / "sft/model/model.safetensors")
    assert set(saved) == set(before)
    assert all(torch.allclose(saved[name], before[name], atol=1e-5) for name in saved)


def test_the_adapter_beside_the_model_gives_it(finished_chain: Path, tmp_path: Path) -> None:
    run = with_chain(finished_chain, tmp_path, "tokenizer", "pretrain", "sft", "reward")
    more = ("ppo.layout=adapters", "ppo.learning_rate=0.01", "ppo.keep.rule=last")
    rlhf("run", "ppo", "--recipe", str(TINY_RECIPE), *more, cwd=tmp_path)
    plain, base = (AutoModelForCausalLM.from_pretrained(run / f"{stage}/model") for stage in ("ppo", "sft"))
    ids = torch.arange(20).unsqueeze(0)
    before = base(input_ids=ids).logits.detach()
    model = PeftModel.from_pretrained(base, run / "ppo/adapter")
    expected = plain(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)
    summary = json.loads((run / "ppo/summary.json").read_text())
    assert summary["parameters"] == sum(p.numel() for p in plain.parameters())
    assert summary["parameters_trained"] == sum(p.numel() for n, p in model.named_parameters() if "lora" in n)


def test_a_second_judge_chooses_and_restricted_sampling_does_not_drift(finished_chain: Path, tmp_path: Path) -> None:
    run = with_chain(finished_chain, tmp_path, "tokenizer", "pretrain", "sft", "reward")
    (tmp_path / "count.py").write_text(
        "def short(conversations):\n    return [-float(len(each['response'])) for each in conversations]\n"
    )
    rlhf(
        *("run", "ppo", "--recipe", str(TINY_RECIPE), f"data.root={tmp_path}"),
        "ppo.second_judge=[{python: 'count.py:short'}]",
        "ppo.sampling={max_tokens: 16, top_k: 20, top_p: 0.9, min_tokens: 3, temperature: 0.8, stop: [' is']}",
        "ppo.validate_every=1",
        "ppo.samples_every=1",
        cwd=tmp_path,
    )
    summary = json.loads((run / "ppo/summary.json").read_text())
    lines = [json.loads(line) for line in (run / "ppo/metrics.jsonl").read_text().splitlines()]
    assert summary["kept_by"] == "second_judge"
    points = {line["update"]: line["validation_second"] for line in lines}
    assert points[summary["kept_update"]] == max(points.values())
    assert summary["second_judge_before"] < 0
    assert all(line["drift"] < 1e-5 for line in lines[1:])
    assert summary["course"]["best_of_n"][0]["n"] == 1
    assert summary["course"]["best_of_n"][0]["second"] < 0  # the judge that counts words
    assert summary["second_judge_gain_ci95"][0] <= summary["second_judge_gain"] <= summary["second_judge_gain_ci95"][1]
    assert all(line["judge/reward"] == pytest.approx(line["score"]) for line in lines[1:])  # the second isn't in it
    assert not any(" is" in sample["response"] for line in lines[1:] for sample in line["samples"])


def test_a_judge_that_says_one_thing_stops_a_run_whose_doctor_may(finished_chain: Path, tmp_path: Path) -> None:
    with_chain(finished_chain, tmp_path, "tokenizer", "pretrain", "sft", "reward")
    (tmp_path / "one.py").write_text("def one(conversations):\n    return [1.0 for _ in conversations]\n")
    judge = "ppo.judge=[{python: 'one.py:one'}]"
    common = ("--recipe", str(TINY_RECIPE), f"data.root={tmp_path}", judge)
    said = rlhf("run", "ppo", *common, "ppo.doctor.action=stop", cwd=tmp_path, code=1)
    assert "ppo: stopped after update 1: " in said
    assert "judge_is_constant: the scores of an update have a standard deviation of 0" in said
    assert "The same command goes on from the last checkpoint and meets this again; other orders for the doctor" in said
    shown = rlhf("status", "runs/tiny", cwd=tmp_path)
    assert "it ended: ppo: stopped after update 1: " in shown
    assert "evaluate        missing" in shown
    said = rlhf("chat", "runs/tiny/ppo/model", cwd=tmp_path, code=2)
    assert "runs/tiny/ppo/model is not there yet: the stage ppo is not complete" in said
    said = rlhf("run", "ppo", *common, "ppo.doctor.action=warn", cwd=tmp_path)
    assert "judge_is_constant" in said
    summary = json.loads((tmp_path / "runs/tiny/ppo/summary.json").read_text())
    assert summary["findings"]["judge_is_constant"] == [1, 2]
    assert not (tmp_path / "runs/tiny/ppo/failure.txt").exists()


def test_backing_off_leaves_a_record_of_each_time(finished_chain: Path, tmp_path: Path) -> None:
    run = with_chain(finished_chain, tmp_path, "tokenizer", "pretrain", "sft", "reward")
    common = ("run", "ppo", "--recipe", str(TINY_RECIPE), "ppo.learning_rate=0.3")
    said = rlhf(*common, "ppo.doctor={action: back_off, most_back_offs: 1}", cwd=tmp_path, code=1)
    assert "ppo: backed off 1 times, and again after update 1: steps_too_large: " in said
    (record,) = json.loads((run / "ppo/back_offs.json").read_text())["back_offs"]
    assert (record["update"], record["back_to"]) == (1, 0)
    assert record["finding"] == "steps_too_large"
    assert "nats a token" in record["evidence"] or "clipped" in record["evidence"]
    rlhf(*common, "ppo.doctor={action: back_off, most_back_offs: 20}", "--processes", "2", cwd=tmp_path)
    summary = json.loads((run / "ppo/summary.json").read_text())
    assert summary["back_offs"][0] == record
    assert len(summary["back_offs"]) > 1
    rates = [json.loads(line).get("learning_rate") for line in (run / "ppo/metrics.jsonl").read_text().splitlines()]
    assert rates[1] == pytest.approx(0.3 * 0.5 ** len(summary["back_offs"]))


@pytest.mark.parametrize(
    "layout", ["adapters", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "shared"))]
)
def test_two_processes_do_what_one_does(finished_chain: Path, tmp_path: Path, layout: str) -> None:
    lines, texts = [], 32 if layout == "full" else 96  # one row, or three, for two processes
    for processes in ("1", "2"):
        run = with_chain(finished_chain, tmp_path / processes, "tokenizer", "pretrain", "sft", "reward")
        more = (f"ppo.layout={layout}", "ppo.samples_every=1", "ppo.updates=1", "ppo.entropy_coefficient=0.01")
        rlhf(
            *("run", "ppo", "--recipe", str(TINY_RECIPE), "--processes", processes, *more),
            "ppo.ptx={train: [{builtin: tinyworld, rows: 300}], sequence_length: 32, tokens_per_minibatch: 32}",
            f"ppo.ptx.tokens_per_minibatch={texts}",
            cwd=tmp_path / processes,
        )
        lines.append([json.loads(line) for line in (run / "ppo/metrics.jsonl").read_text().splitlines()])
    assert [line["update"] for line in lines[0]] == [0, 1]
    for one, two in zip(*lines, strict=True):
        assert set(one) == set(two)
        for shown in zip(one.pop("samples", []), two.pop("samples", []), strict=True):
            assert shown[0]["prompt"] == shown[1]["prompt"]
            assert shown[0]["response"] == shown[1]["response"]
        assert one.pop("findings", []) == two.pop("findings", [])
        for name in one.keys() - {"time", "drift"}:
            if not name.endswith(("_seconds", "_per_second")):
                counted = name.endswith("clip_fraction")  # a token at the edge may be counted or not
                assert two[name] == pytest.approx(one[name], rel=1e-5, abs=0.01 if counted else 1e-6), name


def test_gold_is_known_prompt_by_prompt() -> None:
    known: Messages = [{"role": "user", "content": "What colour is the coal?"}]
    foreign: Messages = [{"role": "user", "content": "Hello, who are you?"}]
    found = gold_rewards([known, foreign], ["The colour of the coal is black.", "I am a model."])
    assert found[0] is not None and found[0] > 0.5
    assert found[1] is None
    assert best_gold([known, foreign]) == [1.0]


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("opt", {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}),
        ("xglm", {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}),
        ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
        ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout": 0.1}),
        ("mixtral", {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "router_jitter_noise": 0.1}),
    ],
)  # fmt: skip
def test_nothing_is_dropped_whatever_a_model_calls_it(kind: str, sizes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=99, initializer_range=0.3, **sizes)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(5, 17).unsqueeze(0)
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)  # it does drop
    disable_dropout(model)
    torch.testing.assert_close(model(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_an_end_token_without_a_row_is_left_out(tiny_model: Any, tokenizer: Any) -> None:
    configured = tiny_model.generation_config.eos_token_id
    tiny_model.generation_config.eos_token_id = [7, 50_000]
    try:
        assert end_ids(tiny_model, tokenizer) == sorted({7, tokenizer.eos_token_id})
    finally:
        tiny_model.generation_config.eos_token_id = configured
