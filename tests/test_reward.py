"""The reward stage: what it collects, reads, learns, normalises and measures, on random models of 2 x 32."""

import itertools
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    NemotronConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import RewardConfig

from rlhf.chain import begin_stage, state_of, unmet
from rlhf.data.rows import Comparison
from rlhf.errors import DataError, RecipeError, StageFailed, UserError
from rlhf.functional.bradley_terry import bootstrap_weights
from rlhf.job import Job
from rlhf.judge.texts import read_through_template, shortened
from rlhf.model import last_norm, scale_last_norm
from rlhf.recipe import Recipe, RequireSection, RewardSection, dump_recipe, load_recipe, parse_recipe
from rlhf.rundir import RunDir, digest_folder
from rlhf.runtime import quiet_libraries
from rlhf.team import Team
from rlhf.tinyworld.dialogues import split_of_prompt
from rlhf.tokenizer import encode_chat, encode_prompt, load_tokenizer, token_info, train_bpe
from stages import reward
from stages.common import sample_responses, starting_model
from stages.reward import collect, labellers
from stages.reward.normalise import normalise_score, score_layer
from stages.reward.reading import Judge, Pair, Reading, evenly, open_judge
from stages.reward.train import PairBatches, PairTrainer, _ready, pair_order
from tests.conftest import ROOT, TINY_RECIPE, rlhf

SAMPLING = {"max_tokens": 8}


@pytest.fixture(scope="module")
def chat_model(
    tiny_llama: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random chat model, saved."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    tiny_llama.save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base of another architecture with other tokens, without chat template and pad token."""
    folder = tmp_path_factory.mktemp("models") / "other"
    tokenizer = train_bpe(["a text that is not of the built-in world at all", "and another one: 1, 2, 3."] * 5, 300)
    tokenizer.pad_token = None
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_layer=1, n_embd=16, n_head=2, n_positions=128, **token_info(tokenizer)
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def make_recipe(base: Path, folder: Path, section: dict[str, Any], **more: Any) -> Recipe:
    return parse_recipe(
        {
            "name": "t",
            "stages": ["reward"],
            "base": str(base),
            "data": {"root": str(folder)},
            "reward": {"max_tokens": 64, "pairs_per_step": 4, "learning_rate": 1e-3, **section},
            **more,
        },
        "here",
    )


def job_of(recipe: Recipe, folder: Path) -> Job:
    run = RunDir(folder / "runs/t")
    run.stage("reward").path.mkdir(parents=True, exist_ok=True)
    return Job(recipe, run, "reward")


def run_stage(base: Path, folder: Path, section: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Runs the stage in this process; returns its summary's figures."""
    with quiet_libraries():
        return reward.run(job_of(make_recipe(base, folder, section, **more), folder))


def stage_folder(folder: Path) -> Path:
    return folder / "runs/t/reward"


COLLECT = {"train_prompts": 8, "test_prompts": 4, "responses_per_prompt": 3, "sampling": SAMPLING}


def preferences(folder: Path) -> dict[str, Any]:
    """A section with comparisons from files, in which the answer with `good` wins."""
    for split, n in (("train", 12), ("test", 6)):
        write(
            folder / f"{split}.jsonl",
            *({"prompt": f"Is {i} {split}?", "chosen": f"good {i}", "rejected": f"bad {i} {i}"} for i in range(n)),
        )
    return {"train": [{"path": "train.jsonl"}], "test": [{"path": "test.jsonl"}], "sampling": SAMPLING}


# Prompts


def test_no_test_prompt_of_a_file_is_trained_on(chat_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {i % 30}?", "chosen": "a", "rejected": "b"} for i in range(90)]  # each three times
    write(tmp_path / "p.jsonl", *rows)
    section = {"collect": {**COLLECT, "prompts": [{"path": "p.jsonl"}], "labeller": "person", "train_prompts": 15}}
    job = job_of(make_recipe(chat_model, tmp_path, section), tmp_path)
    assert job.recipe.reward and job.recipe.reward.collect
    found = collect.split_prompts(job, job.recipe.reward.collect)
    train, test = ({prompt[0]["content"] for prompt in found[split]} for split in ("train", "test"))
    assert (len(found["train"]), len(train), len(found["test"]), len(test)) == (15, 15, 4, 4)
    assert not train & test
    assert collect.split_prompts(job, job.recipe.reward.collect) == found
    everything = job.recipe.reward.collect.model_copy(update={"train_prompts": 1000})
    more = {prompt[0]["content"] for prompt in collect.split_prompts(job, everything)["train"]}
    assert more | test == {f"Question {i}?" for i in range(30)}
    assert not more & test


def test_prompts_that_are_all_held_out_are_an_error(chat_model: Path, tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", {"prompt": "One?"}, {"prompt": "Two?"})
    section = {"collect": {**COLLECT, "prompts": [{"path": "p.jsonl"}], "labeller": "person"}}
    with pytest.raises(DataError, match=r"2 different prompts, which are all held out .* \(test_prompts: 4\)"):
        run_stage(chat_model, tmp_path, section)


# The built-in world


def test_the_built_in_worlds_comparisons(chat_model: Path, tmp_path: Path) -> None:
    summary = run_stage(chat_model, tmp_path, {"collect": COLLECT})
    folder = stage_folder(tmp_path)
    for split, prompts in (("train", 8), ("test", 4)):
        asked = rows_of(folder / f"responses.{split}.jsonl")
        compared = rows_of(folder / f"comparisons.{split}.jsonl")
        assert len(asked) == prompts
        assert {row["split"] for row in asked} == {split}
        assert {split_of_prompt(row["prompt"][0]["content"]) for row in asked} == {split}
        pairs = {(json.dumps(row["prompt"]), *sorted((row["chosen"], row["rejected"]))) for row in compared}
        assert pairs == {
            (json.dumps(row["prompt"]), *sorted(two))
            for row in asked
            for two in itertools.combinations(row["responses"], 2)
        }
        assert len(pairs) == len(compared)
        weights: Counter[str] = Counter()
        for row in compared:
            weights[json.dumps(row["prompt"])] += row["weight"]
            assert row["gold_chosen"] is not None
        assert list(weights.values()) == pytest.approx([1.0] * len(weights))
    assert summary["pairs_train"] == len(rows_of(folder / "comparisons.train.jsonl"))
    assert summary["pairs_test"] == len(compared)
    assert {path.name for path in (folder / "plots").iterdir()} == {
        *("accuracy.png", "differences.png", "length.png", "reliability.png")
    }


@pytest.mark.parametrize("heads", [1, 3])
def test_the_score_is_normal_on_the_references_responses(chat_model: Path, tmp_path: Path, heads: int) -> None:
    """Read with plain transformers, as any user of the model would: no code of ours but the ids that were drawn."""
    summary = run_stage(chat_model, tmp_path, {"collect": COLLECT, "heads": heads, "epochs": 2})
    folder = stage_folder(tmp_path)
    drawn = json.loads((folder / "responses-train-0/step-0/responses.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    with torch.no_grad():
        scores = torch.cat([model(torch.tensor([ids])).logits for _, _, ids in drawn]).double()
    centred = scores - torch.tensor(model.config.score_mean, dtype=torch.float64)
    assert len(drawn) == summary["reference_responses"] == 24
    assert centred.mean(0).tolist() == pytest.approx([0.0] * heads, abs=1e-5)
    assert centred.mean(1).var(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    assert (summary["reference_score_mean"], summary["reference_score_variance"]) == pytest.approx((0, 1), abs=1e-5)
    assert ("unanimous" in summary) == (heads > 1)
    assert (folder / "plots/heads.png").exists() == (heads > 1)


# Samplers


def test_responses_go_round_the_samplers(chat_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(chat_model, tmp_path / "copy")
    samplers = [{"model": "sft", "temperature": 0.7}, {"model": str(copy), "temperature": 1.5}]
    section = {"collect": {**COLLECT, "samplers": samplers}, "normalisation_prompts": 5}
    job = job_of(make_recipe(chat_model, tmp_path, section), tmp_path)
    assert job.recipe.reward and job.recipe.reward.collect
    reference = starting_model(job.recipe, job.run, "reward")
    found = collect.collect_comparisons(job, job.recipe.reward.collect, reference, ("train",))["train"]
    assert len(found.responses) == 8 * 3
    for prompt, group in itertools.groupby(found.responses, key=lambda response: json.dumps(response.prompt)):
        assert [response.ids is not None for response in group] == [True, True, False], prompt
    summary = run_stage(chat_model, tmp_path, section)
    assert summary["reference_responses"] == 5  # of both temperatures would not be the reference's
    assert (stage_folder(tmp_path) / "responses-reference").is_dir()


def test_a_sampler_without_chat_template_is_refused(chat_model: Path, other_model: Path, tmp_path: Path) -> None:
    section = {"collect": {**COLLECT, "samplers": [{"model": "sft"}, {"model": str(other_model)}]}}
    with pytest.raises(UserError, match=r"reward.collect.samplers.1: .* has no chat template"):
        run_stage(chat_model, tmp_path, section)


# Labellers


def labels(chat_model: Path, folder: Path, labeller: str, texts: list[str]) -> labellers.Labels:
    section = {"collect": {**COLLECT, "prompts": [{"path": "p.jsonl"}], "labeller": labeller}}
    job = job_of(make_recipe(chat_model, folder, section), folder)
    return labellers.label_all(job, labeller, [(user("Which?"), texts)], "train")


def test_a_python_function_labels(chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def longer(prompt, first, second):\n"
        "    assert prompt == [{'role': 'user', 'content': 'Which?'}]\n"
        "    prompt[0]['content'] = 'spoilt'\n"
        "    return 0 if len(first) == len(second) else 1 if len(first) > len(second) else 2\n"
    )
    found = labels(chat_model, tmp_path, "python:mine.py:longer", ["aa", "b", "c"])
    assert [(c.chosen, c.rejected, c.prompt) for c in found.comparisons] == [
        ("aa", "b", user("Which?")),
        ("aa", "c", user("Which?")),
    ]
    assert (found.ties, found.unknown) == (1, 0)
    (tmp_path / "mine.py").write_text("def longer(*_): raise OSError('it is asked once only')")
    assert labels(chat_model, tmp_path, "python:mine.py:longer", ["aa", "b", "c"]) == found


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "return 'first'",
            r"returned 'first' \(str\).*the prompt 'Which\?' with 'a' and 'b'.*1 \(the first is better\)",
        ),
        ("return True", r"returned 'True' \(bool\)"),
        ("return 3", r"returned '3' \(int\)"),
        ("return None", r"returned 'None' \(NoneType\)"),
        ("raise KeyError('x')", r"mine.py:f raised KeyError: 'x', asked about the prompt"),
    ],
)
def test_a_python_function_that_answers_badly_is_refused(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(f"def f(prompt, first, second):\n    {body}\n")
    ask = labellers.python_labeller("mine.py:f", tmp_path)
    with pytest.raises(UserError, match=message):
        ask(user("Which?"), "a", "b")


KILLED = """
import pathlib, sys
sys.path.insert(0, {root!r})
from stages.reward import labellers
def slow(prompt, first, second):
    if second == "d":
        pathlib.Path({asked!r}).write_text("now")
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    return 1
ask = labellers.remembering(slow, pathlib.Path({path!r}))
for other in "bcd":
    ask([{{"role": "user", "content": "Which?"}}], "a", other)
"""


def test_kill_9_while_a_function_answers_loses_no_answer(tmp_path: Path) -> None:
    path, asked = tmp_path / "answers.train.jsonl", tmp_path / "asked"
    code = KILLED.format(root=str(ROOT), asked=str(asked), path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert (done.returncode, asked.exists()) == (-9, True)
    with path.open("ab") as file:
        file.write(b'{"prompt": [{"role": "us')  # as if it had been killed while it wrote
    again: list[str] = []

    def labeller(prompt: Any, first: str, second: str) -> int:
        again.append(second)
        return 2

    ask = labellers.remembering(labeller, path)
    assert [ask(user("Which?"), "a", other) for other in "bcde"] == [1, 1, 2, 2]
    assert again == ["d", "e"]
    assert [row["answer"] for row in rows_of(path)] == [1, 1, 2, 2]


def test_what_a_function_has_answered_before_it_failed_is_not_asked_again(chat_model: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    body = "    open({!r}, 'a').write(second)\n    {}\n    return 1\n"
    mine = tmp_path / "mine.py"
    mine.write_text("def f(prompt, first, second):\n" + body.format(str(asked), "assert first == 'a'"))
    with pytest.raises(UserError, match="raised AssertionError"):
        labels(chat_model, tmp_path, "python:mine.py:f", ["a", "b", "c"])
    mine.write_text("def f(prompt, first, second):\n" + body.format(str(asked), "pass"))
    found = labels(chat_model, tmp_path, "python:mine.py:f", ["a", "b", "c"])
    assert [(c.chosen, c.rejected) for c in found.comparisons] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert asked.read_text() == "bccc"  # b, c and c again, of which the last was answered in the second run alone


def test_a_function_imports_what_lies_beside_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/beside_it.py").write_text("ANSWER = 2\n")
    (tmp_path / "mine/labels.py").write_text("import beside_it\ndef f(*_): return beside_it.ANSWER\n")
    before = list(sys.path)
    assert labellers.python_labeller("mine/labels.py:f", tmp_path)(user("Which?"), "a", "b") == 2
    assert sys.path == before
    monkeypatch.delitem(sys.modules, "beside_it")


def test_a_labeller_or_judge_of_a_module_is_stale_when_its_file_changes(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module in a package too, whose own file is not run for that."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_package").mkdir()
    (tmp_path / "a_package/__init__.py").write_text("raise OSError('imported')\n")
    for module in ("a_module", "a_package.inner"):
        file = tmp_path / f"{module.replace('.', '/')}.py"
        file.write_text("def f(*_): return 1\n")
        section = {"collect": {**COLLECT, "prompts": [{"path": "p.jsonl"}], "labeller": f"python:{module}:f"}}
        write(tmp_path / "p.jsonl", {"prompt": "Which?"})
        recipe, run = make_recipe(chat_model, tmp_path, section), RunDir(tmp_path / "runs" / module)
        run.create()
        begin_stage(recipe, "reward", run, "")
        assert state_of(recipe, "reward", run).name == "interrupted"
        file.write_text("def f(*_): return 2\n")
        assert state_of(recipe, "reward", run).why == f"reward.collect.labeller {module}:f has changed"


def test_a_file_labels_what_it_holds(chat_model: Path, tmp_path: Path) -> None:
    write(
        tmp_path / "known.jsonl",
        {"prompt": "Which?", "chosen": "b", "rejected": "a"},
        {"prompt": "Which?", "responses": ["c", "a"], "ranks": [1, 2]},
        *[{"prompt": "Which?", "chosen": "d", "rejected": "a"}, {"prompt": "Which?", "chosen": "a", "rejected": "d"}],
        {"prompt": "Other?", "chosen": "b", "rejected": "c"},
    )
    found = labels(chat_model, tmp_path, "file:known.jsonl", ["a", "b", "c", "d"])
    assert [(c.chosen, c.rejected) for c in found.comparisons] == [("b", "a"), ("c", "a")]
    assert (found.ties, found.unknown) == (1, 3)  # a and d: one vote each; b-c, b-d, c-d


def test_a_labeller_that_never_prefers_anything_is_an_error(chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def tie(*_): return 0\n")
    with pytest.raises(DataError, match="prefers no response to another in any of the 3 train pairs"):
        labels(chat_model, tmp_path, "python:mine.py:tie", ["a", "b", "c"])


def test_a_person_labels_later_and_what_was_used_is_kept(chat_model: Path, tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", *({"prompt": f"Question {i}?"} for i in range(12)))
    section = {"collect": {**COLLECT, "prompts": [{"path": "p.jsonl"}], "labeller": "person"}}
    with pytest.raises(
        StageFailed, match=r"0 of train and 0 of test comparisons are labelled(.|\n)*rlhf label .*runs/t"
    ):
        run_stage(chat_model, tmp_path, section)
    folder = stage_folder(tmp_path)
    asked = {split: rows_of(folder / f"responses.{split}.jsonl") for split in ("train", "test")}
    made = [
        {"prompt": row["prompt"], "chosen": row["responses"][1], "rejected": row["responses"][0], "split": split}
        for split, rows in asked.items()
        for row in rows
    ]
    answers = tmp_path / "runs/t/labels"
    answers.mkdir()
    write(answers / "me.jsonl", *(row for row in made if row["split"] == "train"))
    with pytest.raises(StageFailed, match="8 of train and 0 of test"):
        run_stage(chat_model, tmp_path, section)
    write(answers / "me.jsonl", *made)
    digest = digest_folder(answers)
    summary = run_stage(chat_model, tmp_path, section)
    assert (summary["pairs_train"], summary["pairs_test"]) == (8, 4)
    assert summary["labels_digest"] == digest
    assert list(summary["accuracy_by_source"]) == ["person"]
    write(answers / "you.jsonl", *made)
    again = run_stage(chat_model, tmp_path, section)  # as if it had been killed at its end
    assert (again["pairs_train"], again["labels_digest"]) == (8, digest)


def test_a_label_without_its_split_is_named(chat_model: Path, tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", *({"prompt": f"Question {i}?"} for i in range(12)))
    section = {"collect": {**COLLECT, "prompts": [{"path": "p.jsonl"}], "labeller": "person"}}
    (tmp_path / "runs/t/labels").mkdir(parents=True)
    write(tmp_path / "runs/t/labels/me.jsonl", {"prompt": "Which?", "chosen": "a", "rejected": "b"})
    with pytest.raises(DataError, match=r"me.jsonl, line 1: `split` is None, and must be train or test"):
        run_stage(chat_model, tmp_path, section)


# Reading


def reading_of(chat_model: Path, **section: Any) -> Reading:
    tokenizer = load_tokenizer(chat_model)
    model = AutoModelForSequenceClassification.from_pretrained(chat_model, num_labels=1)
    settings = RewardSection.model_validate({"from": "x", **section})
    return Reading(Judge(model, tokenizer, True, True, []), settings)


LONG = Comparison(user("one two three four five six seven eight nine ten"), "yes", "no, not at all")


def test_what_is_too_long_loses_the_beginning_of_its_prompt_on_both_sides(chat_model: Path) -> None:
    tokenizer = load_tokenizer(chat_model)
    prompt = encode_prompt(tokenizer, LONG.prompt)
    answers = [
        encode_chat(tokenizer, [*LONG.prompt, {"role": "assistant", "content": text}]).ids[len(prompt) :]
        for text in (LONG.chosen, LONG.rejected)
    ]
    longest = len(prompt) + len(answers[1]) - 3
    reading = reading_of(chat_model, max_tokens=longest, too_long="truncate")
    pair = reading.pair(LONG)
    assert pair is not None
    assert prompt[0] == tokenizer.bos_token_id
    assert pair.chosen.tolist() == prompt[:1] + prompt[4:] + answers[0]  # BOS stays
    assert pair.rejected.tolist() == prompt[:1] + prompt[4:] + answers[1]
    whole = encode_chat(tokenizer, [*LONG.prompt, {"role": "assistant", "content": LONG.rejected}]).ids
    as_text = shortened(read_through_template(tokenizer, LONG.prompt, LONG.rejected), longest)
    assert len(whole) == longest + 3
    assert pair.rejected.tolist() == as_text.ids  # what a judge that is given the text makes of it
    assert pair.prompt_tokens == len(prompt) - 3
    assert reading.counts == {"truncated": 1}
    reading = reading_of(chat_model, max_tokens=8, too_long="truncate")
    assert len(answers[1]) > 8
    assert reading.pair(LONG) is None  # the responses are never cut
    assert reading.counts == {"dropped": 1}


def test_a_prompt_is_cut_down_to_bos_and_no_further(chat_model: Path) -> None:
    tokenizer = load_tokenizer(chat_model)
    prompt = encode_prompt(tokenizer, LONG.prompt)
    answer = encode_chat(tokenizer, [*LONG.prompt, {"role": "assistant", "content": LONG.rejected}]).ids[len(prompt) :]
    pair = reading_of(chat_model, max_tokens=len(answer) + 1, too_long="truncate").pair(LONG)
    assert pair is not None
    assert pair.rejected.tolist() == [tokenizer.bos_token_id, *answer]
    assert pair.prompt_tokens == 1
    assert reading_of(chat_model, max_tokens=len(answer), too_long="truncate").pair(LONG) is None


def test_what_is_too_long_is_dropped_and_counted_or_an_error(chat_model: Path) -> None:
    reading = reading_of(chat_model, max_tokens=16)
    assert reading.pair(LONG) is None
    assert reading.counts == {"dropped": 1}
    with pytest.raises(DataError, match="more than the 16 that the judge may read"):
        reading_of(chat_model, max_tokens=16, too_long="error").pair(LONG)
    assert reading_of(chat_model, max_tokens=16, too_long="error").conversation(LONG.prompt, "yes", None) is None


def test_what_was_drawn_is_read_as_it_was_drawn(chat_model: Path) -> None:
    reading = reading_of(chat_model)
    reading.know(LONG.prompt, "yes", [5, 6, 7])
    pair = reading.pair(LONG)
    assert pair is not None
    assert pair.chosen.tolist() == [5, 6, 7]


BLANK_REFUSED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}Q:{{ m.content }}\n{% elif m.content.strip() %}"
    "A:{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def test_a_blank_response_that_the_template_hides_is_left_out_and_the_stage_goes_on(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = Path(shutil.copytree(chat_model, tmp_path / "judge"))
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    tokenizer.chat_template = BLANK_REFUSED
    tokenizer.save_pretrained(judge)

    def with_blanks(*args: Any) -> list[Any]:
        found = sample_responses(*args)
        return [found[0]._replace(ids=[]) if i % 6 == 0 else response for i, response in enumerate(found)]

    monkeypatch.setattr(collect, "sample_responses", with_blanks)
    summary = run_stage(chat_model, tmp_path, {"collect": COLLECT, "start": str(judge)})
    folder = stage_folder(tmp_path)
    for split in ("train", "test"):
        compared = rows_of(folder / f"comparisons.{split}.jsonl")
        blank = sum(not (row["chosen"].strip() and row["rejected"].strip()) for row in compared)
        assert blank >= 2
        assert summary[f"pairs_{split}_blank"] == blank
        assert summary[f"pairs_{split}"] == len(compared) - blank
    assert summary["reference_responses"] == 20  # of 24, as four prompts' first ones are blank
    said = capsys.readouterr()
    assert "a response that was drawn is blank" in said.out + said.err


def test_long_comparisons_of_a_file_are_counted_and_named(chat_model: Path, tmp_path: Path) -> None:
    section = preferences(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "long " * 60, "chosen": "a", "rejected": "b"}) + "\n")
    summary = run_stage(chat_model, tmp_path, section)
    assert (summary["pairs_train"], summary["pairs_train_too_long"], summary["pairs_train_truncated"]) == (12, 1, 0)
    assert list(summary["accuracy_by_source"]) == ["test.jsonl"]
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(DataError, match=r"train.jsonl, line 13: prompt and response have \d+ tokens"):
        run_stage(chat_model, tmp_path, {**section, "too_long": "error"})


# Training


def pairs_of(*sizes: int) -> list[Pair]:
    """So many pairs of each prompt, each response `n` tokens of the number n."""
    found = []
    for prompt, size in enumerate(sizes):
        responses = [np.full(3 + n + prompt, 10 + n, dtype=np.int32) for n in range(size + 1)]
        for n in range(size):
            comparison = Comparison(user(str(prompt)), str(n), str(n + 1), margin=n / 2, weight=1 / size)
            found.append(Pair(comparison, responses[n], responses[n + 1], 1))
    return found


def test_the_pairs_of_a_prompt_are_read_together_and_each_as_often() -> None:
    pairs = pairs_of(*[3, 1, 5, 2] * 5)
    order = pair_order(pairs, 5, 33, seed=1)
    assert Counter(order) == dict.fromkeys(range(55), 3)
    rest = list(order)
    while rest:  # all pairs of one prompt, in their order
        prompt = pairs[rest[0]].comparison.prompt
        whole = [place for place, pair in enumerate(pairs) if pair.comparison.prompt == prompt]
        assert rest[: len(whole)] == whole
        del rest[: len(whole)]
    assert len(pair_order(pairs, 4, 20, seed=1)) == 80
    assert pair_order(pairs, 5, 33, seed=1) == order
    assert pair_order(pairs, 5, 33, seed=2) != order


@pytest.mark.parametrize(("prompts", "a_step", "epochs"), [(279, 32, 1), (50, 32, 2), (1000, 32, 1), (7, 32, 3)])
def test_each_pass_reads_each_pair_once_whatever_its_length(prompts: int, a_step: int, epochs: int) -> None:
    pairs = pairs_of(*[1] * prompts)  # each prompt longer than the one before
    steps = -(-prompts * epochs // a_step)
    order = pair_order(pairs, a_step, steps, seed=3)
    assert len(order) == steps * a_step
    for number in range(epochs):
        assert sorted(order[number * prompts : (number + 1) * prompts]) == list(range(prompts))
    assert all(len(set(order[at : at + a_step])) == a_step for at in range(0, prompts - a_step + 1, a_step))


def test_part_of_a_pass_is_a_random_part() -> None:
    pairs = pairs_of(*[1] * 200)
    read: Counter[int] = Counter()
    for seed in range(400):
        order = pair_order(pairs, 10, 6, seed)
        assert len(set(order)) == 60
        read.update(order)
    # each is read 120 times of 400, give or take 9.2; the longest no more rarely than the shortest
    assert all(abs(read[place] - 120) < 5 * 9.2 for place in range(200))
    for part in (range(50), range(150, 200)):
        assert fmean(read[place] for place in part) == pytest.approx(120, abs=5)


def test_pairs_of_like_length_come_in_one_step_in_no_order_of_length() -> None:
    pairs = pairs_of(*[1] * 1024)
    order = pair_order(pairs, 32, 32, seed=1)
    steps = [order[at : at + 32] for at in range(0, 1024, 32)]
    assert fmean(max(step) - min(step) for step in steps) < 100  # at random it would be about 960
    middles = [fmean(step) for step in steps]
    assert 0.25 < fmean(a < b for a, b in itertools.pairwise(middles)) < 0.75


@pytest.mark.parametrize(("count", "epochs", "steps", "more"), [(13, 1.0, 4, 3), (13, 0.5, 2, 2), (12, 3.0, 9, 0)])
def test_a_pass_is_never_cut_short_and_what_fills_the_last_step_is_said(
    chat_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    count: int,
    epochs: float,
    steps: int,
    more: int,
) -> None:
    section = {**preferences(tmp_path), "epochs": epochs, "pairs_per_step": 4}
    write(tmp_path / "train.jsonl", *({"prompt": f"{i}?", "chosen": "good", "rejected": "bad"} for i in range(count)))
    assert run_stage(chat_model, tmp_path, section)["steps"] == steps
    said = capsys.readouterr()
    assert (f"; {more} more pairs, of a further pass, fill the last step" in said.out + said.err) == (more > 0)


def test_a_response_is_read_once_and_the_loss_is_as_if_each_pair_stood_alone(chat_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = AutoModelForSequenceClassification.from_pretrained(chat_model, num_labels=2)
    pairs = pairs_of(3, 2)
    batches = PairBatches(pairs, margin_scale=0.5, heads=2, seed=7, pad_id=model.config.pad_token_id)
    data = batches.dataset(range(5))
    batch = batches([data[i] for i in range(5)])
    assert batch["input_ids"].shape == (7, 6)  # 4 + 3 responses instead of 10
    with quiet_libraries():
        trainer = PairTrainer(
            label_smoothing=0.1,
            centering=0.01,
            model=model,
            args=RewardConfig(
                output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None
            ),
            train_dataset=data,
            data_collator=batches,
            processing_class=AutoTokenizer.from_pretrained(chat_model),
        )
        loss = trainer.compute_loss(model.eval(), batch)
    expected = []
    weights = bootstrap_weights(torch.tensor([1 / 3] * 3 + [1 / 2] * 2), 2, 7)
    with torch.no_grad():
        for pair, weight in zip(pairs, weights, strict=True):
            chosen, rejected = (
                model(torch.tensor([ids.tolist()])).logits[0].double() for ids in (pair.chosen, pair.rejected)
            )
            for head in range(2):
                d = chosen[head] - rejected[head] - 0.5 * pair.comparison.margin
                nats = 0.9 * torch.log1p(torch.exp(-d)) + 0.1 * torch.log1p(torch.exp(d))
                expected.append(weight[head] * nats + 0.01 * (chosen[head] + rejected[head]) ** 2)
    assert loss.item() == pytest.approx(float(sum(expected)) / 10, abs=1e-5)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows_of(stage_folder(folder) / "metrics.jsonl") if "loss" in row]


def test_microbatches_change_nothing(chat_model: Path, tmp_path: Path) -> None:
    found = []
    for size in (4, 2, 1):
        folder = tmp_path / str(size)
        folder.mkdir()
        section = {"collect": COLLECT, "microbatch_size": size, "log_every": 1, "heads": 2, "centering": 0.01}
        run_stage(chat_model, folder, section)
        found.append(losses(folder))
    assert len(found[0]) == 6
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)


def test_what_is_learned_shows_in_the_validation(chat_model: Path, tmp_path: Path) -> None:
    section = {
        **preferences(tmp_path),
        "epochs": 20,
        "learning_rate": 5e-3,
        "validate_every": 10,
        "label_smoothing": 0.05,
    }
    summary = run_stage(chat_model, tmp_path, section)
    assert summary["validation_loss"] < 0.3 < summary["validation_loss_before"]
    assert summary["validation_accuracy"] == summary["accuracy"] == 1.0
    measured = [row["step"] for row in rows_of(stage_folder(tmp_path) / "metrics.jsonl") if "validation_loss" in row]
    assert measured == [0, 10, 20, 30, 40, 50, 60]
    assert summary["surface_features"]["tokens"]["preferred"] == "less"
    assert summary["accuracy_longer_chosen"] is None


@pytest.mark.parametrize("every", [False, True])
def test_test_prompts_that_are_trained_on_are_counted_and_not_measured_on(
    chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], every: bool
) -> None:
    section = preferences(tmp_path)  # 12 and 6
    train, test = rows_of(tmp_path / "train.jsonl"), rows_of(tmp_path / "test.jsonl")
    turned = {"prompt": train[1]["prompt"], "chosen": train[1]["rejected"], "rejected": train[1]["chosen"]}
    seen = [train[0], turned, {**train[2], "chosen": "another"}, {**train[2], "rejected": "a third"}]
    write(tmp_path / "test.jsonl", *([] if every else test), *seen)
    summary = run_stage(chat_model, tmp_path, section)
    said = capsys.readouterr()
    assert (summary["pairs_test_seen"], summary["prompts_test_seen"]) == (2, 3)
    assert (summary["pairs_test"], summary["pairs_test_unseen"]) == ((4, 0) if every else (6, 6))
    assert "warning: 3 of the test prompts are trained on as well" in said.out + said.err
    wanted = RequireSection(accuracy=0.0)  # type: ignore[call-arg]
    reasons = ["the prompts of all 4 test comparisons are trained on as well"] if every else []
    assert unmet(wanted, summary) == reasons
    assert unmet(RequireSection(), summary) == []  # type: ignore[call-arg]


def test_nothing_is_seen_where_nothing_is_shared(chat_model: Path, tmp_path: Path) -> None:
    summary = run_stage(chat_model, tmp_path, preferences(tmp_path))
    assert [summary[f"{name}_seen"] for name in ("pairs_test", "prompts_test")] == [0, 0]
    assert summary["pairs_test_unseen"] == summary["pairs_test"] == 6


def test_at_most_so_many_are_looked_at_evenly() -> None:
    assert evenly(range(5), 8) == [0, 1, 2, 3, 4]
    assert evenly(range(10), 4) == [0, 2, 5, 7]


# What a judge is made of


def test_low_rank_adapters_are_saved_and_merged(chat_model: Path, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    section = {**preferences(tmp_path), "epochs": 10, "learning_rate": 1e-2, "lora": {"rank": 4, "alpha": 8}}
    summary = run_stage(chat_model, tmp_path, section)
    assert summary["validation_loss"] < summary["validation_loss_before"]
    folder = stage_folder(tmp_path)
    messages = [*user("Is it?"), {"role": "assistant", "content": "good"}]
    ids = torch.tensor([encode_chat(load_tokenizer(chat_model), messages).ids])
    whole = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    torch.manual_seed(99)  # the base's own head is another one every time
    base = AutoModelForSequenceClassification.from_pretrained(chat_model, num_labels=1)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, whole(ids).logits, atol=1e-5, rtol=1e-5)
    trained, before = (dict(model.named_parameters()) for model in (whole, tiny_llama))
    assert torch.equal(trained["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert torch.equal(trained["model.norm.weight"], before["model.norm.weight"])


KINDS = {"llama": LlamaConfig, "gemma": GemmaConfig, "nemotron": NemotronConfig, "gpt2": GPT2Config}
SIZES: dict[str, int] = {"vocab_size": 50, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}


def classifier_of(kind: str, gain: float) -> PreTrainedModel:
    """A random classifier whose last norm multiplies by about `gain`, however it keeps that."""
    torch.manual_seed(5)
    config = KINDS[kind](**SIZES, num_labels=1, pad_token_id=0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in last_norm(model).named_parameters():
            offset = 1.0 if name == "weight" and kind in ("gemma", "nemotron") else 0.0
            size = gain * (1 + 0.3 * torch.randn(32)) if name == "weight" else gain * 0.1 * torch.randn(32)
            parameter.copy_(size - offset)
        model.score.weight.normal_()
    return model


@pytest.mark.parametrize("gain", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_head_reads_states_of_size_1_and_what_is_saved_is_what_was_trained(
    chat_model: Path, tmp_path: Path, kind: str, gain: float
) -> None:
    """With low-rank adapters the base gets its norm back; the scores stay."""
    model = classifier_of(kind, gain)
    before = {name: value.clone() for name, value in model.base_model.state_dict().items()}
    job = job_of(make_recipe(chat_model, tmp_path, {**preferences(tmp_path), "lora": {"rank": 2}}), tmp_path)
    assert job.recipe.reward
    adapted, restore = _ready(job, job.recipe.reward, Judge(model, load_tokenizer(chat_model), True, True, []))
    ids = torch.randint(1, 50, (16, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        read = adapted.get_base_model().base_model(input_ids=ids).last_hidden_state
        trained = adapted(input_ids=ids).logits
        restore()
        kept = adapted(input_ids=ids).logits
    assert read.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.1)
    assert torch.allclose(trained, kept, rtol=1e-4, atol=1e-4)
    norm = last_norm(model).state_dict()
    assert norm
    for name, value in norm.items():
        assert any(torch.equal(value, was) for full, was in before.items() if full.endswith(f".{name}")), name


def test_a_norm_whose_gain_does_not_follow_its_weight_or_is_nothing_is_left_alone() -> None:
    class Capped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((32,), 3.0))

        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(states, (32,)) * torch.tanh(self.weight) * 5

    model = classifier_of("llama", 1.0)
    model.base_model.norm = Capped()
    assert scale_last_norm(model) == 1.0
    assert torch.equal(last_norm(model).weight, torch.full((32,), 3.0))
    model = classifier_of("llama", 0.0)
    assert scale_last_norm(model) == 1.0
    assert torch.equal(last_norm(model).weight, torch.zeros(32))


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_judge_may_start_from_a_model_with_other_tokens(
    chat_model: Path, other_model: Path, tmp_path: Path, lora: Any
) -> None:
    """Everything is read from text then; it gets the chat template and the pad token that it lacks."""
    section = {"collect": COLLECT, "start": str(other_model), "max_tokens": 128, "lora": lora}
    summary = run_stage(chat_model, tmp_path, section)
    assert summary["reference_score_variance"] == pytest.approx(1.0, abs=1e-5)
    tokenizer = load_tokenizer(stage_folder(tmp_path) / "model")
    model = AutoModelForSequenceClassification.from_pretrained(stage_folder(tmp_path) / "model")
    assert (model.config.model_type, model.config.pad_token_id) == ("gpt2", tokenizer.pad_token_id)
    assert tokenizer.chat_template and tokenizer.pad_token_id is not None
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    drawn = rows_of(stage_folder(tmp_path) / "responses.train.jsonl")
    kept = json.loads((stage_folder(tmp_path) / "responses-train-0/step-0/responses.json").read_text())
    prompts = [row["prompt"] for row in drawn]
    scores = []
    with torch.no_grad():
        for place, text, _ in kept:
            messages = [*prompts[place], {"role": "assistant", "content": text}]
            scores.append(model(torch.tensor([encode_chat(tokenizer, messages).ids])).logits.item())
    assert fmean(scores) == pytest.approx(model.config.score_mean, abs=1e-4)
    assert pstdev(scores) == pytest.approx(1.0, abs=1e-3)


def test_a_pad_token_that_ends_responses_is_replaced(chat_model: Path, tmp_path: Path) -> None:
    """The score would be read before the end token; the ids that were drawn stay as they are."""
    base = shutil.copytree(chat_model, tmp_path / "base")
    tokenizer = load_tokenizer(base)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(base)
    job = job_of(make_recipe(base, tmp_path, {"collect": COLLECT}), tmp_path)
    assert job.recipe.reward
    reference = starting_model(job.recipe, job.run, "reward")
    judge = open_judge(job, job.recipe.reward, reference, reference.tokenizer())
    assert judge.shares_tokens
    assert judge.tokenizer.pad_token_id == judge.model.config.pad_token_id != judge.tokenizer.eos_token_id


def test_an_existing_judge_with_other_tokens_is_measured_by_its_own(
    chat_model: Path, other_model: Path, tmp_path: Path
) -> None:
    run_stage(chat_model, tmp_path, {"collect": COLLECT, "start": str(other_model), "max_tokens": 128})
    judge = (stage_folder(tmp_path) / "model").rename(tmp_path / "judge")
    shutil.rmtree(tmp_path / "runs")
    section = {"from": str(judge), "test": preferences(tmp_path)["test"], "sampling": SAMPLING}
    ppo: dict[str, Any] = {
        "prompts": [{"path": "train.jsonl"}],
        "test_prompts": [{"path": "test.jsonl"}],
        "sampling": SAMPLING,
    }
    ppo |= {"updates": 1, "episodes_per_update": 4, "learning_rate": 1e-3}
    summary = run_stage(chat_model, tmp_path, section, ppo=ppo)
    assert (summary["pairs_train"], summary["pairs_test"], summary["reference_responses"]) == (0, 6, 12)
    assert summary["reference_score_variance"] == pytest.approx(1.0, abs=1e-5)
    assert "surface_features" not in summary
    saved = stage_folder(tmp_path) / "model"
    assert load_tokenizer(saved).get_vocab() == load_tokenizer(judge).get_vocab()
    old, new = (AutoModelForSequenceClassification.from_pretrained(path) for path in (judge, saved))
    ratio = new.score.weight / old.score.weight
    assert ratio.min().item() == pytest.approx(ratio.max().item(), rel=1e-5)  # scaled, and nothing else
    del old.score, new.score
    for mine, theirs in zip(new.parameters(), old.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_base_without_chat_template_is_no_judge(chat_model: Path, other_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(other_model, num_labels=1)
    model.save_pretrained(tmp_path / "bare")
    load_tokenizer(other_model).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="has no chat template, so it can't be told how a conversation looks"):
        run_stage(chat_model, tmp_path, {"from": str(tmp_path / "bare"), **preferences(tmp_path), "train": []})


def test_a_judge_that_says_nothing_is_an_error(chat_model: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(chat_model, num_labels=1)
    score_layer(model).weight.data.zero_()
    model.save_pretrained(tmp_path / "mute")
    load_tokenizer(chat_model).save_pretrained(tmp_path / "mute")
    with pytest.raises(UserError, match="gives every response the same score"):
        run_stage(chat_model, tmp_path, {"from": str(tmp_path / "mute"), **preferences(tmp_path), "train": []})


def test_a_normalisation_that_did_not_take_is_an_error(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(chat_model, num_labels=1)
    rows = [np.arange(5, 8 + n, dtype=np.int32) for n in range(6)]
    monkeypatch.setattr("stages.reward.normalise.score_layer", lambda _: torch.nn.Linear(1, 1))
    with pytest.raises(StageFailed, match="after the normalisation a score is off by"):
        normalise_score(Team(), model, rows)


def began(recipe: Recipe, folder: Path) -> RunDir:
    """A run whose reward stage has begun as this recipe says."""
    run = RunDir(folder / "runs/begun")
    shutil.rmtree(run.path, ignore_errors=True)
    run.create()
    begin_stage(recipe, "reward", run, "")
    return run


PPO: dict[str, Any] = {
    "prompts": [{"path": "prompts.jsonl"}],
    "test_prompts": [{"path": "prompts.jsonl"}],
    "updates": 1,
    "episodes_per_update": 4,
    "minibatches": 1,
    "learning_rate": 1e-3,
}


def test_what_the_score_is_normalised_on_makes_the_stage_stale(chat_model: Path, tmp_path: Path) -> None:
    section = preferences(tmp_path)
    del section["sampling"]
    write(tmp_path / "prompts.jsonl", {"prompt": "Which?"})

    def recipe(reward: dict[str, Any], tokens: int, **ppo: Any) -> Recipe:
        return make_recipe(chat_model, tmp_path, reward, ppo={**PPO, "sampling": {"max_tokens": tokens}, **ppo})

    run = began(recipe(section, 8), tmp_path)
    assert state_of(recipe(section, 8, updates=2), "reward", run).name == "interrupted"
    assert state_of(recipe(section, 9), "reward", run).why == "ppo.sampling.max_tokens: 8 -> 9"
    own = {**section, "sampling": {"max_tokens": 8}}
    run = began(recipe(own, 8), tmp_path)
    assert state_of(recipe(own, 9), "reward", run).name == "interrupted"  # ppo's isn't used
    judge = {"from": str(chat_model), "test": section["test"], "sampling": {"max_tokens": 8}}
    run = began(recipe(judge, 8), tmp_path)
    write(tmp_path / "prompts.jsonl", {"prompt": "Which one?"})
    assert state_of(recipe(judge, 8), "reward", run).why == "file prompts.jsonl has changed"
    more = [{"path": "prompts.jsonl", "rows": 1}]
    assert "ppo.prompts" in state_of(recipe(judge, 8, prompts=more), "reward", run).why


def test_sfts_way_is_used_where_there_is_no_ppo(chat_model: Path, tmp_path: Path) -> None:
    section = preferences(tmp_path)
    del section["sampling"]
    write(tmp_path / "sft.jsonl", {"prompt": "a", "completion": "b"})

    def recipe(tokens: int) -> Recipe:
        rows, sizes = [{"path": "sft.jsonl"}], {"steps": 1, "dialogues_per_step": 1, "max_tokens": 32}
        sampling = {"max_tokens": tokens}
        sft = {"train": rows, "validation": rows, **sizes, "learning_rate": 1e-3, "sampling": sampling}
        return make_recipe(chat_model, tmp_path, section, sft=sft)

    assert state_of(recipe(9), "reward", began(recipe(8), tmp_path)).why == "sft.sampling.max_tokens: 8 -> 9"


def test_how_the_reference_answers_is_asked_before_anything_is_done(chat_model: Path, tmp_path: Path) -> None:
    section = {key: value for key, value in preferences(tmp_path).items() if key != "sampling"}
    with pytest.raises(RecipeError, match=r"reward\.sampling: missing"):
        run_stage(chat_model, tmp_path, section)


def test_heads_with_other_names_are_found() -> None:
    class Config:
        score_heads = 1

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()
            self.classifier = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))

    model = Classifier()
    assert score_layer(model) is model.classifier[1]
    model.classifier[1] = torch.nn.Linear(4, 2)
    with pytest.raises(UserError, match="no linear layer gives its 1 outputs"):
        score_layer(model)


# In processes of its own


def test_a_person_labels_between_two_commands(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage waits for labels, takes them, is done; more labels make it stale. Exit codes as promised."""
    write(tmp_path / "p.jsonl", *({"prompt": f"Question {i}?"} for i in range(12)))
    overrides = [
        *("name=t", "stages=[reward]", f"base={chat_model}", "data.root=.", "reward.max_tokens=64"),
        "reward.collect={prompts: [{path: p.jsonl}], labeller: person, train_prompts: 8, test_prompts: 4, "
        "sampling: {max_tokens: 8}}",
    ]
    command = ("run", "reward", "--recipe", str(TINY_RECIPE), *overrides)
    said = rlhf(*command, cwd=tmp_path, code=1)
    assert "0 of train and 0 of test comparisons are labelled" in said
    assert "rlhf label" in said
    folder = stage_folder(tmp_path)
    made = [
        {"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][1], "split": row["split"]}
        for split in ("train", "test")
        for row in rows_of(folder / f"responses.{split}.jsonl")
    ]
    (tmp_path / "runs/t/labels").mkdir()
    write(tmp_path / "runs/t/labels/me.jsonl", *made)
    said = rlhf(*command, cwd=tmp_path)
    assert "was interrupted, goes on" in said
    assert "responses-train-0: made before the stage was interrupted, used again" in said
    assert "labelled by a person: 8 train comparisons, 4 test comparisons" in said
    recipe, run = load_recipe(str(TINY_RECIPE), overrides), RunDir(tmp_path / "runs/t")
    monkeypatch.chdir(tmp_path)
    assert state_of(recipe, "reward", run).name == "done"
    write(tmp_path / "runs/t/labels/you.jsonl", *made)
    assert state_of(recipe, "reward", run).why.startswith("labels: ")


def test_two_processes_learn_what_one_learns(chat_model: Path, tmp_path: Path) -> None:
    recipe = make_recipe(chat_model, tmp_path, {"collect": COLLECT, "heads": 2, "log_every": 1})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    for name, processes in (("one", "1"), ("two", "2")):
        rlhf(*("run", "reward", "--recipe", "recipe.yaml", f"name={name}", "--processes", processes), cwd=tmp_path)
    one, two = (rows_of(tmp_path / "runs" / name / "reward/metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) > 6
    for mine, theirs in zip(one, two, strict=True):
        for key in mine.keys() - {"time"}:
            assert mine[key] == pytest.approx(theirs[key], abs=1e-5, rel=1e-5), key
