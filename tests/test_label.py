"""`rlhf label`: what is asked, what is kept, and how it looks, in a terminal of 80 columns and through a pipe."""

import fcntl
import io
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.reader import Faults
from rlhf.data.rows import Comparison
from rlhf.data.sources import DataSet, from_files
from rlhf.errors import DataError, MissingInput, RlhfError, UserError
from rlhf.label.answers import Answer, AnswerLog, tally
from rlhf.label.pairs import Pair, Question, in_order, next_question, read_pairs
from rlhf.label.screen import shares
from rlhf.label.session import label, person
from rlhf.rundir import write_atomically
from tests.conftest import ROOT, rlhf

CHINESE = "落霞与孤鹜齐飞，秋水共长天一色。渔舟唱晚，响穷彭蠡之滨；雁阵惊寒，声断衡阳之浦。"


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def pair(number: int, split: str = "train") -> Pair:
    return Pair.of(user(f"q{number}"), (f"a{number}", f"b{number}"), split)


def run_with(folder: Path, rows: Sequence[dict[str, Any]], split: str = "train") -> Path:
    """A run's directory with responses as the reward stage leaves them."""
    (folder / "reward").mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text("name: run\n", encoding="utf-8")
    text = "".join(json.dumps({**row, "split": split}, ensure_ascii=False) + "\n" for row in rows)
    (folder / "reward" / f"responses.{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def rows(count: int, responses: int = 2) -> list[dict[str, Any]]:
    return [
        {"prompt": user(f"q{i}"), "responses": [f"{'abcdef'[j]}{i}" for j in range(responses)]} for i in range(count)
    ]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


# What is asked, and in which order


def test_every_two_different_responses_of_a_row_are_a_pair_and_each_pair_comes_once(tmp_path: Path) -> None:
    given_rows = [
        {"prompt": "q", "responses": ["a", "b", "a", "c"]},
        {"prompt": user("q"), "responses": ["b", "a"]},
        {"prompt": "r", "responses": ["a", "a"]},
        {"prompt": "q", "chosen": "c", "rejected": "d", "split": "test"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given_rows), encoding="utf-8")
    found = read_pairs([path], Faults())
    expected = {("a", "b"): "train", ("a", "c"): "train", ("b", "c"): "train", ("c", "d"): "test"}
    assert {pair.responses: pair.split for pair in found} == expected
    assert all(pair.prompt == user("q") for pair in found)


def test_files_without_a_pair_and_bad_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "responses": ["a", "a"]}\n{"prompt": "q"}\n', encoding="utf-8")
    with pytest.raises(
        DataError, match=r"no prompt with two different responses. skipped 1 bad rows .*line 2: no `chos"
    ):
        read_pairs([path], Faults("skip"))
    path.write_text('{"prompt": "q", "responses": ["a", "b"], "split": "dev"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="`split` is 'dev', not train or test"):
        read_pairs([path], Faults())


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), seed=st.integers(0, 5))
def test_no_prompt_gets_a_further_pair_before_all_have_had_as_many(sizes: list[int], seed: int) -> None:
    pairs = [
        Pair.of(user(f"q{prompt}"), ("a", f"b{number}"), "train")
        for prompt, size in enumerate(sizes)
        for number in range(size)
    ]
    order = in_order(pairs, seed)
    assert sorted(order) == sorted(pairs)
    assert order == in_order(pairs[::-1], seed)
    seen: Counter[str] = Counter()
    for asked in order:
        prompt = asked.prompt[0]["content"]
        assert all(seen[f"q{i}"] >= min(seen[prompt], size) for i, size in enumerate(sizes))
        seen[prompt] += 1


def test_the_order_is_random_by_the_seed() -> None:
    pairs = [pair(i) for i in range(30)]
    assert in_order(pairs, 1) != pairs
    assert in_order(pairs, 1) != in_order(pairs, 2)


def sit(order: list[Pair], repeats: float, seed: int = 1, said: str = "1") -> list[Answer]:
    """The answers of somebody who says the same to everything."""
    answers: list[Answer] = []
    while question := next_question(order, answers, seed, repeats):
        answers.append(Answer(question.pair, question.first, said, question.repeat))
    return answers


def test_without_repeats_each_pair_is_asked_once_in_order() -> None:
    order = [pair(i) for i in range(40)]
    assert [answer.pair for answer in sit(order, repeats=0.0)] == order


def test_repeats_come_about_as_often_as_asked_and_late_enough_and_once() -> None:
    order = [pair(i) for i in range(1000)]
    answers = sit(order, repeats=0.1)
    firsts = [answer for answer in answers if not answer.repeat]
    assert [answer.pair for answer in firsts] == order
    again = [number for number, answer in enumerate(answers) if answer.repeat]
    assert 70 <= len(again) <= 150  # 1,111 questions, a tenth of them: 111, and 4 standard errors are 40
    places = {answer.pair.id: number for number, answer in enumerate(answers) if not answer.repeat}
    assert all(number - places[answers[number].pair.id] >= 5 for number in again)
    assert len({answers[number].pair.id for number in again}) == len(again)


def test_a_repeat_comes_at_the_fifth_question_after_the_answer_at_the_earliest() -> None:
    order = [pair(i) for i in range(10)]
    asked = [order.index(answer.pair) for answer in sit(order, repeats=1.0)]  # a repeat whenever one may come
    assert asked == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]


def test_a_skipped_pair_is_not_asked_again() -> None:
    assert not any(answer.repeat for answer in sit([pair(i) for i in range(100)], repeats=0.5, said="skip"))


def test_which_response_stands_above_is_a_coin_thrown_anew_for_a_repeat() -> None:
    answers = sit([pair(i) for i in range(1000)], repeats=0.3)
    assert 420 <= sum(answer.first for answer in answers if not answer.repeat) <= 580
    firsts = {answer.pair.id: answer.first for answer in answers if not answer.repeat}
    same = [answer.first == firsts[answer.pair.id] for answer in answers if answer.repeat]
    assert 0.4 < sum(same) / len(same) < 0.6


# What is kept


def question(number: int, first: int = 0, repeat: bool = False) -> Question:
    return Question(pair(number), first, repeat)


def test_an_answer_is_in_both_files_when_it_is_given(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "ann") as log:
        log.record(question(0, first=1), "1", 2.345)  # the one above is number 1
        assert (
            lines_of(tmp_path / "answers" / "ann.jsonl")[0].items()
            >= {
                "pair": pair(0).id,
                "prompt": user("q0"),
                "responses": ["a0", "b0"],
                "split": "train",
                "first": 1,
                "answer": "1",
                "repeat": False,
                "seconds": 2.3,
            }.items()
        )
        assert lines_of(tmp_path / "ann.jsonl") == [
            {
                "prompt": user("q0"),
                "chosen": "b0",
                "rejected": "a0",
                "split": "train",
                "labeller": "ann",
                "source": "person:ann",
            }
        ]


def test_the_preference_file_is_what_rlhf_reads(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "ann") as log:
        for number, (first, said) in enumerate([(0, "1"), (0, "2"), (1, "2"), (0, "tie"), (0, "bad"), (0, "skip")]):
            log.record(question(number, first), said, 1.0)
    read = list(DataSet([from_files([tmp_path / "ann.jsonl"])], "comparisons", Faults(), 0))
    assert read == [
        Comparison(user("q0"), "a0", "b0", source="person:ann"),
        Comparison(user("q1"), "b1", "a1", source="person:ann"),
        Comparison(user("q2"), "a2", "b2", source="person:ann"),
    ]


def test_a_repeat_never_enters_the_preferences_and_the_first_answer_counts(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "ann") as log:
        for number, said in ((0, "1"), (1, "tie"), (0, "2"), (1, "1")):
            log.record(question(number), said, 1.0)
    assert [(row["chosen"], row["rejected"]) for row in lines_of(tmp_path / "ann.jsonl")] == [("a0", "b0")]


def test_undo_takes_the_last_answer_back_also_that_of_an_earlier_sitting(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "ann") as log:
        assert not log.undo()
        log.record(question(0), "1", 1.0)
        log.record(question(1), "2", 1.0)
        assert log.undo()
        assert [row["chosen"] for row in lines_of(tmp_path / "ann.jsonl")] == ["a0"]
        log.record(question(1), "1", 1.0)
    with AnswerLog(tmp_path, "ann") as log:
        assert [answer.answer for answer in log.answers] == ["1", "1"]
        assert log.undo() and log.undo() and not log.undo()
        assert not (tmp_path / "ann.jsonl").exists()  # a preference file without a row could not be read
    said = [line["answer"] for line in lines_of(tmp_path / "answers" / "ann.jsonl")]
    assert said == ["1", "2", "undo", "1", "undo", "undo"]  # nothing is ever lost from the log


def test_a_line_that_was_cut_anywhere_is_taken_off_and_asked_again(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "ann") as log:
        log.record(question(0), "1", 1.0)
        log.record(question(1), "1", 1.0)
    path = tmp_path / "answers" / "ann.jsonl"
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for size in (*range(start + 1, len(whole), 9), len(whole) - 1):
        path.write_bytes(whole[:size])
        with AnswerLog(tmp_path, "ann") as log:
            assert log.torn == size - start
            assert [answer.pair for answer in log.answers] == [pair(0)]
        assert path.read_bytes() == whole[:start]
        assert len(lines_of(tmp_path / "ann.jsonl")) == 1


def test_a_preference_that_was_not_written_any_more_is_written_at_the_next_start(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "ann") as log:
        log.record(question(0), "1", 1.0)
    (tmp_path / "ann.jsonl").write_text('{"prompt": [{"ro', encoding="utf-8")
    with AnswerLog(tmp_path, "ann"):
        assert [row["chosen"] for row in lines_of(tmp_path / "ann.jsonl")] == ["a0"]


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"answer": "3"}', '{"answer": "1", "responses": ["a"]}', "\x00\x00"]
)
def test_a_damaged_line_elsewhere_is_named(tmp_path: Path, line: str) -> None:
    with AnswerLog(tmp_path, "ann") as log:
        log.record(question(0), "1", 1.0)
    path = tmp_path / "answers" / "ann.jsonl"
    path.write_text(line + "\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"ann.jsonl, line 1: not an answer of `rlhf label`"):
        AnswerLog(tmp_path, "ann")
    assert path.read_bytes() == before


def test_one_person_labels_in_one_process_at_a_time(tmp_path: Path) -> None:
    with AnswerLog(tmp_path, "ann"):
        with pytest.raises(UserError, match="ann is labelling already, in another process"):
            AnswerLog(tmp_path, "ann")
        with AnswerLog(tmp_path, "bob"):
            pass
    with AnswerLog(tmp_path, "ann"):
        pass


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return write(file, data[:100])

    with AnswerLog(tmp_path, "ann") as log:
        log.record(question(0), "1", 1.0)
        before = log.path.read_bytes()
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            log.record(question(1), "1", 1.0)
        monkeypatch.undo()
        assert log.path.read_bytes() == before
        log.record(question(1), "2", 1.0)
        assert [answer.answer for answer in log.answers] == ["1", "2"]


def full_disk(monkeypatch: pytest.MonkeyPatch, module: str, *, below: int = 0) -> None:
    """os.fsync, as this module uses it, finds no room any more; `below` so many calls that still go well."""
    fsync, calls = os.fsync, itertools.count()

    def full(file: int) -> None:
        name = os.readlink(f"/proc/self/fd/{file}")
        if module in name and next(calls) >= below:
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)


def lines_in(folder: Path, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sitting in this process whose input is no terminal."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    label(folder, name="ann", pairs=None, repeats=0.0, seed=1)


def test_where_the_preferences_find_no_room_the_answer_is_in_the_log_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with(tmp_path, rows(3))
    with monkeypatch.context() as patch:
        full_disk(patch, ".ann.jsonl.tmp", below=1)
        with pytest.raises(RlhfError) as raised:
            lines_in(run, "1\n2\n1\n", patch)
    log, preferences = run / "labels/answers/ann.jsonl", run / "labels/ann.jsonl"
    said = str(raised.value)
    assert said.startswith(f"{preferences} can't be written: No space left on device. Every answer, the last one too")
    assert f"is kept in {log}" in said
    assert "free some space and give the same command again" in said
    assert [row["answer"] for row in lines_of(log)] == ["1", "2"]
    assert len(lines_of(preferences)) == 1
    assert [path.name for path in preferences.parent.iterdir() if "tmp" in path.name] == []
    lines_in(run, "", monkeypatch)
    assert len(lines_of(preferences)) == 2


def test_where_the_log_finds_no_room_the_answers_before_are_kept_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with(tmp_path, rows(3))
    log = run / "labels/answers/ann.jsonl"
    with monkeypatch.context() as patch:
        full_disk(patch, "answers/ann.jsonl", below=1)
        with pytest.raises(RlhfError, match=r"answers/ann.jsonl can't be written: .* counts for nothing; every answer"):
            lines_in(run, "1\n2\n1\n", patch)
    assert [row["answer"] for row in lines_of(log)] == ["1"]


def test_a_file_that_can_not_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "[a] file"
    path.write_text("before")
    done = subprocess.Popen(["true"])
    done.wait()
    of_the_dead, of_the_living, of_another = (
        tmp_path / f".{name}" for name in (f"{path.name}.tmp{done.pid}", f"{path.name}.tmp1", f"other.tmp{done.pid}")
    )
    for left in (of_the_dead, of_the_living, of_another):
        left.write_text("half")
    with monkeypatch.context() as patch:
        full_disk(patch, ".tmp")
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "after")
    assert path.read_text() == "before"
    assert set(tmp_path.iterdir()) == {path, of_the_living, of_another}
    write_atomically(path, "after")
    assert path.read_text() == "after"


# Agreement


def hand_made(*said: tuple[int, int, str]) -> list[Answer]:
    """Answers from (number of the pair, which response stood above, what was said)."""
    return [Answer(pair(number), first, answer, False) for number, first, answer in said]


def test_agreement_is_what_a_person_would_count() -> None:
    found = tally(
        hand_made(
            (0, 0, "1"),  # a
            (1, 0, "2"),  # b
            (2, 0, "tie"),
            (3, 0, "bad"),
            (4, 0, "skip"),
            (5, 1, "1"),  # b
            (0, 1, "2"),  # a again, the order being the other: agrees
            (1, 1, "2"),  # a: does not
            (2, 1, "tie"),  # agrees
            (3, 0, "tie"),  # does not
            (5, 0, "skip"),  # no trial
        )
    )
    assert found == (3, 1, 1, 1, 4, 2)
    # Wilson's interval of 2 of 4, from a table
    assert found.agreement is not None
    assert found.agreement == pytest.approx((0.5, 0.1500, 0.8500), abs=1e-4)


def test_without_repeats_nothing_is_claimed() -> None:
    assert tally(hand_made((0, 0, "1"), (1, 0, "2"))).agreement is None


def test_agreement_does_not_depend_on_the_order_in_which_a_file_names_the_responses() -> None:
    turned = Pair.of(user("q0"), ("b0", "a0"), "train")
    assert turned.id == pair(0).id
    found = tally([Answer(pair(0), 0, "1", False), Answer(turned, 1, "1", True)])
    assert (found.repeats, found.agreeing) == (1, 1)


# Through a pipe


def test_lines_are_read_where_the_input_is_no_terminal(tmp_path: Path) -> None:
    run_with(tmp_path / "run", rows(4))
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", "label", "run", "--name", "ann", "--repeats", "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input="1\nboth bad\n what?\n\nT\nundo\ntie\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "'what?' is none of: 1 first" in done.stdout
    assert done.stdout.endswith(
        "ann: 3 of 4 pairs\npreferred 1, tie 1, both bad 1, skipped 0\nthe preferences are in run/labels/ann.jsonl\n"
    )
    said = [line["answer"] for line in lines_of(tmp_path / "run/labels/answers/ann.jsonl")]
    assert said == ["1", "bad", "tie", "undo", "tie"]
    assert "\x1b" not in done.stdout


def sitting(folder: Path, said: list[str], kill_at: int | None = None) -> None:
    """Answers through a pipe; where `kill_at` is given, kill -9 comes when the log has as many lines."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf", "label", "run", "--name", "ann", "--repeats", "0.5"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    assert process.stdin
    process.stdin.write("".join(f"{answer}\n" for answer in said).encode())
    process.stdin.flush()
    log = folder / "run/labels/answers/ann.jsonl"
    if kill_at is not None:
        until = time.monotonic() + 60
        while not log.exists() or log.read_bytes().count(b"\n") < kill_at:
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.002)
        process.kill()
    process.stdin.close()
    assert process.wait(60) == (0 if kill_at is None else -signal.SIGKILL)


SAID = ["1", "2", "tie", "1", "skip", "2", "bad", "1", "2"]  # of 7 pairs, and some of them again


def kept(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    log = lines_of(folder / "run/labels/answers/ann.jsonl")
    return (
        [{key: line[key] for key in line if key not in ("seconds", "time")} for line in log],
        (folder / "run/labels/ann.jsonl").read_bytes(),
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_with(folder / "run", rows(7))
    sitting(folder, SAID)
    return kept(folder)


def test_the_uninterrupted_sitting_asks_some_pairs_twice(uninterrupted: tuple[list[dict[str, Any]], bytes]) -> None:
    log, _ = uninterrupted
    assert [line["answer"] for line in log] == SAID
    repeats = [line["pair"] for line in log if line["repeat"]]
    assert 2 <= len(repeats) == len(log) - len({line["pair"] for line in log})


@pytest.mark.parametrize("answered", range(len(SAID)))
def test_kill_9_after_any_answer_loses_nothing(
    answered: int, tmp_path: Path, uninterrupted: tuple[list[dict[str, Any]], bytes]
) -> None:
    run_with(tmp_path / "run", rows(7))
    sitting(tmp_path, SAID[:answered], kill_at=answered)
    sitting(tmp_path, SAID[answered:])
    assert kept(tmp_path) == uninterrupted


# In a terminal of 80 columns


CONTROLS = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


def _environment() -> dict[str, str]:
    """Without a size for the window: the terminal is to be asked."""
    named = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    return {**named, "PYTHONPATH": str(ROOT)}


def _at_a_terminal() -> None:
    """Makes standard input the controlling terminal, with Ctrl-C as a shell leaves it (in the background it is off)."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminal:
    """`rlhf label` in a child process that sits at a terminal of 80 columns and 24 rows."""

    def __init__(self, folder: Path, *arguments: str, rows: int = 24, columns: int = 80) -> None:
        self.rows, self.columns = rows, columns
        self._master, self._slave = pty.openpty()
        termios.tcsetwinsize(self._slave, (rows, columns))
        self.modes = termios.tcgetattr(self._slave)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rlhf", "label", "run", "--name", "ann", *arguments],
            cwd=folder,
            env={**_environment(), "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"},
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            preexec_fn=_at_a_terminal,
        )
        self._read = b""

    def screen(self) -> list[str]:
        """The rows of the window once a question stands there, checked to fit; none where it has ended instead."""
        until = time.monotonic() + 60
        while b"q quit" not in CONTROLS.sub(b"", self._read.rpartition(b"\x1b[2J")[2]):
            assert time.monotonic() < until, self._read
            if not self._take(0.1) and self._process.poll() is not None:
                return []
        while self._take(0.05):
            pass
        shown = self._text(self._read.rpartition(b"\x1b[2J")[2]).split("\n")
        assert len(shown) <= self.rows, shown
        assert all(width(line) <= self.columns for line in shown), shown
        self._read = b""
        return shown

    def press(self, keys: str) -> list[str]:
        """Presses keys and gives the screen that follows."""
        os.write(self._master, keys.encode())
        return self.screen()

    def end(self) -> str:
        """What is said at the end. The exit code must be 0 and the terminal as it was before."""
        until = time.monotonic() + 60
        while self._process.poll() is None:
            assert time.monotonic() < until
            self._take(0.05)
        while self._take(0.05):
            pass
        assert self._process.returncode == 0, self._read
        assert termios.tcgetattr(self._slave) == self.modes
        return self._text(self._read)

    def send(self, number: int) -> None:
        """Sends the process a signal."""
        self._process.send_signal(number)

    def resize(self, rows: int, columns: int) -> list[str]:
        """Another size, and the screen that follows."""
        self.rows, self.columns = rows, columns
        termios.tcsetwinsize(self._slave, (rows, columns))
        return self.screen()

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(60)
        os.close(self._master)
        os.close(self._slave)

    def _take(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        self._read += os.read(self._master, 65536)
        return True

    @staticmethod
    def _text(data: bytes) -> str:
        text = CONTROLS.sub(b"", data).decode("utf-8")
        assert "\x1b" not in text  # what a model said is shown, never obeyed
        return text.replace("\r\n", "\n")


def width(text: str) -> int:
    """Columns that a text takes, without any help of what drew it."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


@pytest.fixture
def long_run(tmp_path: Path) -> Path:
    """A run with prompts of several turns, long answers, Chinese without spaces, and control characters."""
    prompt = [
        {"role": "system", "content": "Be brief."},
        *user("First?"),
        {"role": "assistant", "content": CHINESE * 6},
    ]
    found = [
        {
            "prompt": [*prompt, *user(f"Question {number}? {CHINESE}")],
            "responses": [
                f"short {number}",
                f"{CHINESE * (3 * number + 1)} the end of Chinese {number}",
                f"\x1b[31m\x9b2J\ttab {number}\r\n" + "lorem ipsum " * 60 * number + "x" * 200 + f" the end {number}",
            ],
        }
        for number in range(3)
    ]
    run_with(tmp_path / "run", found)
    return tmp_path


@pytest.fixture
def terminal(long_run: Path) -> Iterator[Terminal]:
    found = Terminal(long_run, "--repeats", "0.3")
    yield found
    found.close()


def test_a_sitting_at_a_terminal_from_the_first_question_to_the_last(long_run: Path, terminal: Terminal) -> None:
    shown = terminal.screen()
    assert shown[0] == "ann: 0 of 9 pairs"
    assert shown[-1].startswith("1 first better  2 second  t tie  b both bad  s skip  u undo  q quit")
    meaning = {"1": "1", "2": "2", "t": "tie", "b": "bad", "s": "skip"}
    log: list[dict[str, Any]] = []
    for number, key in enumerate(itertools.cycle("12tb12s1212"), 1):
        shown = terminal.press(key)
        log = lines_of(long_run / "run/labels/answers/ann.jsonl")
        assert len(log) == number  # on the disk before the next question is there
        assert log[-1]["answer"] == meaning[key]
        if not shown:
            break
        assert shown[0].startswith(f"ann: {len({line['pair'] for line in log})} of 9 pairs")
    assert "ann: 9 of 9 pairs; agreement on repeats " in terminal.end()
    assert len({line["pair"] for line in log}) == 9 < len(log)
    preferred = [line for line in log if line["answer"] in "12" and not line["repeat"]]
    assert len(lines_of(long_run / "run/labels/ann.jsonl")) == len(preferred)


def body(shown: list[str]) -> str:
    """What stands in the frames, without breaks: the text of a question, whatever the width."""
    return "".join(line.strip("│ ").replace(" ", "") for line in shown if line.startswith("│"))


def test_the_pages_hold_all_that_the_question_has(long_run: Path, terminal: Terminal) -> None:
    shown = terminal.screen()
    for _ in range(9):
        if any(re.search(r"\.\.\. \d+ more lines \(m\)", line) for line in shown):
            break
        shown = terminal.press("1")
    assert shown[-1].endswith("m more")
    titles = [line.strip("╭─╮ ") for line in shown if line.startswith("╭")]
    assert titles == ["prompt", "response 1", "response 2"]
    pages = [terminal.press("m")]
    count = int(pages[0][-1].rpartition("/")[2])
    assert pages[0][-1].endswith(f"m more 1/{count}")
    pages += [terminal.press("m") for _ in range(count - 1)]
    assert pages[-1][-1].endswith(f"m more {count}/{count}")
    assert terminal.press("m") == shown  # and round again
    text = "".join(map(body, pages))
    terminal.press("1")
    line = lines_of(long_run / "run/labels/answers/ann.jsonl")[-1]
    first, second = line["responses"][line["first"]], line["responses"][1 - line["first"]]
    asked = "".join(f"{message['role']}: {message['content']}" for message in line["prompt"])
    visible = [
        part.replace("\x1b", "\\x1b").replace("\x9b", "\\x9b").replace("\r", "\\x0d") for part in (asked, first, second)
    ]
    assert text == "".join(re.sub(r"\s", "", part) for part in visible)


@pytest.mark.parametrize("size", [(50, 132), (12, 40), (24, 80)])
def test_a_question_fits_any_window_and_follows_its_size(terminal: Terminal, size: tuple[int, int]) -> None:
    terminal.screen()
    terminal.resize(30, 100)
    shown = terminal.resize(*size)
    assert sum(line.startswith("╭") for line in shown) == 3
    assert max(map(width, shown)) == size[1]


def test_keys_that_mean_nothing_answer_nothing(long_run: Path, terminal: Terminal) -> None:
    first = terminal.screen()
    assert terminal.press("x")[1] == "'x' is none of the keys"
    assert terminal.press("\x1b[1~") == first  # a key that sends a 1 in its sequence
    assert terminal.press("界")[1] == "'界' is none of the keys"
    assert terminal.press("u")[1] == "there is no answer to take back"
    assert lines_of(long_run / "run/labels/answers/ann.jsonl") == []
    terminal.press("1")
    assert terminal.press("u")[:2] == ["ann: 0 of 9 pairs", "taken back"]
    assert [line["answer"] for line in lines_of(long_run / "run/labels/answers/ann.jsonl")] == ["1", "undo"]


@pytest.mark.parametrize("how", ["q", "\x04", "\x03", signal.SIGTERM])
def test_leaving_ends_cleanly_and_the_next_sitting_goes_on(long_run: Path, terminal: Terminal, how: Any) -> None:
    terminal.screen()
    following = terminal.press("1")
    if isinstance(how, str):
        assert terminal.press(how) == []
    else:
        terminal.send(how)
    assert "ann: 1 of 9 pairs\npreferred 1, tie 0, both bad 0, skipped 0\nthe preferences are in" in terminal.end()
    again = Terminal(long_run, "--repeats", "0.3")
    assert again.screen() == following
    again.close()


def test_kill_9_at_a_terminal_loses_nothing(long_run: Path, terminal: Terminal) -> None:
    terminal.screen()
    terminal.press("1")
    following = terminal.press("2")
    terminal.send(signal.SIGKILL)
    with (long_run / "run/labels/answers/ann.jsonl").open("ab") as file:
        file.write(b'{"pair": "cut in the mid')
    again = Terminal(long_run, "--repeats", "0.3")
    shown = again.screen()
    assert shown[0] == following[0] == "ann: 2 of 9 pairs"
    assert "cut short" in shown[1]
    again.close()


# What the command refuses, and what it takes


def ask(run: Path, name: str = "ann", pairs: Path | None = None) -> None:
    label(run, name=name, pairs=pairs, repeats=0.1, seed=1)


def test_what_is_missing_is_said_with_the_command_that_makes_it(tmp_path: Path) -> None:
    said = rlhf("label", "nowhere", "--name", "ann", cwd=tmp_path, code=2)
    assert said == "error: nowhere is no run's directory (it has no recipe.yaml)\n"
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "recipe.yaml").touch()
    with pytest.raises(MissingInput) as caught:
        ask(run)
    assert f"rlhf run reward --recipe {run}/recipe.yaml --runs-dir {tmp_path}/runs\n" in str(caught.value)
    assert "--pairs" in str(caught.value)
    with pytest.raises(UserError, match=r"--name '\.\./ann': a name has letters, digits"):
        ask(run, name="../ann")
    with pytest.raises(DataError, match=r"none.jsonl: can't be read: No such file"):
        ask(run, pairs=tmp_path / "none.jsonl")
    with pytest.raises(MissingInput, match=r"no directory .*elsewhere"):
        ask(tmp_path / "elsewhere", pairs=tmp_path / "none.jsonl")
    assert [path.name for path in run.iterdir()] == ["recipe.yaml"]  # nothing is left behind


def test_a_file_of_preferences_can_be_compared_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "prefs.jsonl").open("w", encoding="utf-8") as file:
        for number in range(3):
            file.write(json.dumps({"prompt": f"q{number}", "chosen": "good", "rejected": "bad"}) + "\n")
        file.write('{"prompt": "q"}\n')
    arguments = [sys.executable, "-m", "rlhf", "label", "run", "--name", "ann", "--pairs", "prefs.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, input="1\n2\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "skipped 1 bad rows" in done.stdout
    assert "ann: 2 of 3 pairs" in done.stdout
    assert len(lines_of(tmp_path / "run/labels/ann.jsonl")) == 2


def test_who_labels_is_the_user_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "carol")
    assert person("") == "carol"
    assert person("dave") == "dave"
    monkeypatch.setenv("LOGNAME", "DOMAIN\\carol")
    with pytest.raises(UserError, match="--name"):
        person("")


def test_both_splits_are_asked_and_kept_apart(tmp_path: Path) -> None:
    run = run_with(run_with(tmp_path / "run", rows(2)), [{"prompt": user("t"), "responses": ["x", "y"]}], "test")
    sitting(tmp_path, ["1"] * 3)
    found = {row["prompt"][0]["content"]: row["split"] for row in lines_of(run / "labels/ann.jsonl")}
    assert found == {"q0": "train", "q1": "train", "t": "test"}


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    run_with(tmp_path / "run", rows(2))
    code = (
        "import sys, rlhf.cli\n"
        "sys.argv = ['rlhf', 'label', 'run', '--name', 'ann']\n"
        "assert rlhf.cli.main() == 0\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, input="1\n", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@given(heights=st.lists(st.integers(1, 60), min_size=3, max_size=3), room=st.integers(3, 80))
def test_what_a_short_text_leaves_is_for_the_longer_ones(heights: list[int], room: int) -> None:
    given_rows = shares(heights, room)
    assert sum(given_rows) <= room
    assert all(1 <= got <= height for got, height in zip(given_rows, heights, strict=True))
    cut = [got for got, height in zip(given_rows, heights, strict=True) if got < height]
    if cut:
        assert sum(given_rows) == room  # nothing is cut while a row is free
        assert max(cut) - min(cut) <= 1
        assert min(cut) >= max(given_rows) - 1
