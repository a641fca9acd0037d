"""Files to rows to batches: every fault is named by file, line and fault or counted, and nothing else is lost."""

import gzip
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data import reader, rows, sources
from rlhf.data.files import source_files
from rlhf.data.reader import Faults, read_rows
from rlhf.data.rows import Kind, Malformed, to_comparisons, to_prompt
from rlhf.data.tokens import PackedTokens, pack
from rlhf.errors import DataError, MissingInput, UserError
from rlhf.recipe import Source
from rlhf.tinyworld.dialogues import prompts as tinyworld_prompts
from tests.conftest import SHARED_DATA

MALFORMED = SHARED_DATA / "malformed"
EXPECTED: dict[str, Any] = (
    json.loads((MALFORMED / "EXPECT.json").read_text(encoding="utf-8")) if MALFORMED.exists() else {}
)
# What this reader does with the rows whose fate MALFORMED leaves to it: the lines that it refuses.
POLICY = {"bad_roles_sft.jsonl": [1, 2, 3, 4, 5, 6], "preference_degenerate.jsonl": [2, 4]}

GOOD = b'{"text": "good"}'


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def texts_of(path: Path, faults: Faults | None = None) -> list[str]:
    return [row.value["text"] for row in read_rows(path, faults or Faults("error"))]


def data_set(path: Path, kind: Kind, mode: Any) -> sources.DataSet:
    return sources.DataSet([sources.from_files([path])], kind, Faults(mode), seed=0)


# Lines


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b'{"text": "a"}\r\n{"text": "b"}\r\n', ["a", "b"], id="CRLF"),
        pytest.param(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n', ["a", "b"], id="byte order mark"),
        pytest.param(b'\n{"text": "a"}\n\n  \n\t\n{"text": "b"}\n\n', ["a", "b"], id="blank lines"),
        pytest.param(b'{"text": "a"}\n{"text": "b"}', ["a", "b"], id="no final newline"),
        pytest.param('{"text": "a\u2028b\u2029c\x85d"}\n'.encode(), ["a\u2028b\u2029c\x85d"], id="U+2028"),
        pytest.param(b'{"text": "\\u0000\\u001b[31m"}\n', ["\0\x1b[31m"], id="escaped control characters"),
        pytest.param(b'{"text": "\\ud83d\\ude00"}\n', ["😀"], id="escaped surrogate pair"),
        pytest.param(b'{"text": "<|end|> </s> [PAD]"}\n', ["<|end|> </s> [PAD]"], id="special tokens"),
        pytest.param(b'{"text": "a"}\n{"text": "a"}\n', ["a", "a"], id="duplicates"),
    ],
)
def test_well_formed_files_are_taken_whole(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert texts_of(path) == expected


def test_rows_know_their_line_blank_ones_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, b"", GOOD, b"", b"", GOOD)
    assert [row.line for row in read_rows(path, Faults())] == [1, 3, 6]


BAD_LINES = [
    pytest.param(b'{"text": "cut in the mid', "not valid JSON", id="bad JSON"),
    pytest.param(b'{"text": "a"} {"text": "b"}', "not valid JSON", id="two objects"),
    pytest.param(b'{"text": "\xe5\xa5', "not UTF-8 at byte 10", id="cut UTF-8"),
    pytest.param('{"text": "你好"}'.encode("gb18030"), "not UTF-8 at byte 10", id="GB18030"),
    pytest.param('{"text": "a"}'.encode("utf-16"), "not UTF-8 at byte 0", id="UTF-16"),
    pytest.param(b'{"text": "a\0b"}', "not valid JSON", id="NUL in a string"),
    pytest.param(b"\0" * 30, "not valid JSON", id="NULs only"),
    pytest.param(b'["a"]', "a JSON object is expected, this is an array", id="array"),
    pytest.param(b"null", "a JSON object is expected, this is null", id="null"),
    pytest.param(b"7", "a JSON object is expected, this is a number", id="number"),
    pytest.param(b"true", "a JSON object is expected, this is a boolean", id="boolean"),
    pytest.param(b'"a"', "a JSON object is expected, this is a string", id="string"),
    pytest.param(b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply", id="deep nesting"),
    pytest.param(b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "not valid JSON", id="endless number"),
    pytest.param(b'{"text": 1}', "`text` of the row must be text, not int", id="number for text"),
    pytest.param(b'{"text": null}', "`text` of the row must be text, not NoneType", id="null for text"),
    pytest.param(b'{"text": "broken \\ud83d emoji"}', "lone surrogate", id="lone surrogate"),
    pytest.param(b'{"body": "a"}', "no `text`", id="missing field"),
    pytest.param(b"{}", "no `text`", id="empty object"),
]


@pytest.mark.parametrize(("line", "fault"), BAD_LINES)
def test_a_bad_row_is_named_by_file_line_and_fault(tmp_path: Path, line: bytes, fault: str) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, b"", line, GOOD)
    with pytest.raises(DataError) as caught:
        list(data_set(path, "texts", "error"))
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert fault in str(caught.value)


@pytest.mark.parametrize(("line", "fault"), BAD_LINES)
def test_a_bad_row_is_skipped_and_counted_once(tmp_path: Path, line: bytes, fault: str) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, b"", line, GOOD)
    found = data_set(path, "texts", "skip")
    assert list(found) == ["good", "good"]
    assert found.faults.counts == {str(path): 1}
    assert found.faults.report().startswith("skipped 1 bad rows")
    assert f"{path}, line 3: " in found.faults.report()
    assert fault in found.faults.report()


@given(kinds=st.lists(st.sampled_from(["good", "blank", "bad json", "bad type", "bad bytes"]), max_size=12))
def test_every_line_is_a_row_a_blank_or_counted(tmp_path: Path, kinds: list[str]) -> None:
    content = {"good": GOOD, "blank": b"  ", "bad json": b"{", "bad type": b'{"text": []}', "bad bytes": b"\xff"}
    path = write(tmp_path / "rows.jsonl", GOOD, *(content[kind] for kind in kinds))
    found = data_set(path, "texts", "skip")
    counts = Counter(kinds)
    assert len(list(found)) == 1 + counts["good"]
    assert found.faults.counts.total() == len(kinds) - counts["good"] - counts["blank"]


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda data: zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :]),
}


@given(texts=st.lists(st.text(), min_size=1), ascii_only=st.booleans(), ending=st.sampled_from(list(PACKED)))
def test_any_text_comes_back_as_it_was_written(tmp_path: Path, texts: list[str], ascii_only: bool, ending: str) -> None:
    content = "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts).encode()
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(PACKED[ending](content))
    assert texts_of(path) == texts


def test_a_small_zstd_file_that_holds_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(b"".join([*(packer.compress(bytes(2**20)) for _ in range(300)), packer.flush()]))
    assert path.stat().st_size < 20_000
    tracemalloc.start()
    with pytest.raises(DataError, match=r"line 1: longer than 16 MiB"):
        list(read_rows(path, Faults()))
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


@given(st.lists(st.text("ab \n", min_size=1, max_size=40), min_size=1, max_size=30))
def test_long_plain_texts_come_in_parts(tmp_path: Path, texts: list[str]) -> None:
    whole = "".join(texts) + "é"
    path = tmp_path / "rows.txt"
    path.write_bytes(whole.encode())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reader, "WHOLE_TEXT_BYTES", 50)
        patched.setattr(reader, "PART_CHARACTERS", 30)
        rows = list(read_rows(path, Faults(), split_texts=True))
    parts = [row.value["text"] for row in rows]
    assert "".join("".join(parts).split()) == "".join(whole.split())
    assert len(parts) == 1 or len(whole.encode()) > 50
    assert all(len(part) <= 60 for part in parts) or len(parts) == 1
    lines = whole.split("\n")
    assert all(lines[row.line - 1].endswith(row.value["text"].split("\n")[0]) for row in rows if len(parts) > 1)


def test_a_line_may_be_as_long_as_the_limit_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 64)
    just, over = (b'{"text": "' + b"x" * (n - 12) + b'"}' for n in (64, 65))
    assert len(just) == 64
    path = write(tmp_path / "rows.jsonl", just, over, GOOD, over * 50, GOOD)
    faults = Faults("skip")
    assert [row.line for row in read_rows(path, faults)] == [1, 3, 5]
    assert faults.counts == {str(path): 2}
    assert faults.examples[0].startswith(f"{path}, line 2: longer than")


@pytest.mark.parametrize(("length", "taken"), [(64, [1, 2]), (65, [1])])
def test_the_limit_holds_for_a_last_line_without_newline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, taken: list[int]
) -> None:
    monkeypatch.setattr(reader, "MAX_LINE_BYTES", 64)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + b'{"text": "' + b"x" * (length - 12) + b'"}')
    faults = Faults("skip")
    assert [row.line for row in read_rows(path, faults)] == taken
    assert faults.counts.total() == 2 - len(taken)


# Files


ZIPPED = gzip.compress(b"\n".join([GOOD] * 500))
ZSTD = zstandard.compress(b"\n".join([GOOD, *(b'{"text": "%d"}' % n for n in range(500))]))
NOT_READABLE = [
    pytest.param("rows.jsonl", b"", "no good row: the file is empty", id="empty"),
    pytest.param("rows.jsonl", b"\n\n \r\n\n", "no good row: the file is empty", id="blank lines only"),
    pytest.param("rows.jsonl", b'[\n  {"text": "a"}\n]\n', "one JSON array instead of JSON Lines", id="JSON array"),
    pytest.param("rows.jsonl.gz", ZIPPED[: len(ZIPPED) // 2], "gzip file is cut short", id="cut gzip"),
    pytest.param("rows.jsonl.gz", ZIPPED[:-8] + b"\0" * 8, "not a gzip file, or a damaged one", id="gzip checksum"),
    pytest.param("rows.jsonl.gz", GOOD + b"\n", "not a gzip file, or a damaged one", id="not gzip"),
    pytest.param("rows.jsonl.gz", b"", "the file is empty", id="empty gzip"),
    pytest.param("rows.jsonl.zst", ZSTD[: len(ZSTD) // 2], "the zstd file is cut short", id="cut zstd"),
    pytest.param("rows.jsonl.zst", ZSTD + ZSTD[:-1], "the zstd file is cut short", id="cut second frame"),
    pytest.param("rows.jsonl.zst", ZSTD[:-8] + b"\0" * 8, "not a zstd file, or a damaged one", id="damaged zstd"),
    pytest.param("rows.txt.zst", GOOD + b"\n", "not a zstd file, or a damaged one", id="not zstd"),
    pytest.param("rows.jsonl.zst", b"", "the file is empty", id="empty zstd"),
    pytest.param("rows.txt", b"line\nsecond \xff\n", "line 2: not UTF-8 text", id="text of another encoding"),
    pytest.param("rows.txt", b" \n\n", "the file is empty", id="blank text"),
    pytest.param("rows.parquet", b"PAR1 no", "not a Parquet file", id="not Parquet"),
    pytest.param("rows.csv", b"text\na\n", "unknown kind of file", id="unknown ending"),
]


@pytest.mark.parametrize("mode", ["error", "skip"])
@pytest.mark.parametrize(("name", "content", "fault"), NOT_READABLE)
def test_a_file_that_cannot_be_read_is_named_in_either_mode(
    tmp_path: Path, name: str, content: bytes, fault: str, mode: Any
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(path, Faults(mode)))
    assert str(path) in str(caught.value)
    assert fault in str(caught.value)


def test_a_file_that_is_not_there_or_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    for path in (tmp_path / "nothing.jsonl", tmp_path / "nothing.parquet", tmp_path / "folder.jsonl"):
        with pytest.raises(DataError, match=f"{path}: can't be read"):
            list(read_rows(path, Faults()))


def test_a_file_of_bad_rows_alone_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "你好".encode("gb18030"), b"{", b"7")
    with pytest.raises(DataError, match=r"no good row \(3 bad ones\)"):
        list(read_rows(path, Faults("skip")))


def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo.\n")
    assert texts_of(path) == ["One.\r\n\r\nTwo.\n"]


def test_parquet_rows_are_read_and_a_null_is_named_by_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b\u2028", None, "d"]}), path)
    found = data_set(path, "texts", "skip")
    assert list(found) == ["a", "b\u2028", "d"]
    assert f"{path}, row 3: `text`" in found.faults.report()


def test_parquet_keeps_conversations(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pyarrow.parquet.write_table(pyarrow.table({"messages": [messages, messages]}), path)
    assert list(data_set(path, "conversations", "error")) == [messages, messages]


# Rows


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "a", "source": "x"},
    ],
)
def test_every_format_of_a_conversation_gives_the_same(row: dict[str, Any]) -> None:
    assert rows.to_conversation(row) == [USER, ANSWER]


def test_a_conversation_of_a_comparison_is_the_prompt_with_the_better_response() -> None:
    better = [USER, {"role": "assistant", "content": "good"}]
    assert rows.to_conversation({"prompt": "q", "chosen": "good", "rejected": "bad"}) == better
    worse = [USER, {"role": "assistant", "content": "bad"}]
    assert rows.to_conversation({"chosen": better, "rejected": worse}) == better
    assert rows.to_conversation({"messages": worse, "chosen": better, "rejected": worse}) == worse, "it is named"
    with pytest.raises(rows.Malformed, match="the last answer is empty"):
        rows.to_conversation({"prompt": "q", "chosen": " ", "rejected": "bad"})


def test_conversations_may_have_a_system_turn_and_many_turns() -> None:
    messages = [SYSTEM, USER, ANSWER, USER, ANSWER]
    assert rows.to_conversation({"messages": messages}) == messages


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({}, "no `messages`"),
        ({"messages": "q"}, "`messages` must be a list of messages, not str"),
        ({"messages": USER}, "`messages` must be a list of messages, not dict"),
        ({"messages": []}, "`messages` has no message"),
        ({"messages": ["q", "a"]}, "message 1 of `messages` is not an object"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 of `messages` has no `content`"),
        ({"messages": [{"content": "q"}, ANSWER]}, "message 1 of `messages` has no `role`"),
        ({"messages": [{"role": "wizard", "content": "q"}, ANSWER]}, "unknown role 'wizard'"),
        (
            {"messages": [USER, {"role": "assistant", "content": 7}]},
            "`content` of message 2 of `messages` must be text",
        ),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "must be text, not NoneType"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud83d"}]}, "lone surrogate"),
        ({"messages": [USER]}, "no assistant turn to learn from"),
        ({"messages": [USER, ANSWER, USER]}, "the last message is not the assistant's"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "the last answer is empty"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "the last answer is empty"),
        ({"prompt": "q", "completion": "\t "}, "the last answer is empty"),
        ({"messages": [USER, USER, ANSWER]}, "must alternate"),
        ({"messages": [ANSWER]}, "must alternate"),
        ({"messages": [USER, SYSTEM, ANSWER]}, "must alternate"),
        ({"prompt": "q"}, "no `completion`"),
        ({"completion": "a"}, "no `prompt`"),
        ({"prompt": " ", "completion": "a"}, "the prompt is empty"),
        ({"prompt": "q", "completion": [USER]}, "`completion` must be text or one assistant message"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(rows.Malformed) as caught:
        rows.to_conversation(row)
    assert fault in str(caught.value)


def test_every_format_of_a_comparison_gives_the_same() -> None:
    expected = rows.Comparison([USER], "good", "bad", source="s")
    plain = {"prompt": "q", "chosen": "good", "rejected": "bad", "source": "s"}
    messages = {
        "prompt": [USER],
        "chosen": [{"role": "assistant", "content": "good"}],
        "rejected": [{"role": "assistant", "content": "bad"}],
        "source": "s",
    }
    assert rows.to_comparisons(plain) == rows.to_comparisons(messages) == [expected]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"chosen": "a", "rejected": "b"}, "no `prompt`"),
        ({"prompt": "q", "rejected": "b"}, "no `chosen`"),
        ({"prompt": "q", "chosen": "a"}, "no `rejected`"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
        ({"prompt": "q", "chosen": [], "rejected": "a"}, "`chosen` has no message"),
        ({"prompt": "q", "chosen": [USER], "rejected": "a"}, "`chosen` must be text or one assistant message"),
        ({"prompt": [USER, ANSWER], "chosen": "a", "rejected": "b"}, "does not end with the user"),
        ({"prompt": 7, "chosen": "a", "rejected": "b"}, "`prompt` must be a list of messages, not int"),
    ],
)
def test_what_is_wrong_with_a_comparison_is_said(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(rows.Malformed) as caught:
        rows.to_comparisons(row)
    assert fault in str(caught.value)


def test_prompts_end_with_the_user() -> None:
    assert rows.to_prompt({"prompt": "q"}) == rows.to_prompt({"prompt": [USER]}) == [USER]
    assert rows.to_prompt({"prompt": [SYSTEM, USER]}) == [SYSTEM, USER]
    assert rows.to_prompt({"messages": [SYSTEM, USER, ANSWER]}) == [SYSTEM, USER]
    for bad in ([SYSTEM], [USER, ANSWER], [], "", "\n"):
        with pytest.raises(rows.Malformed):
            rows.to_prompt({"prompt": bad})


def test_any_kind_of_row_has_a_text() -> None:
    assert rows.to_text({"text": "t", "messages": []}) == "t"
    assert rows.to_text({"messages": [USER, ANSWER]}) == "q\na"
    assert rows.to_text({"prompt": "q", "completion": "a"}) == "q\na"
    assert rows.to_text({"prompt": "q", "chosen": "a", "rejected": "b"}) == "q\na\nb"


# The malformed files beside the checkout


KINDS: dict[str, Kind] = {"sft": "conversations", "any": "conversations", "preference": "comparisons"}
LISTED = [name for name, expected in EXPECTED.items() if expected["kind"] in KINDS]


@pytest.mark.skipif(not EXPECTED, reason=f"no {MALFORMED}")
@pytest.mark.parametrize("name", LISTED)
def test_shared_malformed_files_when_skipping(name: str) -> None:
    expected = EXPECTED[name]
    found = data_set(MALFORMED / name, KINDS[expected["kind"]], "skip")
    if expected["class"] in ("empty", "encoding", "not_jsonl", "container"):
        with pytest.raises(DataError, match=name):
            list(found)
        return
    bad = POLICY.get(name, expected["bad_lines"])
    lines = sum(bool(line.strip()) for line in (MALFORMED / name).read_bytes().split(b"\n"))
    assert len(list(found)) == lines - len(bad)
    assert expected["good_rows"] in (None, lines - len(bad))
    assert found.faults.counts.total() == len(bad)
    assert [int(example.split(", line ")[1].split(":")[0]) for example in found.faults.examples] == bad[:5]


@pytest.mark.skipif(not EXPECTED, reason=f"no {MALFORMED}")
@pytest.mark.parametrize("name", LISTED)
def test_shared_malformed_files_when_stopping(name: str) -> None:
    expected = EXPECTED[name]
    found = data_set(MALFORMED / name, KINDS[expected["kind"]], "error")
    if expected["class"] == "accept":
        assert len(list(found)) == expected["good_rows"]
        return
    first = POLICY.get(name, expected["bad_lines"])[:1]
    with pytest.raises(DataError) as caught:
        list(found)
    assert str(caught.value).startswith(str(MALFORMED / name) + (f", line {first[0]}: " if first else ": "))


# Sources


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    return write(tmp_path / "numbered.jsonl", *(b'{"text": "%d"}' % i for i in range(1000)))


def texts_from(source: Source, root: Path, seed: int = 0, mode: Any = "error") -> list[str]:
    opened = sources.open_sources((source,), root, "texts", "train", seed)
    return list(sources.DataSet(opened, "texts", Faults(mode), seed))


def test_weight_2_uses_each_row_twice(numbered: Path) -> None:
    found = Counter(texts_from(Source(path=numbered.name, weight=2.0), numbered.parent))
    assert found == {str(i): 2 for i in range(1000)}


def test_weight_one_half_uses_about_half_of_the_rows_and_none_twice(numbered: Path) -> None:
    found = texts_from(Source(path=numbered.name, weight=0.5), numbered.parent)
    assert 430 < len(found) < 570
    assert len(set(found)) == len(found)
    assert [int(text) for text in found] == sorted(int(text) for text in found)


def test_weight_one_and_a_half_uses_every_row_and_about_half_of_them_again(numbered: Path) -> None:
    found = Counter(texts_from(Source(path=numbered.name, weight=1.5), numbered.parent))
    assert set(found.values()) == {1, 2}
    assert len(found) == 1000
    assert 430 < sum(n == 2 for n in found.values()) < 570


def test_a_fractional_weight_depends_on_the_seed_alone(numbered: Path) -> None:
    source = Source(path=numbered.name, weight=0.5)
    assert texts_from(source, numbered.parent, seed=1) == texts_from(source, numbered.parent, seed=1)
    assert texts_from(source, numbered.parent, seed=1) != texts_from(source, numbered.parent, seed=2)


def test_a_limit_takes_the_first_rows(numbered: Path) -> None:
    assert texts_from(Source(path=numbered.name, rows=3), numbered.parent) == ["0", "1", "2"]
    assert len(texts_from(Source(path=numbered.name, rows=3, weight=2.0), numbered.parent)) == 6
    assert len(texts_from(Source(path=numbered.name, rows=5000), numbered.parent)) == 1000


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("rows", "limit", "expected"), [(2000, None, 0.1), (2000, 4000, 0.5), (2000, 2000, 1.0), (50_000, None, 1.0)]
)
def test_the_share_that_was_read_is_told_by_the_bytes(
    tmp_path: Path, weight: float, rows: int, limit: int | None, expected: float
) -> None:
    path = write(tmp_path / "long.jsonl", *(b'{"text": "%0500d"}' % i for i in range(20_000)))
    opened = sources.open_sources((Source(path=path.name, rows=rows, weight=weight),), tmp_path, "texts", "train", 0)
    found = sources.DataSet(opened, "texts", Faults("error"), 0)
    assert sum(1 for _ in found) > 0
    assert found.share_read([limit]) == pytest.approx(expected, rel=0.15)


def test_the_share_that_was_read_of_a_data_set_is_told_by_itself(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *(b'{"text": "%d"}' % i for i in range(1000)))
    opened = sources.open_sources((Source(hub=str(tmp_path), rows=100),), tmp_path, "texts", "train", 0)
    found = sources.DataSet(opened, "texts", Faults("error"), 0)
    assert sum(1 for _ in found) == 100
    assert found.share_read([None]) == 0.1


def test_a_data_set_gives_the_same_rows_and_counts_every_time(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, b"{", GOOD)
    found = data_set(path, "texts", "skip")
    assert list(found) == list(found) == ["good", "good"]
    assert found.faults.counts == {str(path): 1}


def test_sources_come_one_after_the_other(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", b'{"text": "b"}')
    write(tmp_path / "a.jsonl", b'{"text": "a"}')
    (tmp_path / "c.txt").write_text("c", encoding="utf-8")
    listed = (Source(path="b.jsonl"), Source(path="*.txt"), Source(path="a.jsonl"))
    opened = sources.open_sources(listed, tmp_path, "texts", "train", 0)
    assert list(sources.DataSet(opened, "texts", Faults(), 0)) == ["b", "c", "a"]


def test_a_glob_means_its_files_in_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("b.jsonl", "a.jsonl", "c.txt", "deep/er/d.jsonl"):
        (tmp_path / name).touch()
    assert source_files(Source(path="*.jsonl"), tmp_path) == [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    assert source_files(Source(path="**/*.jsonl"), tmp_path)[-1] == tmp_path / "deep/er/d.jsonl"
    assert source_files(Source(path=str(tmp_path / "[bc].*")), Path("elsewhere")) == [
        tmp_path / "b.jsonl",
        tmp_path / "c.txt",
    ]


def test_relative_roots_and_parents_of_them_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "a.jsonl", GOOD)
    monkeypatch.chdir(tmp_path / "work")
    for pattern in ("a.jsonl", "*.jsonl"):
        found = source_files(Source(path=pattern), Path("../data"))
        assert [path.resolve() for path in found] == [tmp_path / "data" / "a.jsonl"]


def test_a_file_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    write(tmp_path / "a[1].jsonl", GOOD)
    assert source_files(Source(path="a[1].jsonl"), tmp_path) == [tmp_path / "a[1].jsonl"]


def test_missing_files_name_the_path_and_the_root(tmp_path: Path) -> None:
    for pattern in ("nothing.jsonl", "*.nothing"):
        with pytest.raises(MissingInput) as caught:
            source_files(Source(path=pattern), tmp_path)
        assert str(tmp_path / pattern) in str(caught.value)
        assert repr(str(tmp_path)) in str(caught.value)
    with pytest.raises(MissingInput, match="is a directory; name its files"):
        source_files(Source(path="."), tmp_path)


def test_missing_files_show_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(MissingInput):
        sources.open_sources((Source(path="nothing.jsonl"),), tmp_path, "texts", "train", 0)


def test_the_built_in_world_gives_the_rows_of_its_split(tmp_path: Path) -> None:
    source = (Source(builtin="tinyworld", rows=25),)
    kinds: tuple[Kind, ...] = ("conversations", "prompts")
    for kind in kinds:
        opened = sources.open_sources(source, tmp_path, kind, "test", 0)
        found = list(sources.DataSet(opened, kind, Faults(), 0))
        assert len(found) == 25
        assert {messages[0]["content"] for messages in found} <= set(tinyworld_prompts("test"))
    assert len(texts_from(source[0], tmp_path)) == 25


def test_the_built_in_world_has_no_comparisons_in_store(tmp_path: Path) -> None:
    opened = sources.open_sources((Source(builtin="tinyworld", rows=1),), tmp_path, "comparisons", "train", 0)
    with pytest.raises(DataError, match=r"reward\.collect"):
        list(sources.DataSet(opened, "comparisons", Faults(), 0))


def test_a_hub_data_set_that_cannot_be_loaded_is_the_users_error(tmp_path: Path) -> None:
    opened = sources.open_sources((Source(hub="nobody/nothing"),), tmp_path, "texts", "train", 0)
    with pytest.raises(UserError, match="nobody/nothing"):
        list(sources.DataSet(opened, "texts", Faults(), 0))


def test_shuffling_keeps_every_item_and_depends_on_the_seed_alone() -> None:
    items = list(range(100))
    assert sources.shuffled(items, 1, "a") == sources.shuffled(items, 1, "a") != sources.shuffled(items, 2, "a")
    assert sorted(sources.shuffled(items, 1, "a")) == items != sources.shuffled(items, 1, "a")


# Packed tokens


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    """The ids 0 to 102, packed from documents of 1, 2, 3, ... tokens: with rows of 10, ten rows and two ids left."""
    ids, documents, size = list(range(103)), [], 1
    while ids:
        documents.append((ids[:size], 7))
        ids, size = ids[size:], size + 1
    stats = pack(documents, tmp_path / "tokens.bin", vocab_size=200)
    assert stats == (len(documents), 103, 7 * len(documents))
    return tmp_path / "tokens.bin"


def test_every_row_is_read_exactly_once_a_pass(counting: Path) -> None:
    packed = PackedTokens(counting, 200, 10, seed=0)
    assert (packed.rows, len(packed)) == (10, 103)
    passes = [[packed.row_at(place) for place in range(n * 10, n * 10 + 10)] for n in range(5)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len({tuple(order) for order in passes}) == 5


def test_targets_are_the_inputs_shifted_by_one(counting: Path) -> None:
    packed = PackedTokens(counting, 200, 10, seed=0)
    inputs, targets = packed.batch(range(10))
    assert inputs.shape == targets.shape == (10, 10)
    assert inputs.dtype == targets.dtype == torch.int64
    assert sorted(inputs.flatten().tolist()) == list(range(100))
    assert torch.equal(targets, inputs + 1)  # since the packed ids count up


def test_the_order_depends_on_seed_and_place_alone(counting: Path) -> None:
    first = PackedTokens(counting, 200, 10, seed=3)
    forward = [first.row_at(place) for place in range(40)]
    again = PackedTokens(counting, 200, 10, seed=3)
    assert [again.row_at(place) for place in reversed(range(40))] == forward[::-1]
    late = PackedTokens(counting, 200, 10, seed=3)
    assert torch.equal(late.batch(range(25, 33))[0], first.batch(range(20, 40))[0][5:13])
    assert forward != [PackedTokens(counting, 200, 10, seed=4).row_at(place) for place in range(40)]


@pytest.mark.parametrize(("vocab_size", "bytes_each"), [(2**16, 2), (2**16 + 1, 4)])
def test_ids_are_stored_in_16_bits_where_they_fit(tmp_path: Path, vocab_size: int, bytes_each: int) -> None:
    path = tmp_path / "tokens.bin"
    pack([([0, 1, vocab_size - 1], 3)], path, vocab_size)
    assert path.stat().st_size == 3 * bytes_each
    inputs, targets = PackedTokens(path, vocab_size, 2, seed=0).batch(range(1))
    assert (inputs.tolist(), targets.tolist()) == ([[0, 1]], [[1, vocab_size - 1]])


def test_an_id_beyond_the_vocabulary_never_wraps_around(tmp_path: Path) -> None:
    with pytest.raises(OverflowError):
        pack([([2**16], 1)], tmp_path / "tokens.bin", vocab_size=100)


def test_less_than_one_row_of_tokens_is_refused(tmp_path: Path) -> None:
    pack([([1, 2, 3, 4], 4)], tmp_path / "tokens.bin", 100)
    with pytest.raises(DataError, match="4 tokens in all, less than one row of 5"):
        PackedTokens(tmp_path / "tokens.bin", 100, 4, seed=0)
    assert PackedTokens(tmp_path / "tokens.bin", 100, 3, seed=0).rows == 1


def test_packing_keeps_the_documents_in_order(tmp_path: Path) -> None:
    pack([([5, 6], 2), ([], 0), ([7], 1)], tmp_path / "tokens.bin", 100)
    assert np.fromfile(tmp_path / "tokens.bin", dtype=np.uint16).tolist() == [5, 6, 7]


def test_conversations_as_chosen_and_rejected_have_their_beginning_as_prompt() -> None:
    user = {"role": "user", "content": "What is 1 plus 1?"}
    good, bad = {"role": "assistant", "content": "2"}, {"role": "assistant", "content": "3"}
    implicit = {"chosen": [user, good], "rejected": [user, bad]}
    for more in ({}, {"prompt": user["content"]}, {"prompt": [user]}):
        (found,) = to_comparisons(implicit | more)
        assert (found.prompt, found.chosen, found.rejected) == ([user], "2", "3")
        assert to_prompt(implicit | more) == [user]
    with pytest.raises(Malformed, match="differ before their last messages"):
        to_comparisons({"chosen": [user, good], "rejected": [{**user, "content": "What?"}, bad]})
    with pytest.raises(Malformed, match="`prompt` is not what the conversations"):
        to_comparisons({"prompt": "something else", **implicit})
