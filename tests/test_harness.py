"""Tasks of lm-evaluation-harness: their figures against our own suite's on the same items, and what is refused.

The first half needs lm-eval, which the development environment doesn't have: see README, "Evaluation that can be
checked". In an environment without it these tests are skipped.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation import fewshot, harness
from evaluation.harness import Harness, check_installed, harness_table, measure_harness, open_harness
from evaluation.scoring import Scorer
from evaluation.suite import Suite, measure
from evaluation.tasks import Task, file_tasks
from rlhf.api import _harness_section
from rlhf.chain import begin_stage, check_inputs, stage_inputs, state_of
from rlhf.data.reader import Faults
from rlhf.errors import MissingInput, RecipeError, UserError
from rlhf.recipe import Recipe, load_recipe
from rlhf.rundir import RunDir, write_json
from tests.conftest import TINY_RECIPE, rlhf

WORDS = ["hot", "cold", "tea", "moon", "black", "brown", "seven", "three", "early", "late", "crow", "coal"]
TEXTS = ["The colour of the coal is black.", "The opposite of early is late. 茶", "<|eos|> is no end."]


def write_tasks(folder: Path) -> Path:
    """A folder whose `data` we read as well: `mine` (multiple choice), `free` (short answers), and texts."""
    (folder / "data").mkdir(parents=True)
    rows = [
        {
            "instruction": "Say it.",
            "input": f"{WORDS[n % 12]} {WORDS[(5 * n + 1) % 12]}",
            "choices": [WORDS[n % 12], f"{WORDS[(n + 3) % 12]} {WORDS[(n + 4) % 12]}", WORDS[(n + 7) % 12]],
            "answer": n % 3,
        }
        for n in range(30)
    ]
    free = [{"instruction": "Say it.", "input": row["input"], "target": "tea"} for row in rows]
    for name, found in (("mine", rows), ("free", free)):
        for split, part in (("train", found[:4]), ("test", found[4:])):
            lines = "".join(f"{json.dumps(row)}\n" for row in part)
            (folder / "data" / f"{name}.{split}.jsonl").write_text(lines)
    (folder / "data" / "texts.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    return folder


def write_yaml(folder: Path, name: str, **more: Any) -> Path:
    """A task of lm_eval on a file of the folder."""
    files = {split: str(folder / "data" / f"{name}.{split}.jsonl") for split in ("train", "test")}
    settings: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "fewshot_split": "train",
        "description": "{{instruction}}\n\n",
        "doc_to_text": "Input: {{input}}\nOutput:",
        "target_delimiter": " ",
        "fewshot_delimiter": "\n\n",
        "fewshot_config": {"sampler": "first_n"},
        "metadata": {"version": 3.0},
        **more,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
FREE = {
    "output_type": "generate_until",
    "doc_to_target": "{{target}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "description": "",
    "fewshot_split": None,
    "metric_list": [{"metric": "bits_per_byte"}],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tasks for lm_eval and for us; what data sets is cached stays in the test's own folder."""
    pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # for processes
    found = write_tasks(tmp_path / "tasks")
    write_yaml(found, "mine", **CHOICE)
    return found


def ours(folder: Path, name: str) -> Task:
    """Our own task on the same files; our usual format is that of the YAML files here."""
    (task,) = file_tasks(folder / "data", Faults(), name)
    return task


# What it measures


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("shots", [0, 1])
def test_multiple_choice_is_what_our_suite_finds(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, shots: int, begin: bool
) -> None:
    asked = open_harness(["mine"], include=folder, shots=shots)
    found = measure_harness(tiny_model, tokenizer, asked, begin=begin, batch_size=5)["mine"]
    suite = measure(tiny_model, tokenizer, Suite(tasks=[ours(folder, "mine")], shots=[shots], begin=begin))
    expected = suite.figures["fewshot"]["mine"][str(shots)]
    assert expected["items"] == found["items"] == 26
    assert [found["acc"], found["acc_norm"]] == pytest.approx([expected["acc"], expected["acc_norm"]], abs=1e-4)
    assert found["acc_stderr"] == pytest.approx(math.sqrt(found["acc"] * (1 - found["acc"]) / 25), abs=1e-6)
    assert (found["version"], found["shots"], found["cut"]) == (3.0, shots, 0)
    answers = {answer.item: answer.logprobs for answer in suite.answers}
    for instance in asked.tasks["mine"].instances:
        ((value, _),) = instance.resps
        assert value == pytest.approx(answers[instance.doc_id][instance.idx], abs=1e-4)


def test_free_answers_are_what_our_suite_writes(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    write_yaml(folder, "free", **FREE)
    asked = open_harness(["free"], include=folder, items=10)
    found = measure_harness(tiny_model, tokenizer, asked, batch_size=4)["free"]
    task = ours(folder, "free")
    reader = fewshot.Reader(Scorer(tiny_model), tokenizer, 64, [tokenizer.bos_token_id])
    style = task.format.model_copy(update={"max_tokens": 6})
    outcomes = fewshot.answer_freely(reader, style, task.questions(0, 10, 0))
    written = {instance.doc_id: instance.resps[0] for instance in asked.tasks["free"].instances}
    assert [written[n].strip() for n in range(10)] == [outcome.written.strip() for outcome in outcomes if outcome]
    assert (found["items"], found["cut"]) == (10, 0)


@pytest.mark.parametrize("begin", [True, False])
def test_texts_are_what_our_suite_finds(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, begin: bool
) -> None:
    """BOS stands before each, once, whatever `begin` says; what looks like a control token is text."""
    write_yaml(
        folder, "texts", **ROLLING, dataset_kwargs={"data_files": {"test": str(folder / "data" / "texts.jsonl")}}
    )
    asked = open_harness(["texts"], include=folder)
    found = measure_harness(tiny_model, tokenizer, asked, begin=begin)["texts"]
    expected = measure(tiny_model, tokenizer, Suite(texts={"mine": TEXTS})).figures
    assert found["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], abs=1e-5)


def test_a_group_is_reported_beside_its_tasks(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    write_yaml(folder, "free", **FREE)
    group = {"group": "both", "task": ["mine", "free"], "metadata": {"version": 7}}
    weighted = [{"metric": "acc", "weight_by_size": True}]
    (folder / "both.yaml").write_text(yaml.safe_dump({**group, "aggregate_metric_list": weighted}))
    asked = open_harness(["both"], include=folder, items=6)
    assert asked.size == 12
    steps: list[int] = []
    found = measure_harness(tiny_llama, tokenizer, asked, progress=steps.append)
    assert set(found) == {"mine", "free", "both"}
    assert found["both"]["acc"] == found["mine"]["acc"]
    assert found["both"]["tasks"] == ["mine", "free"]
    assert found["both"]["version"] == "7"  # lm_eval makes it text
    assert steps == sorted(steps)
    assert steps[-1] == 12


def test_the_model_is_the_same_object_and_nothing_of_it_or_of_the_tokenizer_changes(
    tiny_llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.pad_token = None
    state = copy.deepcopy(tiny_llama.state_dict())
    passes: list[int] = []
    hook = tiny_llama.register_forward_hook(lambda *_: passes.append(1))
    try:
        asked = open_harness(["mine"], include=folder, items=4)
        first = measure_harness(tiny_llama, plain, asked)
        again = measure_harness(tiny_llama, plain, asked)
    finally:
        hook.remove()
    assert passes
    assert first == again
    assert not tiny_llama.training
    assert plain.pad_token is None
    assert all(bool((state[name] == value).all()) for name, value in tiny_llama.state_dict().items())
    assert capfd.readouterr() == ("", "")


def test_the_demonstrations_are_the_same_for_every_model(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    write_yaml(folder, "mine", **CHOICE, fewshot_config={"sampler": "default"})
    asked = open_harness(["mine"], include=folder, shots=1)
    prompts = []
    for _ in range(2):
        measure_harness(tiny_llama, tokenizer, asked)
        prompts.append([instance.args for instance in asked.tasks["mine"].instances])
    assert prompts[0] == prompts[1]
    assert len({context.split("Input")[1] for context, _ in prompts[0]}) > 1  # drawn for each item


def test_what_does_not_fit_is_counted_and_what_is_no_number_is_none(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, tmp_path: Path
) -> None:
    asked = open_harness(["mine"], include=folder, shots=4, items=5)
    assert measure_harness(tiny_llama, tokenizer, asked)["mine"]["cut"] == 5
    write_yaml(folder, "free", **FREE)
    free = open_harness(["free"], include=folder, shots=4, items=3)
    assert measure_harness(tiny_llama, tokenizer, free)["free"]["cut"] == 3
    one = measure_harness(tiny_llama, tokenizer, open_harness(["mine"], include=folder, items=1))
    assert one["mine"]["acc_stderr"] is None  # of a single item
    write_json(tmp_path / "found.json", one)
    assert [harness._number(value) for value in (math.nan, math.inf, "N/A", True)] == [None, None, None, 1.0]


# What it refuses, with lm_eval


def test_names_that_are_not_known_come_with_the_nearest(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no task 'arc_easi'.*did you mean arc_easy"):
        open_harness(["arc_easi"])
    with pytest.raises(UserError, match=r"'mime', nor is it in .*mine"):
        open_harness(["mime"], include=folder)


def test_data_that_can_not_be_had_names_the_task(folder: Path) -> None:
    files = {"data_files": {"test": str(folder / "nowhere.jsonl")}}
    write_yaml(folder, "lost", **CHOICE, dataset_kwargs=files, fewshot_split="test")
    with pytest.raises(UserError, match=r"lost: its data can't be had: .*nowhere.jsonl"):
        open_harness(["lost"], include=folder)


@pytest.mark.parametrize(
    ("text", "fault"),
    [("task: bad\ndataset_path: : [", "line 2"), ("task: bad\noutput_type: none\n", "can't be loaded")],
)
def test_a_file_that_can_not_be_read_is_named(folder: Path, text: str, fault: str) -> None:
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=fault):
        open_harness(["bad"], include=folder)


def test_more_demonstrations_than_there_are_are_refused_before_a_model_is_there(folder: Path) -> None:
    with pytest.raises(UserError, match=r"mine: its items can't be asked: .*exceeds the 4"):
        open_harness(["mine"], include=folder, shots=5)


def test_a_task_that_can_not_be_asked_of_a_model_is_refused(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    write_yaml(folder, "free", **{**FREE, "generation_kwargs": {"max_gen_toks": 64}})
    asked = open_harness(["free"], include=folder, items=1)
    with pytest.raises(UserError, match=r"can't ask this model \(free\): .*64"):
        measure_harness(tiny_llama, tokenizer, asked)


def test_a_task_that_says_zero_demonstrations_keeps_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_yaml(folder, "mine", **CHOICE, num_fewshot=0)
    open_harness(["mine"], include=folder, shots=2)
    assert "mine say that they have no demonstrations" in capsys.readouterr().out


# The command and the stage


@pytest.fixture
def model_dir(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    tiny_llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_command_measures_what_is_named_alone(folder: Path, model_dir: Path, tmp_path: Path) -> None:
    options = ["--harness", f"{folder}/mine", "--output", "found.json", "evaluate.harness.items=8"]
    said = rlhf("evaluate", str(model_dir), *options, cwd=tmp_path)
    (found,) = json.loads((tmp_path / "found.json").read_text())["models"].values()
    assert set(found) == {"fewshot", "harness"}
    assert found["fewshot"] == {}
    assert found["harness"]["mine"]["items"] == 8
    assert f"{found['harness']['mine']['acc']:.4f} ± " in said
    for noise in ("WARNING", "it/s", "Building contexts"):
        assert noise not in said


def test_the_stage_gives_the_same_in_two_processes_and_is_stale_when_a_task_changes(
    folder: Path, model_dir: Path, tmp_path: Path
) -> None:
    recipe = {
        "name": "asked",
        "stages": ["evaluate"],
        "base": str(model_dir),
        "threads": 1,
        "data": {"root": str(tmp_path)},
        "evaluate": {"fewshot": {"tasks": []}, "harness": {"tasks": ["mine"], "include": "tasks", "items": 8}},
    }
    (tmp_path / "asked.yaml").write_text(yaml.safe_dump(recipe))
    found = []
    for processes in ("1", "2"):
        options = ["--recipe", "asked.yaml", "--processes", processes, "--runs-dir", processes]
        rlhf("run", "evaluate", *options, cwd=tmp_path)
        found.append(json.loads((tmp_path / processes / "asked" / "evaluate" / "summary.json").read_text())["models"])
    assert found[0] == found[1]
    assert found[0]["base"]["harness"]["mine"]["items"] == 8
    (folder / "more").mkdir()
    write_yaml(folder, "mine", **CHOICE, num_fewshot=1).rename(folder / "more" / "mine.yaml")
    said = rlhf("run", "evaluate", "--recipe", "asked.yaml", "--runs-dir", "1", cwd=tmp_path)
    assert "redone, since harness tasks has changed" in said


# What is refused without lm_eval


def recipe_with(*overrides: str) -> Recipe:
    return load_recipe(str(TINY_RECIPE), list(overrides))


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)


@pytest.mark.usefixtures("nothing_installed")
def test_without_lm_eval_a_recipe_that_asks_for_it_is_refused_before_anything_runs() -> None:
    recipe = recipe_with("evaluate.harness.tasks=[arc_easy]")
    with pytest.raises(UserError, match=r"pip install 'rlhf\[harness\]'"):
        check_inputs(recipe, ("evaluate",), 1)
    with pytest.raises(UserError, match=r"pip install 'rlhf\[harness\]'"):
        open_harness(["arc_easy"])
    check_inputs(recipe_with(), ("evaluate",), 1)  # nobody asks


def test_a_folder_that_is_not_there_is_missing_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: object())
    check_installed()
    more = ["evaluate.harness={tasks: [mine], include: nowhere}", f"data.root={tmp_path}"]
    with pytest.raises(MissingInput, match=r"evaluate.harness.include: no folder .*nowhere"):
        check_inputs(recipe_with(*more), ("evaluate",), 1)
    with pytest.raises(MissingInput, match="nowhere"):
        stage_inputs(recipe_with(*more), "evaluate", RunDir(tmp_path / "run"))


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ("{include: mine}", "of no use without tasks"),
        ("{tasks: [a, a]}", "there twice"),
        ("{tasks: [a], items: 0}", "items"),
        ("{task: [a]}", "did you mean 'tasks'"),
    ],
)
def test_a_section_that_makes_no_sense_is_refused(section: str, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        recipe_with(f"evaluate.harness={section}")


def test_a_recipe_may_ask_for_nothing_else() -> None:
    recipe_with("evaluate={fewshot: {tasks: []}, harness: {tasks: [arc_easy]}}")
    with pytest.raises(RecipeError, match="nothing to measure"):
        recipe_with("evaluate={fewshot: {tasks: []}}")


def test_tasks_and_their_files_count_among_what_a_stage_stands_on(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    (folder / "below").mkdir()
    more = [f"data.root={tmp_path}", "evaluate.harness={tasks: [mine], include: tasks}"]
    run = RunDir(tmp_path / "run")
    first = stage_inputs(recipe_with(*more), "evaluate", run)
    assert first["evaluate.harness.tasks"] == ["mine"]
    (folder / "below" / "part.yaml").write_text("a: 1\n")
    second = stage_inputs(recipe_with(*more), "evaluate", run)
    assert {key for key in first if first[key] != second[key]} == {"harness tasks"}
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "utils.pyc").write_bytes(b"made by Python")
    assert stage_inputs(recipe_with(*more), "evaluate", run) == second


def test_a_stage_from_before_there_was_this_section_is_not_stale(tmp_path: Path) -> None:
    recipe, run = recipe_with("stages=[evaluate]", f"base={tmp_path}"), RunDir(tmp_path / "run")
    run.create()
    begin_stage(recipe, "evaluate", run, "rlhf")
    manifest = json.loads(run.stage("evaluate").manifest_file.read_text())
    manifest["inputs"] = {key: value for key, value in manifest["inputs"].items() if ".harness." not in key}
    write_json(run.stage("evaluate").manifest_file, manifest)
    assert state_of(recipe, "evaluate", run).name == "interrupted"  # as it was left, and not stale


def test_the_command_takes_tasks_of_one_folder(tmp_path: Path) -> None:
    assert _harness_section(["arc_easy"]) == {"tasks": ["arc_easy"], "include": None}
    assert _harness_section([f"{tmp_path}/a", "b"]) == {"tasks": ["a", "b"], "include": str(tmp_path)}
    with pytest.raises(UserError, match="one folder at a time"):
        _harness_section(["here/a", "there/b"])


def test_the_table_shows_every_model() -> None:
    figures = {"acc": 0.25, "acc_stderr": 0.125, "f1": None, "f1_stderr": None, "version": 1, "shots": 2}
    results = {name: {"mine": {**figures, "items": 1000, "cut": 3}} for name in ("base", "[b]sft")}
    console = Console(width=120, record=True, quiet=False)
    with console.capture() as said:
        console.print(harness_table(results))
    for words in ("mine", "1,000 (3 cut)", "0.2500 ± 0.1250", "base", "[b]sft"):
        assert words in said.get()
    assert said.get().count("0.2500") == 2


def test_items_of_several_tasks_are_counted_once(tmp_path: Path) -> None:
    assert Suite(harness=Harness({"tasks": {}}, None, 12), texts={"a": ["b"]}).size == 13
