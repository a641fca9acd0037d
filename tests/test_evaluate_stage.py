"""The evaluate stage and `rlhf evaluate` from outside: prompts, judges, training texts, overlap beside scores."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from evaluation.perplexity import DocumentScore
from evaluation.responses import Response, win_rate
from evaluation.suite import Answer, Measured, add_overlap
from rlhf.chain import stage_inputs
from rlhf.judge import Conversation, Scores
from rlhf.recipe import load_recipe, upstream
from rlhf.rundir import RunDir
from rlhf.team import Team
from stages.evaluate.answering import scored
from stages.evaluate.kept import Findings, details, read_findings, write_findings
from tests.conftest import TINY_RECIPE, rlhf

REVIEWS = [
    "although very much like the first one it has a quite pleasing thrust",
    "a slow film in which nobody says anything that anybody would want to hear",
    "the actors do what they can with lines that were written on a napkin",
    "two hours of rain and not one umbrella in the whole of the picture",
    "there is more life in its credits than in most comedies of this year",
    "it never finds its tone but it looks for it in interesting places",
]


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A task of which two of six items stand in the training texts, prompts, comparisons, a judge that likes length."""
    choices = {"choices": ["bad", "good"], "answer": 0}
    write_lines(tmp_path / "film.test.jsonl", *({"input": review, **choices} for review in REVIEWS))
    write_lines(
        tmp_path / "train.jsonl", *[{"text": f"He wrote: {review}, bad. So it is."} for review in REVIEWS[:2]] * 3
    )
    write_lines(tmp_path / "prompts.jsonl", *({"prompt": f"Say {n} words."} for n in range(6)))
    pair = {"prompt": "Hello?", "chosen": "Good morning to you.", "rejected": "No."}
    write_lines(
        tmp_path / "pairs.jsonl",
        {**pair, "source": "long"},
        {**pair, "prompt": "Hi?", "source": "long"},
        {**pair, "chosen": "No.", "rejected": "Good morning to you.", "source": "short"},
    )
    (tmp_path / "length.py").write_text("def score(rows):\n    return [len(row['response']) for row in rows]\n")
    return tmp_path


def test_everything_is_measured_from_the_command_line(finished_chain: Path, here: Path) -> None:
    models = [str(finished_chain / f"runs/tiny/{stage}/model") for stage in ("pretrain", "sft")]
    said = rlhf(
        *("evaluate", *models, "--tasks", "film", "--shots", "0", "--prompts", "prompts.jsonl"),
        *("--judge", "length.py:score", "--comparisons", "pairs.jsonl", "--training", "train.jsonl"),
        *("--output", "found.json", "--details", "details.jsonl", "evaluate.sampling.max_tokens=12"),
        cwd=here,
    )
    assert "CONTAMINATED" in said and "which responses the judge prefers" in said
    found = json.loads((here / "found.json").read_text())
    base, sft = (found["models"][name] for name in models)
    lines = [json.loads(line) for line in (here / "details.jsonl").read_text().splitlines()]
    for name, figures in ((models[0], base), (models[1], sft)):
        written = [line for line in lines if line["model"] == name and "ended" in line]
        assert len(written) == 12 == figures["behaviour"]["responses"]
        assert figures["behaviour"]["ended"] == round(sum(line["ended"] for line in written) / 12, 4)
        assert figures["behaviour"]["score"] == pytest.approx(sum(len(line["text"]) for line in written) / 12, abs=1e-3)
        assert figures["fewshot"]["film"]["0"]["overlap"] == round(2 / 6, 4)
        assert "accuracy_clean" in figures["fewshot"]["film"]["0"]
        assert figures["memorisation"]["by_copies"].keys() == {"2-9"}
    (rates,) = found["win_rates"].values()
    assert rates["longer_preferred"] == 1.0 and rates["prompts"] == 6
    judged = found["judges"]["score"]
    assert judged["accuracy"] == pytest.approx(2 / 3, abs=1e-4)
    assert {name: row["accuracy"] for name, row in judged["accuracy_by_source"].items()} == {"long": 1.0, "short": 0.0}
    film = found["contamination"]["tasks"]["film"]
    assert found["contamination"]["contaminated"] == ["film"]
    assert (found["contamination"]["documents"], film["overlap_with_answer"]) == (6, 2)


def test_a_reward_model_judges_and_needs_no_other_model(finished_chain: Path, here: Path) -> None:
    judge = finished_chain / "runs/tiny/reward/model"
    rlhf("evaluate", "--judge", str(judge), "--comparisons", "pairs.jsonl", "--output", "o.json", cwd=here)
    found = json.loads((here / "o.json").read_text())
    assert found["models"] == {}
    (figures,) = found["judges"].values()
    assert figures["pairs_test"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--judge", "length.py:score"), "--judge and --prompts or --comparisons come together"),
        (("--comparisons", "pairs.jsonl"), "--judge and --prompts or --comparisons come together"),
        (("--judge", "length.py:scores", "--prompts", "prompts.jsonl"), "evaluate.judge"),
        (("--judge", "no/such/judge", "--prompts", "prompts.jsonl"), "evaluate.judge: no directory"),
        (("--prompts", "nothing.jsonl"), "nothing.jsonl"),
        (("--training", "nothing.jsonl"), "nothing.jsonl"),
        (("--output", "nowhere/found.json"), "--output: no directory nowhere"),
        (("--details", "."), "--details: . is there and is no plain file"),
        (("--output", "/dev/null"), "--output: /dev/null is there and is no plain file"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    finished_chain: Path, here: Path, arguments: tuple[str, ...], message: str
) -> None:
    said = rlhf("evaluate", str(finished_chain / "runs/tiny/sft/model"), *arguments, cwd=here, code=2)
    assert message in said and "Traceback" not in said
    assert "1 models" not in said  # it is noticed before anything is measured


def test_what_is_no_causal_lm_is_refused(finished_chain: Path, here: Path) -> None:
    """A masked LM can be loaded as one, and would see the answer."""
    masked = here / "bert"
    shutil.copytree(finished_chain / "runs/tiny/sft/model", masked)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=700, **sizes)).save_pretrained(masked)
    told = f"{masked} reads what stands behind a token as well, so it is no causal LM"
    assert told in rlhf("evaluate", str(masked), "--tasks", "film", cwd=here, code=2)
    (masked / "config.json").write_text("{")
    assert "config.json can't be read" in rlhf("evaluate", str(masked), "--tasks", "film", cwd=here, code=2)


def test_a_context_without_room_for_a_beginning_is_said_to_have_none(finished_chain: Path, here: Path) -> None:
    sft = finished_chain / "runs/tiny/sft/model"
    width = json.loads((sft / "config.json").read_text())["max_position_embeddings"]
    options = ("--training", "train.jsonl", f"evaluate.memorisation.continuation_tokens={width}", "--output", "o.json")
    said = rlhf("evaluate", str(sft), *options, cwd=here)
    why = f"the context of {width} tokens has no room for a beginning"
    assert "has no room" in said or "for a beginning" in said  # a narrow table folds it
    found = json.loads((here / "o.json").read_text())
    assert found["models"][str(sft)]["memorisation"] == {"not_available": why}


def test_two_processes_give_the_numbers_of_one(finished_chain: Path, tmp_path: Path) -> None:
    """Draws, scores, memorised documents and win rates too; what the chain found is found again."""
    shutil.copytree(finished_chain / "runs", tmp_path / "runs")
    summary = tmp_path / "runs/tiny/evaluate/summary.json"
    responses = tmp_path / "runs/tiny/evaluate/responses.jsonl"
    before, said = json.loads(summary.read_text()), responses.read_text()
    rlhf("run", "evaluate", "--recipe", str(TINY_RECIPE), "--fresh", "--processes", "2", cwd=tmp_path)
    after = json.loads(summary.read_text())
    for key in ("models", "differences", "win_rates", "contamination"):
        assert flat(after[key]) == pytest.approx(flat(before[key]), abs=2e-6), key
    assert {"behaviour", "memorisation", "fewshot"} <= after["models"]["ppo"].keys()
    assert [texts(line) for line in responses.read_text().splitlines()] == [texts(line) for line in said.splitlines()]


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """All numbers and texts below a value, by their place."""
    if isinstance(value, dict):
        return {key: found for name, each in value.items() for key, found in flat(each, f"{at}/{name}").items()}
    if isinstance(value, list):
        return {key: found for place, each in enumerate(value) for key, found in flat(each, f"{at}/{place}").items()}
    return {at: value}


def texts(line: str) -> list[str]:
    return [response["text"] for response in json.loads(line)["responses"].values()]


def test_what_the_stage_stands_on() -> None:
    """Judges, sampling and training texts of other sections decide its result."""
    recipe, run = load_recipe(str(TINY_RECIPE)), RunDir(Path("nowhere"))
    assert upstream(recipe, "evaluate") == ("pretrain", "sft", "reward", "ppo")
    was = stage_inputs(recipe, "evaluate", run)
    assert {"ppo.judge", "pretrain.train", "sft.train", "ppo.sampling.max_tokens"} <= was.keys()
    own = load_recipe(str(TINY_RECIPE), ["evaluate.judge=[{python: 'math:sqrt'}]", "evaluate.sampling.max_tokens=7"])
    assert upstream(own, "evaluate") == ("pretrain", "sft", "ppo")
    now = stage_inputs(own, "evaluate", run)
    assert "ppo.judge" not in now and "ppo.sampling.max_tokens" not in now
    assert {"evaluate.judge math:sqrt", "evaluate.sampling.max_tokens"} <= now.keys()


def test_the_same_response_of_two_models_is_a_tie_whatever_rounding_does() -> None:
    """A judge whose scores depend on what stands beside a response, as a model's do in the last digit."""

    class Rounding:
        def scores(self, conversations: Sequence[Conversation]) -> Scores:
            return Scores([len(c.response) + 1e-6 * place for place, c in enumerate(conversations)])

    prompts = [[{"role": "user", "content": f"{n}?"}] for n in range(5)]
    first = [[Response(f"answer {n}", 3, True)] for n in range(5)]
    second = [*first[:3], [], [Response("another", 2, True)]]
    found = scored(prompts, {"a": first, "b": second}, Rounding(), Team())
    assert [one == other for one, other in zip(found["a"], found["b"], strict=True)] == [True] * 3 + [False] * 2
    assert all(response.score is not None for given in found.values() for responses in given for response in responses)
    assert win_rate(found["a"], found["b"])["ties"] == 3


def test_overlap_beside_the_accuracy() -> None:
    answers = [Answer("film", 0, 0, item, {"acc": item < 3}, (), "") for item in range(5)]
    measured = Measured({"fewshot": {"film": {"0": {"accuracy": 0.6}}}}, answers, {})
    cell = add_overlap(measured, {"film": [True, False, None, True, False]}, {"film": "acc"}).figures["fewshot"][
        "film"
    ]["0"]
    assert cell == {"accuracy": 0.6, "overlap": 0.5, "accuracy_clean": round(2 / 3, 4)}  # items 1, 2 right; 4 wrong
    clean = add_overlap(measured, {"film": [False] * 5}, {"film": "acc"}).figures["fewshot"]["film"]["0"]
    assert clean == {"accuracy": 0.6, "overlap": 0.0}


def test_findings_come_back_as_they_were(tmp_path: Path) -> None:
    measured = Measured(
        {"perplexity": 2.0},
        [
            Answer("t", 1, 0, 3, {"acc": True}, (-1.5, -2.0), ""),
            Answer("f", 0, 0, 0, {"exact_match": False}, (), "a\u2028b"),
        ],
        {"a.jsonl": [DocumentScore(1.25, 3, 4, 1), DocumentScore(0.5, 1, 1, 1)], "b": [DocumentScore(2.0, 1, 1, 1)]},
    )
    found = Findings(measured, [[Response("hi\nyou", 2, True), Response("", 1, False)], []], {"too_short": 0})
    write_findings(tmp_path, found)
    assert read_findings(tmp_path) == found
    assert [sorted(json.loads(line))[0] for line in details("m", found)] == ["bytes"] * 3 + ["draw"] * 2 + ["ended"] * 2
