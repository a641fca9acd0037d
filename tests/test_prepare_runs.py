"""Whole corpora: made, killed and gone on with, kept and made anew, bad rows and giants, what the card says of them."""

import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zstandard
from transformers import PreTrainedTokenizerBase

from evaluation.tasks import file_tasks
from rlhf import chain
from rlhf.data.prepare import reading, store
from rlhf.data.prepare.card import MADE
from rlhf.data.prepare.inputs import CORPUS, REPLAYED, corpus_inputs
from rlhf.data.prepare.packing import DOCUMENT, NO_FILE
from rlhf.data.reader import Faults
from rlhf.errors import DataError, MissingInput
from rlhf.recipe import Recipe, dump_recipe, parse_recipe
from rlhf.rundir import RunDir
from rlhf.tinyworld.documents import documents
from rlhf.worker import disk_full
from stages.corpus import Corpus, corpus_of, make_corpus
from stages.evaluate.training import _training_texts

from .conftest import ROOT, SHARED_DATA, rlhf

FILES = ("tokens.bin", "documents.bin", "removed.jsonl", "decontaminated.jsonl")
VOCABULARY = [f"{a}{b}{c}" for a in "bdfgkl" for b in "aeiou" for c in "mnrst"]


def text_of(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(VOCABULARY, k=words))


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def recipe_of(root: Path, train: list[dict[str, Any]], prepare: Any, **more: Any) -> Recipe:
    pretrain = {"train": train, "validation": train, "prepare": prepare, "tokens": 64, "tokens_per_step": 64}
    return parse_recipe(
        {
            "name": "made",
            "data": {"root": str(root), **more.pop("data", {})},
            "tokenizer": {"train": train},
            "pretrain": {**pretrain, "sequence_length": 32, "learning_rate": 1e-3, **more.pop("pretrain", {})},
            "stages": ["tokenizer", "pretrain"],
            "threads": 1,
            **more,
        },
        "here",
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "runs" / "made")
    found.create()
    return found


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few texts are several chunks and parts."""
    monkeypatch.setattr(reading, "CHUNK_CHARACTERS", 2_000)
    monkeypatch.setattr(reading, "PART_CHARACTERS", 10_000)


def bytes_of(corpus: Corpus) -> list[bytes]:
    return [(corpus.folder / name).read_bytes() for name in FILES]


def lines_of(corpus: Corpus, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (corpus.folder / name).read_text(encoding="utf-8").splitlines()]


def some_rows(count: int = 120) -> list[dict[str, Any]]:
    draw = random.Random(7)
    texts = [text_of(draw, draw.randint(20, 90)) for _ in range(count)]
    for number in range(10, count, 10):
        words = texts[number - 7].split()
        words[draw.randrange(len(words))] = "other"
        texts[number] = " ".join(words) if number % 20 else texts[number - 7]
    return [{"text": text} for text in texts]


# As they are


def test_texts_as_they_are_are_packed_as_ever(tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase) -> None:
    first = write_lines(tmp_path / "a.jsonl", [{"text": "one  two"}, {"text": ""}, {"text": "three"}])
    write_lines(tmp_path / "b.jsonl", [{"text": f"row {n}"} for n in range(40)])
    train: list[dict[str, Any]] = [
        {"path": first.name, "weight": 2},
        {"path": "b.jsonl", "weight": 0.5, "rows": 30},
    ]
    corpus = make_corpus(recipe_of(tmp_path, train, None), run, tokenizer)
    wanted = ["one  two", "", "three"] * 2
    texts = list(corpus.texts(tokenizer))
    assert texts[:6] == wanted
    assert 5 <= len(texts) - 6 <= 25 and set(texts[6:]) <= {f"row {n}" for n in range(30)}
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = [i for text in texts for i in (begin, *tokenizer(text, add_special_tokens=False)["input_ids"], end)]
    assert np.fromfile(corpus.folder / "tokens.bin", dtype=np.uint16).tolist() == ids
    assert corpus.stats == (len(texts), len(ids), sum(len(text) for text in texts))
    assert corpus.card["sources"]["a.jsonl"]["out"]["documents"] == 6
    assert corpus.summary()["sources"]["a.jsonl"]["documents"] == 6


# Prepared


def test_everything_adds_up(tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase, small_parts: None) -> None:
    rows = some_rows()
    rows[3] = {"text": "too short"}
    rows[4] = {"text": f"cafÃ© {rows[4]['text']}\r\nline"}
    rows[5] = {"text": f"{rows[5]['text']} mail a@b.com"}
    write_lines(tmp_path / "a.jsonl", rows[:60])
    write_lines(tmp_path / "b.jsonl", [*rows[60:], "no JSON"])
    train: list[dict[str, Any]] = [{"path": "a.jsonl", "weight": 2, "name": "first"}, {"path": "b.jsonl"}]
    prepare = {"personal_data": {"email": True}}
    recipe = recipe_of(tmp_path, train, prepare, data={"on_bad_row": "skip"})
    corpus = make_corpus(recipe, run, tokenizer)
    card, removed = corpus.card, lines_of(corpus, "removed.jsonl")
    assert [(line["why"], line["line"]) for line in removed if line["why"] == "min_words"] == [("min_words", 4)]
    assert {line["why"] for line in removed} == {"min_words", "exact_duplicates", "near_duplicates"}
    assert all(line["of"]["file"] for line in removed if line["why"] != "min_words")
    assert card["bad_rows"] == 1
    assert card["in"]["documents"] == 120
    assert card["in"]["bytes"] == sum(len(row["text"].encode()) for row in rows)
    gone = {name: sum(figures["removed"].values()) for name, figures in card["sources"].items()}
    assert sum(gone.values()) == len(removed) == sum(figures["documents"] for figures in card["removed"].values())
    out = {name: figures["out"]["documents"] for name, figures in card["sources"].items()}
    assert out == {"first": 2 * (60 - gone["first"]), "b.jsonl": 60 - gone["b.jsonl"]}
    assert card["cleaned"] == {"encoding": 1, "line_ends": 1}
    assert card["masked"] == {"email": 1}
    texts = list(corpus.texts(tokenizer))
    assert len(texts) == sum(out.values()) == card["out"]["documents"]
    assert sum("[EMAIL]" in text for text in texts) == 2  # a weight of 2 is no duplicate
    assert sum("café" in text for text in texts) == 2
    tokens = np.fromfile(corpus.folder / "tokens.bin", dtype=np.uint16)
    places = np.fromfile(corpus.folder / "documents.bin", dtype=DOCUMENT)
    assert card["out"]["tokens"] == len(tokens) == int(places["tokens"].sum())
    assert (tokens[places["start"].astype(int)] == tokenizer.bos_token_id).all()
    row = places[0]
    assert card["files"][row["file"]].endswith("a.jsonl") and int(row["row"]) == 1
    assert not (corpus.folder / "work").exists()


def test_every_step_can_be_off(tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [*some_rows(40), {"text": "short\r\n"}]
    write_lines(tmp_path / "a.jsonl", rows)
    off = {"cleaning": "off", "filters": False, "exact_duplicates": False, "near_duplicates": None,
           "decontamination": "off", "personal_data": "off", "incontext": "off"}  # fmt: skip
    corpus = make_corpus(recipe_of(tmp_path, [{"path": "a.jsonl"}], off), run, tokenizer)
    assert list(corpus.texts(tokenizer)) == [row["text"] for row in rows]
    assert corpus.card["removed"] == {}
    whole = recipe_of(tmp_path, [{"path": "a.jsonl"}], "off")
    assert whole.pretrain and whole.pretrain.prepare is None


def test_a_weight_that_leaves_nothing_is_refused(
    tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_lines(tmp_path / "a.jsonl", some_rows(5))
    with pytest.raises(DataError, match="nothing was left after rows and weight"):
        make_corpus(recipe_of(tmp_path, [{"path": "a.jsonl", "weight": 0.001}], {}), run, tokenizer)
    assert corpus_of(run) is None


def test_processes_change_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, small_parts: None) -> None:
    write_lines(tmp_path / "a.jsonl", some_rows(60))
    found = []
    for processes in (1, 2):
        run = RunDir(tmp_path / f"runs{processes}" / "made")
        run.create()
        recipe = recipe_of(tmp_path, [{"path": "a.jsonl"}], {}, threads=processes)
        found.append(bytes_of(make_corpus(recipe, run, tokenizer)))
    assert found[0] == found[1]


# Killed

SAVES = (store.Store.add, store.Store.keep_array, store.Store.keep_facts)


def killed_at(save: int, make: Any) -> bool:
    """Makes it in a process of its own that is killed with -9 within the n-th thing that it keeps; whether it was."""
    child = os.fork()
    if child == 0:
        left = save

        def dying(keep: Any) -> Any:
            def kept(*arguments: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return keep(*arguments)

            return kept

        for keep in SAVES:
            setattr(store.Store, keep.__name__, dying(keep))
        try:
            make()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, small_parts: None
) -> None:
    write_lines(tmp_path / "a.jsonl", some_rows())
    write_lines(tmp_path / "t" / "task.train.jsonl", [{"input": f"{n}", "target": f"t{n}"} for n in range(9)])
    incontext = {"share": 0.2, "tasks": ["t"], "shots": [0, 2]}
    train: list[dict[str, Any]] = [{"path": "a.jsonl", "weight": 1.5}, {"builtin": "tinyworld", "rows": 30}]
    recipe = recipe_of(tmp_path, train, {"incontext": incontext})
    whole, broken = RunDir(tmp_path / "whole"), RunDir(tmp_path / "broken")
    whole.create()
    broken.create()
    undisturbed = make_corpus(recipe, whole, tokenizer)
    kills = 0
    for save in itertools.cycle((4, 1, 6, 5, 9)):  # a part or a block at a time, more or less
        if not killed_at(save, lambda: make_corpus(recipe, broken, tokenizer)):
            break
        kills += 1
        assert kills < 60
    corpus = make_corpus(recipe, broken, tokenizer)
    assert kills >= 5
    assert bytes_of(corpus) == bytes_of(undisturbed)
    both = [{k: v for k, v in one.card.items() if k not in ("seconds",)} for one in (corpus, undisturbed)]
    assert both[0] == both[1]


def test_what_other_versions_have_begun_begins_again(
    tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase, small_parts: None, capsys: Any
) -> None:
    write_lines(tmp_path / "a.jsonl", some_rows())
    recipe = recipe_of(tmp_path, [{"path": "a.jsonl"}], {})
    assert killed_at(5, lambda: make_corpus(recipe, run, tokenizer))
    versions = run.path / "corpus" / "work" / "versions.json"
    versions.write_text(versions.read_text().replace('"rensa": "', '"rensa": "9.'))
    assert make_corpus(recipe, run, tokenizer).card["in"]["documents"] == 120
    assert "begins again" in capsys.readouterr().out


def test_a_full_disk_is_known_as_numpy_says_it() -> None:
    assert disk_full(OSError("162272 requested and 18400 written"))
    assert not disk_full(OSError("2 requested"))


BY_ITSELF = """import sys
from pathlib import Path
from rlhf.data.prepare import reading
reading.CHUNK_CHARACTERS, reading.PART_CHARACTERS = 20_000, 200_000
from rlhf.recipe import load_recipe
from rlhf.rundir import RunDir
from rlhf.tokenizer import load_tokenizer
from stages.corpus import make_corpus
make_corpus(load_recipe(sys.argv[1]), RunDir(Path(sys.argv[2])), load_tokenizer(sys.argv[3]))
"""


def test_a_killed_run_leaves_no_process_and_goes_on(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    draw = random.Random(3)
    write_lines(tmp_path / "a.jsonl", [{"text": text_of(draw, 300)} for _ in range(3000)])
    recipe = recipe_of(tmp_path, [{"path": "a.jsonl"}], {}, threads=2)
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run = RunDir(tmp_path / "made")
    run.create()
    command = [sys.executable, "-c", BY_ITSELF, str(tmp_path / "r.yaml"), str(run.path), str(tmp_path / "tokenizer")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (run.path / "corpus" / "work" / "part-00001").is_dir() and time.monotonic() < deadline:
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert corpus_of(run) is None
    parts = len(list((run.path / "corpus" / "work").glob("part-?????")))
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    corpus = corpus_of(run)
    assert parts >= 2 and corpus and corpus.card["in"]["documents"] == 3000


# Kept, or made anew


def test_it_is_kept_as_long_as_what_it_is_made_from_is_the_same(
    tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", some_rows(30))
    train = [{"path": "a.jsonl"}]

    def make(prepare: Any, **more: Any) -> str:
        make_corpus(recipe_of(tmp_path, train, prepare, **more), run, tokenizer)
        return capsys.readouterr().out

    assert "as it was made" not in make({})
    assert "as it was made" in make({})
    assert "as it was made" in make({}, pretrain={"learning_rate": 0.5}, data={"on_bad_row": "skip"})
    assert "prepare.filters.min_words has changed (the old one is now corpus.stale-1)" in make(
        {"filters": {"min_words": 6}}
    )
    assert "as it was made" in make({"filters": {"min_words": 6}})
    write_lines(path, some_rows(31))
    assert "file a.jsonl has changed" in make({"filters": {"min_words": 6}})
    assert "prepare.cleaning.encoding has changed" in make(None)
    tokens = run.path / "corpus" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2] + b"\x00\x01")
    assert "its tokens.bin was changed" in make(None)
    assert "seed has changed" in make(None, seed=3)
    assert "as it was made" in make(None, seed=3)


def test_bad_texts_leave_the_old_corpus_in_its_place(
    tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_lines(tmp_path / "a.jsonl", some_rows(30))
    recipe = recipe_of(tmp_path, [{"path": "a.jsonl"}], {})
    before = bytes_of(make_corpus(recipe, run, tokenizer))
    write_lines(path, [*some_rows(30), "{"])
    with pytest.raises(DataError, match=r"a\.jsonl, line 31: not valid JSON"):
        make_corpus(recipe, run, tokenizer)
    found = corpus_of(run)
    assert found and bytes_of(found) == before
    assert not list(run.path.glob("corpus.stale*"))
    assert "the old one is back in its place" in capsys.readouterr().out


def test_a_new_file_is_called_new(
    tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "a.jsonl", some_rows(30))
    for file, told in (("b.jsonl", "file b.jsonl is new"), (None, "file b.jsonl is no longer read")):
        make_corpus(recipe_of(tmp_path, [{"path": "*.jsonl"}], {}), run, tokenizer)
        if file:
            write_lines(tmp_path / file, [{"text": "one more document of six words"}])
        else:
            (tmp_path / "b.jsonl").unlink()
        make_corpus(recipe_of(tmp_path, [{"path": "*.jsonl"}], {}), run, tokenizer)
        assert told in capsys.readouterr().out


def test_replayed_texts_are_prepared_too(tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase) -> None:
    draw = random.Random(5)
    item, old = text_of(draw, 20), [text_of(draw, 40) for _ in range(30)]
    shown = [{"instruction": "Go.", "input": text_of(draw, 20), "target": "so"}]
    write_task(tmp_path / "tasks", "asked", [{"instruction": "Go.", "input": item, "target": "so"}], shown)
    write_lines(tmp_path / "new.jsonl", some_rows(30))
    write_lines(tmp_path / "old.jsonl", [{"text": text} for text in [*old, old[3], f"{old[4]} {item}"]])
    replay = {"train": [{"path": "old.jsonl"}], "share": 0.5}
    evaluate = {"fewshot": {"tasks": ["tasks/asked"], "shots": [0]}}
    tokenizer.save_pretrained(tmp_path / "base")
    more = {"base": str(tmp_path / "base"), "tokenizer": None, "stages": ["pretrain"], "evaluate": evaluate}
    recipe = recipe_of(tmp_path, [{"path": "new.jsonl"}], {}, pretrain={"replay": replay}, **more)
    corpus = make_corpus(recipe, run, tokenizer, REPLAYED)
    assert sorted(corpus.texts(tokenizer)) == sorted(old)
    assert {why: figures["documents"] for why, figures in corpus.card["removed"].items()} == {
        "exact_duplicates": 1,
        "decontamination": 1,
    }
    make_corpus(recipe, run, tokenizer)
    read = {key for key, _ in _training_texts(recipe, run)}
    assert read == {"pretrain.train", "pretrain.replay.train"}
    prepare = {"incontext": {"share": 0.5, "tasks": ["tasks/asked"], "shots": [0]}}  # made of the new texts alone
    other = recipe_of(tmp_path, [{"path": "new.jsonl"}], prepare, pretrain={"replay": replay}, **more)
    same = {name: corpus_inputs(recipe, name, "") == corpus_inputs(other, name, "") for name in (CORPUS, REPLAYED)}
    assert same == {CORPUS: False, REPLAYED: True}


def test_switching_preparation_on_makes_pretrain_stale(tmp_path: Path, run: RunDir) -> None:
    write_lines(tmp_path / "a.jsonl", some_rows(5))

    def state(was: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
        recipes = [
            recipe_of(tmp_path, [{"path": "a.jsonl"}], prepare).model_copy(update={"stages": ("pretrain",)})
            for prepare in (was, now)
        ]
        run.stage("pretrain").path.mkdir(exist_ok=True)
        inputs = chain.stage_inputs(recipes[0], "pretrain", run)
        run.stage("pretrain").manifest_file.write_text(json.dumps({"inputs": inputs}))
        return chain.state_of(recipes[1], "pretrain", run).name

    assert (state(None, None), state({}, {})) == ("interrupted", "interrupted")
    assert (state(None, {}), state({}, None)) == ("stale", "stale")
    assert (state({"near_duplicates": "off"}, {}), state({}, {"filters": "off"})) == ("stale", "stale")


# Few-shot tasks


def write_task(folder: Path, name: str, test: list[dict[str, Any]], train: list[dict[str, Any]]) -> None:
    write_lines(folder / f"{name}.test.jsonl", test)
    write_lines(folder / f"{name}.train.jsonl", train)


def test_documents_with_test_items_are_removed_and_listed(
    tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase, small_parts: None
) -> None:
    draw = random.Random(1)
    questions = [text_of(draw, 20) for _ in range(6)]
    test = [{"instruction": "Answer it.", "input": question, "target": "yes"} for question in questions[:4]]
    train = [{"instruction": "Answer it.", "input": question, "target": "no"} for question in questions[4:]]
    write_task(tmp_path / "tasks", "asked", test, train)
    write_task(tmp_path / "tasks", "short", [{"input": "five words are quite enough", "target": "yes"}], train)
    rows = some_rows(40)
    planted = questions[2].upper().replace(" ", ", ").split(", ")[3:16]
    rows[7]["text"] += " " + " ".join(planted)  # thirteen words
    rows[8]["text"] += " " + " ".join(questions[1].split()[3:15])  # twelve
    rows[9]["text"] += " and Five words: are quite ENOUGH here"
    rows[11]["text"] += " " + questions[4]  # a training row
    write_lines(tmp_path / "a.jsonl", rows)
    evaluate = {"fewshot": {"tasks": ["tasks"]}}
    corpus = make_corpus(recipe_of(tmp_path, [{"path": "a.jsonl"}], {}, evaluate=evaluate), run, tokenizer)
    listed = lines_of(corpus, "decontaminated.jsonl")
    assert [(line["line"], line["items"]) for line in listed] == [
        (8, [{"task": "asked", "item": 2}]),
        (10, [{"task": "short", "item": 0}]),
    ]
    assert listed[0]["words"] == " ".join(planted).lower()
    assert corpus.card["removed"]["decontamination"]["documents"] == 2


def test_in_context_documents_are_made_of_training_rows_alone(
    tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase
) -> None:
    train = [
        {"instruction": "Name it.", "input": f"thing {n}", "choices": ["a", "b"], "answer": n % 2} for n in range(7)
    ]
    test = [{"instruction": "Name it.", "input": f"secret {n}", "choices": ["a", "b"], "answer": 0} for n in range(7)]
    write_task(tmp_path / "tasks", "things", test, train)
    (tmp_path / "tasks" / "things.yaml").write_text(
        'demonstration: "<{input}={answer}>"\nitem: "<{input}="\ndelimiter: ""'
    )
    write_lines(tmp_path / "a.jsonl", [{"text": text_of(random.Random(n), 30)} for n in range(60)])
    incontext = {"share": 0.25, "tasks": ["tasks/things"], "shots": [0, 3, 8]}
    recipe = recipe_of(tmp_path, [{"path": "a.jsonl"}], {"incontext": incontext})
    corpus = make_corpus(recipe, run, tokenizer)
    texts = list(corpus.texts(tokenizer))
    made = [text for text in texts if text.startswith("Name it.")]
    assert len(texts) == 80 and len(made) == 20
    assert corpus.card["sources"][MADE]["out"]["documents"] == 20
    assert corpus.card["incontext"]["shots_left_out"] == {"things": [8]}
    assert {text.count("=") for text in made} == {1, 4}
    assert "secret" not in "".join(texts)
    for text in made:
        for part in text.removeprefix("Name it.\n\n").removeprefix("<").split("<"):
            number, answer = part.removeprefix("thing ").rstrip(">").split("=")
            assert answer == "ab"[int(number) % 2]
    places = np.fromfile(corpus.folder / "documents.bin", dtype=DOCUMENT)
    assert int((places["file"] == NO_FILE).sum()) == 20
    with pytest.raises(MissingInput, match=r"no folder .*, and no file .*nothing\.train\.jsonl"):
        chain.check_inputs(
            recipe_of(tmp_path, [{"path": "a.jsonl"}], {"incontext": {**incontext, "tasks": ["nothing"]}}),
            ("pretrain",),
            1,
        )


def test_no_in_context_document_holds_a_test_item(
    tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(3)
    rows = [{"instruction": "Go.", "input": text_of(draw, 20), "target": "so"} for _ in range(12)]
    write_task(tmp_path / "tasks", "leaking", rows[8:], rows)  # the last four are test items too
    write_lines(tmp_path / "a.jsonl", [{"text": text_of(draw, 30)} for _ in range(60)])
    prepare = {"incontext": {"share": 0.5, "tasks": ["tasks/leaking"], "shots": [0, 2]}}
    evaluate = {"fewshot": {"tasks": ["tasks/leaking"], "shots": [0]}}
    recipe = recipe_of(tmp_path, [{"path": "a.jsonl"}], prepare, evaluate=evaluate)
    corpus = make_corpus(recipe, run, tokenizer)
    made = "".join(corpus.texts(tokenizer))
    assert corpus.card["incontext"]["rows_held_back"] == {"leaking": 4}
    assert [row["input"] in made for row in rows] == [True] * 8 + [False] * 4
    assert "4 training rows of leaking are in no in-context document" in capsys.readouterr().out


def test_evaluation_looks_into_what_was_trained_on(
    tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_lines(tmp_path / "a.jsonl", some_rows(40))
    recipe = recipe_of(tmp_path, [{"path": "a.jsonl"}], {})
    tokenizer.save_pretrained(run.stage("tokenizer").model)
    read = [list(itertools.chain(*(texts for _, texts in _training_texts(recipe, run))))]
    corpus = make_corpus(recipe, run, tokenizer)
    read.append(list(itertools.chain(*(texts for _, texts in _training_texts(recipe, run)))))
    assert read[0] == [row["text"] for row in some_rows(40)]
    assert read[1] == list(corpus.texts(tokenizer)) and len(read[1]) == 37


# Files


def test_compressed_files_and_long_texts(
    tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = some_rows(30)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    monkeypatch.setattr("rlhf.data.reader.WHOLE_TEXT_BYTES", 5_000)
    monkeypatch.setattr("rlhf.data.reader.PART_CHARACTERS", 2_000)
    long = "\n\n".join(text_of(random.Random(n), 40) for n in range(100))
    (tmp_path / "long.txt.zst").write_bytes(zstandard.compress(long.encode()))
    train = [{"path": name} for name in ("a.jsonl.gz", "a.jsonl.zst", "long.txt.zst")]
    corpus = make_corpus(recipe_of(tmp_path, train, {"near_duplicates": "off"}), run, tokenizer)
    sources = corpus.card["sources"]
    assert sources["a.jsonl.zst"]["removed"]["exact_duplicates"] == 30
    assert sources["long.txt.zst"]["in"]["documents"] > 5
    texts = list(corpus.texts(tokenizer))[-sources["long.txt.zst"]["out"]["documents"] :]
    assert "\n\n".join(texts) == long  # cut at blank lines
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines)[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst: the zstd file is cut short"):
        make_corpus(recipe_of(tmp_path, train[1:2], {}), run, tokenizer)


EXPECT = SHARED_DATA / "malformed" / "EXPECT.json"


def malformed() -> Iterator[tuple[str, dict[str, Any]]]:
    if EXPECT.is_file():
        for name, fact in json.loads(EXPECT.read_text(encoding="utf-8")).items():
            if fact["kind"] in ("sft", "any"):
                yield name, fact


@pytest.mark.parametrize(("name", "fact"), malformed())
def test_malformed_files_are_refused_or_counted(
    name: str, fact: dict[str, Any], tmp_path: Path, run: RunDir, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = EXPECT.parent
    off = {"filters": "off", "exact_duplicates": False, "near_duplicates": "off"}

    def made(on_bad_row: str) -> Corpus:
        recipe = recipe_of(folder, [{"path": name}], off, data={"on_bad_row": on_bad_row})
        return make_corpus(recipe, run, tokenizer)

    bad_lines = [3, 4] if name == "missing_field_sft.jsonl" else fact["bad_lines"]  # its line 2 is a text
    good_rows = fact["good_rows"] and fact["good_rows"] + len(fact["bad_lines"]) - len(bad_lines)
    if fact["class"] in ("empty", "not_jsonl", "container"):
        for mode in ("error", "skip"):
            with pytest.raises(DataError, match=name.replace(".", r"\.")):
                made(mode)
        return
    if bad_lines:
        with pytest.raises(DataError, match=rf"{name.replace('.', '[.]')}, line {bad_lines[0]}: "):
            made("error")
    if fact["class"] == "encoding":
        with pytest.raises(DataError, match="no good row"):
            made("skip")
        return
    card = made("skip").card
    assert card["bad_rows"] >= len(bad_lines)
    if good_rows is not None:
        assert (card["in"]["documents"], card["bad_rows"]) == (good_rows, len(bad_lines))


# The command


def test_the_command(tmp_path: Path) -> None:
    rows = [{"text": text} for text in itertools.islice(documents("train", 1), 300)]
    write_lines(tmp_path / "a.jsonl", rows)
    train = [{"path": "a.jsonl"}]
    recipe = recipe_of(tmp_path, train, {}, tokenizer={"train": train, "vocab_size": 300})
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    said = rlhf("prepare", "--recipe", "r.yaml", cwd=tmp_path, code=2)
    assert "rlhf run tokenizer --recipe r.yaml" in said
    rlhf("run", "tokenizer", "--recipe", "r.yaml", cwd=tmp_path)
    said = rlhf("prepare", "pretrain.prepare.near_duplicates=off", "--recipe", "r.yaml", cwd=tmp_path)
    assert "300 documents" in said and "tokens" in said
    assert "near_duplicates" not in json.loads((tmp_path / "runs/made/corpus/card.json").read_text())["removed"]
    said = rlhf("run", "pretrain", "--recipe", "r.yaml", cwd=tmp_path)
    assert "made anew, since prepare.near_duplicates" in said
    summary = json.loads((tmp_path / "runs/made/pretrain/summary.json").read_text())
    assert summary["corpus"]["documents_in"] == 300
    assert summary["training_documents"] == summary["corpus"]["documents"]
    assert "corpus" in rlhf("status", "runs/made", cwd=tmp_path)


def test_task_files_of_training_rows_are_read_without_tests(tmp_path: Path) -> None:
    from evaluation.tasks import training_examples

    write_lines(tmp_path / "t.train.jsonl", [{"instruction": "Do.", "input": "x", "target": "y"}])
    (example,) = training_examples(tmp_path, Faults(), "t")["t"]
    assert example == ("Do.\n\n", "Input: x\nOutput: y\n\n", "Input: x\nOutput: y")
    with pytest.raises(DataError, match=r"no file \*\.test\.jsonl"):
        file_tasks(tmp_path, Faults())
