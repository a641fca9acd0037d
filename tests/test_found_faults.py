"""Faults that were found by use and mended: each test failed before."""

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.perplexity import rolling_windows, score_documents
from evaluation.scoring import Scorer
from evaluation.tasks import file_tasks
from rlhf.data import rows, sources
from rlhf.data.files import source_files
from rlhf.data.reader import Faults, read_rows
from rlhf.data.tokens import PackedTokens, pack
from rlhf.errors import DataError, UserError
from rlhf.recipe import Source
from rlhf.tokenizer import encode_chat
from tests.conftest import CONTEXT
from tests.test_data import GOOD, data_set, write
from tests.test_evaluation import ROW, asked_of, naive_nats, plain, uniform, write_rows
from tests.test_tokenizer import DIALOGUE, PLAIN_CHATML, chatml, trained_text

WITH_PROMPT = PLAIN_CHATML + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


# test_evaluation.py


@given(length=st.integers(1, 200), context=st.integers(1, 40))
def test_every_token_is_predicted_once_from_the_ones_right_before_it(length: int, context: int) -> None:
    tokens = list(range(length))
    windows = rolling_windows(tokens, -1, context)
    assert [target for window in windows for target in window.targets] == tokens
    for inputs, targets in windows:
        assert len(inputs) == min(context, length)
        assert inputs == list(range(inputs[0], inputs[0] + len(inputs)))
        assert inputs[-1] == targets[-1] - 1


@pytest.mark.parametrize("context", [16, 23, CONTEXT])
def test_scores_equal_a_naive_loop(
    tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int
) -> None:
    texts = ["", "x", "hot -> cold", "The opposite of hot is cold. " * 9, "你好 -> hello\n" * 6]
    double = copy.deepcopy(tiny_model).double()
    for text, score in zip(texts, score_documents(Scorer(tiny_model), tokenizer, texts, context=context), strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert (score.tokens, score.bytes) == (len(ids), len(text.encode()))
        assert score.nats == pytest.approx(naive_nats(double, ids, tokenizer.bos_token_id, context), abs=1e-4)


def test_a_bad_line_of_a_task_file_is_counted_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mood.test.jsonl", ROW, "{", ROW)
    faults = Faults("skip")
    file_tasks(tmp_path, faults)
    assert faults.counts == {str(path): 1}


@pytest.mark.parametrize(
    "change", [{"input": "\ud83d"}, {"choices": ["a", "\ud83d"]}, {"instruction": None}, {"instruction": 7}]
)
def test_a_task_row_with_text_that_is_none_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, change: dict[str, Any]
) -> None:
    path = tmp_path / "mood.test.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | change) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 2"):
        file_tasks(tmp_path, Faults("error"))


def test_a_task_without_a_good_row_is_an_error(tmp_path: Path) -> None:
    write_rows(tmp_path / "mood.test.jsonl", ROW | {"answer": 9})
    with pytest.raises(DataError, match="mood"):
        file_tasks(tmp_path, Faults("skip"))


def test_demonstrations_are_found_whether_zipped_or_not(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "mood.test.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROW).encode()))
    write_rows(tmp_path / "mood.train.jsonl", ROW)
    (task,) = file_tasks(tmp_path, Faults("error"))
    assert len(task.questions(1, 1, 0)) == 1


# test_tokenizer.py


def test_a_template_with_a_generation_prompt_but_no_markers_trains_each_answer(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prepared = chatml(tokenizer, WITH_PROMPT)
    found = encode_chat(prepared, DIALOGUE)
    assert trained_text(prepared, found) == "The opposite of hot is cold.<|im_end|>hello.<|im_end|>"


def test_such_a_template_that_never_ends_the_answer_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="does not end an assistant's turn"):
        encode_chat(chatml(tokenizer, WITH_PROMPT.replace("<|im_end|>", "")), DIALOGUE)


def test_markers_that_leave_out_the_end_token_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    )
    with pytest.raises(UserError, match="never learn to stop"):
        encode_chat(chatml(tokenizer, template), DIALOGUE)


def test_a_template_may_trim_some_contents_and_not_others(tokenizer: PreTrainedTokenizerBase) -> None:
    template = PLAIN_CHATML.replace(
        "message['content']", "(message['content'] | trim if message['role'] == 'user' else message['content'])"
    )
    prepared = chatml(tokenizer, template)
    messages = [{"role": "user", "content": " hot? "}, {"role": "assistant", "content": " cold."}]
    found = encode_chat(prepared, messages)
    assert prepared.decode(found.ids) == prepared.apply_chat_template(messages, tokenize=False)
    assert trained_text(prepared, found) == " cold.<|im_end|>"


# test_data.py


@pytest.mark.parametrize("weight", [2.0, 1.5, 3.0])
def test_a_bad_row_of_a_weighted_source_is_counted_once(tmp_path: Path, weight: float) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, b"{", b'{"text": 1}', GOOD)
    found = sources.DataSet([sources.from_files([path], weight)], "texts", Faults("skip"), 0)
    list(found)
    assert found.faults.counts == {str(path): 2}


def test_a_limit_counts_good_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b"{", b'{"text": 1}', GOOD, GOOD, GOOD)
    found = sources.DataSet([sources.from_files([path], 1.0, 2)], "texts", Faults("skip"), 0)
    assert len(list(found)) == 2


def test_a_file_of_rows_of_another_kind_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b'{"body": "a"}', b'{"body": "b"}')
    with pytest.raises(DataError, match="no good row"):
        list(data_set(path, "texts", "skip"))


def test_examples_of_faults_are_those_of_the_last_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, b"{", GOOD)
    found = data_set(path, "texts", "skip")
    assert list(found) == list(found)
    assert len(found.faults.examples) == 1


def test_no_token_at_all_is_refused_like_too_few(tmp_path: Path) -> None:
    pack([], tmp_path / "tokens.bin", 100)
    with pytest.raises(DataError, match="0 tokens in all"):
        PackedTokens(tmp_path / "tokens.bin", 100, 4, seed=0)


def test_parquet_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    offsets = pyarrow.array([0, 2, 4], pyarrow.int32()).buffers()[1]
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"ok\xff\xfe")])
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet"):
        list(read_rows(tmp_path / "rows.parquet", Faults()))


def test_a_root_whose_name_looks_like_a_glob_is_itself(tmp_path: Path) -> None:
    (tmp_path / "run[1]").mkdir()
    write(tmp_path / "run[1]" / "a.jsonl", GOOD)
    assert source_files(Source(path="*.jsonl"), tmp_path / "run[1]") == [tmp_path / "run[1]" / "a.jsonl"]


def test_the_built_in_world_without_a_limit_is_endless() -> None:
    opened = sources.from_tinyworld("conversations", "train", 0, limit=None)
    found = sources.DataSet([opened], "conversations", Faults(), 0)
    assert next(iter(found), None) is not None


def test_chosen_that_is_null_is_named_as_such_and_gold_is_read_again() -> None:
    saved = {"prompt": "q", "chosen": "a", "rejected": "b", "gold_chosen": 1.0, "gold_rejected": 0.25}
    assert rows.to_comparisons(saved)[0].gold_chosen == 1.0
    assert rows.to_comparisons(saved)[0].gold_rejected == 0.25


def test_nothing_to_ask_is_no_crash(tokenizer: PreTrainedTokenizerBase) -> None:
    assert asked_of(plain(uniform()), tokenizer, []) == []
