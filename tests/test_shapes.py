"""Shapes of rows: what Alpaca, ShareGPT, ChatML, rankings and margins become, as a person would write it down."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data import reader, sources
from rlhf.data.reader import Faults, read_rows
from rlhf.data.rows import Comparison, Kind, Malformed, to_comparisons, to_responses
from rlhf.data.shapes import Shape, to_items
from rlhf.errors import DataError, RecipeError, UserError
from rlhf.recipe import Source

MARKUP = "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
SYSTEM, USER, ANSWER = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))
MORE, LAST = {"role": "user", "content": "more"}, {"role": "assistant", "content": "last"}


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def items_of(path: Path, kind: Kind, mode: Any = "error", then: Any = None, **source: Any) -> list[Any]:
    opened = sources.open_sources((Source(path=path.name, **source),), path.parent, kind, "train", 0)
    return list(sources.DataSet(opened, kind, Faults(mode), 0, then))


# Conversations and prompts

CONVERSATIONS: list[tuple[Shape, dict[str, Any], list[dict[str, str]]]] = [
    ("alpaca", {"instruction": "u", "output": "a"}, [USER, ANSWER]),
    ("alpaca", {"instruction": "u", "input": "", "output": "a", "system": ""}, [USER, ANSWER]),
    ("alpaca", {"instruction": "u", "input": None, "output": "a", "system": None, "history": None}, [USER, ANSWER]),
    (
        "alpaca",
        {"instruction": "do", "input": "this", "output": "a"},
        [{"role": "user", "content": "do\n\nthis"}, ANSWER],
    ),
    ("alpaca", {"instruction": "u", "output": "a", "system": "s"}, [SYSTEM, USER, ANSWER]),
    (
        "alpaca",
        {"instruction": "more", "output": "last", "system": "s", "history": [["u", "a"]]},
        [SYSTEM, USER, ANSWER, MORE, LAST],
    ),
    ("sharegpt", {"conversations": [human("u"), gpt("a")]}, [USER, ANSWER]),
    (
        "sharegpt",
        {"conversations": [{"from": "user", "value": "u"}, {"from": "chatgpt", "value": "a"}], "id": 7},
        [USER, ANSWER],
    ),
    (
        "sharegpt",
        {"conversations": [human("u"), gpt("a"), human("more"), gpt("last")], "system": "s"},
        [SYSTEM, USER, ANSWER, MORE, LAST],
    ),
    ("sharegpt", {"conversations": [{"from": "system", "value": "s"}, human("u"), gpt("a")]}, [SYSTEM, USER, ANSWER]),
    ("chatml", {"messages": [SYSTEM, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    ("chatml", {"conversations": [USER, ANSWER], "system": "s"}, [SYSTEM, USER, ANSWER]),
    ("chatml", {"conversation": [USER, ANSWER, MORE, LAST]}, [USER, ANSWER, MORE, LAST]),
    (
        "chatml",
        {"text": "<|im_start|>system\ns<|im_end|>\n" + MARKUP},
        [SYSTEM, USER, ANSWER],
    ),
    ("chatml", {"text": "<|im_start|>user\r\nu<|im_end|><|im_start|>assistant\na<|im_end|>"}, [USER, ANSWER]),
]


@pytest.mark.parametrize(("shape", "row", "expected"), CONVERSATIONS)
def test_a_conversation_of_each_shape(shape: Shape, row: dict[str, Any], expected: list[dict[str, str]]) -> None:
    assert to_items(row, shape, "conversations") == [expected]
    assert to_items(row, shape, "prompts") == [expected[:-1]]
    assert to_items(row, shape, "texts") == ["\n".join(message["content"] for message in expected)]


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("alpaca", {"instruction": "u"}),
        ("sharegpt", {"conversations": [human("u")]}),
        ("chatml", {"messages": [USER]}),
        ("chatml", {"text": "<|im_start|>user\nu<|im_end|>"}),
    ],
)
def test_a_prompt_needs_no_answer(shape: Shape, row: dict[str, Any]) -> None:
    assert to_items(row, shape, "prompts") == [[USER]]
    with pytest.raises(Malformed):
        to_items(row, shape, "conversations")


@given(turns=st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=4))
def test_any_dialogue_is_the_same_in_every_shape(turns: list[tuple[str, str]]) -> None:
    expected = [
        {"role": role, "content": text}
        for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    rows: list[tuple[Shape, dict[str, Any]]] = [
        (
            "alpaca",
            {"instruction": turns[-1][0], "output": turns[-1][1], "history": [list(pair) for pair in turns[:-1]]},
        ),
        ("sharegpt", {"conversations": [turn for u, a in turns for turn in (human(u), gpt(a))]}),
        ("chatml", {"messages": expected}),
    ]
    if not any("<|im_" in message["content"] for message in expected):
        text = "\n".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>" for m in expected)
        rows.append(("chatml", {"text": text}))
    for shape, row in rows:
        assert to_items(row, shape, "conversations") == [expected]


@pytest.mark.parametrize(
    ("shape", "row", "fault"),
    [
        ("alpaca", {"messages": [USER, ANSWER]}, "no `instruction`, which a row of `format: alpaca` has"),
        ("alpaca", {"instruction": "u"}, "no `output`, which a row of `format: alpaca` has"),
        ("alpaca", {"instruction": "u", "output": None}, "no `output`"),
        ("alpaca", {"instruction": "u", "output": ""}, "the last answer is empty"),
        ("alpaca", {"instruction": "", "input": "", "output": "a"}, "`instruction` is empty"),
        ("alpaca", {"instruction": 3, "output": "a"}, "`instruction` of the row must be text, not int"),
        ("alpaca", {"instruction": "u", "input": ["x"], "output": "a"}, "`input` of the row must be text, not list"),
        ("alpaca", {"instruction": "u", "output": "\ud83d"}, "lone surrogate"),
        (
            "alpaca",
            {"instruction": "u", "output": "a", "history": "h"},
            "`history` must be a list of [user, assistant]",
        ),
        ("alpaca", {"instruction": "u", "output": "a", "history": [["x"]]}, "exchange 1 of `history` is not"),
        (
            "alpaca",
            {"instruction": "u", "output": "a", "history": [["x", "y"], ["x", 1]]},
            "`assistant` of exchange 2 of `history` must be text, not int",
        ),
        ("sharegpt", {"instruction": "u", "output": "a"}, "no `conversations`, which a row of `format: sharegpt` has"),
        ("sharegpt", {"conversations": []}, "`conversations` must be a list of turns, at least one"),
        ("sharegpt", {"conversations": "u"}, "`conversations` must be a list of turns"),
        ("sharegpt", {"conversations": ["u"]}, "turn 1 of `conversations` is not an object"),
        ("sharegpt", {"conversations": [{"value": "u"}]}, "turn 1 of `conversations` has no `from`"),
        ("sharegpt", {"conversations": [human("u"), {"from": "gpt"}]}, "turn 2 of `conversations` has no `value`"),
        ("sharegpt", {"conversations": [human("u"), {"from": "tool", "value": "x"}]}, "from the unknown 'tool'"),
        ("sharegpt", {"conversations": [human("u")]}, "no assistant turn to learn from"),
        ("sharegpt", {"conversations": [human("u"), gpt("a"), human("u")]}, "the last message is not the assistant's"),
        ("sharegpt", {"conversations": [human("u"), human("u"), gpt("a")]}, "must alternate"),
        (
            "sharegpt",
            {"conversations": [{"from": "system", "value": "s"}, human("u"), gpt("a")], "system": "s"},
            "must alt",
        ),
        ("chatml", {"instruction": "u", "output": "a"}, "no `messages` (nor `conversations`, `conversation`, `text`)"),
        ("chatml", {"conversations": [human("u")]}, "message 1 of `conversations` has no `role`"),
        ("chatml", {"messages": [USER, USER, ANSWER]}, "must alternate"),
        ("chatml", {"text": "hello"}, "`text` is not turns of <|im_start|>role"),
        ("chatml", {"text": "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na"}, "`text` is not turns"),
        ("chatml", {"text": "x<|im_start|>user\nu<|im_end|>"}, "`text` is not turns"),
        ("chatml", {"text": "<|im_start|>user\nu<|im_end|>x<|im_start|>assistant\na<|im_end|>"}, "`text` is not turns"),
        ("chatml", {"text": "<|im_start|>user\nu<|im_start|>assistant\na<|im_end|>"}, "`text` is not turns"),
        ("chatml", {"text": "<|im_start|>tool\nu<|im_end|>"}, "unknown role 'tool'"),
    ],
)
def test_what_is_wrong_with_a_row_of_a_shape_is_said(shape: Shape, row: dict[str, Any], fault: str) -> None:
    with pytest.raises(Malformed) as caught:
        to_items(row, shape, "conversations")
    assert fault in str(caught.value)


# Comparisons


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("alpaca", {"instruction": "u", "input": "", "chosen": "good", "rejected": "bad"}),
        ("sharegpt", {"conversations": [human("u")], "chosen": gpt("good"), "rejected": gpt("bad")}),
        ("sharegpt", {"conversations": [human("u")], "chosen": [gpt("good")], "rejected": "bad"}),
        (
            "chatml",
            {
                "messages": [USER],
                "chosen": {"role": "assistant", "content": "good"},
                "rejected": [{"role": "assistant", "content": "bad"}],
            },
        ),
        ("chatml", {"text": "<|im_start|>user\nu<|im_end|>", "chosen": "good", "rejected": "bad"}),
    ],
)
def test_a_comparison_of_each_shape(shape: Shape, row: dict[str, Any]) -> None:
    more = {"source": "s", "margin": 0.5, "gold_chosen": 1, "gold_rejected": 0.25}
    assert to_items(row, shape, "comparisons") == [Comparison([USER], "good", "bad")]
    assert to_items({**row, **more}, shape, "comparisons") == [
        Comparison([USER], "good", "bad", 1.0, 0.25, "s", margin=0.5)
    ]
    assert to_items(row, shape, "texts") == ["u\ngood\nbad"]


HH = "\n\nHuman: Hot?\n\nAssistant: In summer?\n\nHuman: Yes.\n\nAnd winter?\n\nAssistant:"
HH_PROMPT = [
    {"role": "user", "content": "Hot?"},
    {"role": "assistant", "content": "In summer?"},
    {"role": "user", "content": "Yes.\n\nAnd winter?"},
]


def test_dialogues_of_hh_rlhf_are_read_as_people_read_them() -> None:
    """Turns begin with a blank line and a name; a blank line, or a name elsewhere, begins none."""
    row = {"chosen": f"{HH} Cold.\n\nHumans say Human: so", "rejected": f"{HH} Cold."}
    better, worse = "Cold.\n\nHumans say Human: so", "Cold."
    assert to_items(row, "hh", "comparisons") == [Comparison(HH_PROMPT, better, worse)]
    assert to_items(row, "hh", "prompts") == [HH_PROMPT]
    assert to_items(row, "hh", "conversations") == [[*HH_PROMPT, {"role": "assistant", "content": better}]]
    said = "\n".join(message["content"] for message in HH_PROMPT)
    assert to_items(row, "hh", "texts") == [f"{said}\n{better}\n{worse}"]
    unanswered = {"chosen": HH.removesuffix("\n\nAssistant:")}
    assert to_items(unanswered, "hh", "prompts") == [HH_PROMPT]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "u", "completion": "a"}, "no `chosen`, which a row of `format: hh` has"),
        ({"chosen": HH}, "has no `rejected`"),
        ({"chosen": "good", "rejected": "bad"}, "`chosen` is not turns that begin with a blank line and Human: or"),
        ({"chosen": f"{HH} a", "rejected": "\n\nHuman: Hot?"}, "`rejected` is not turns"),
        ({"chosen": [USER], "rejected": "x"}, "`chosen` of the row must be text, not list"),
        ({"chosen": f"{HH} a", "rejected": f"{HH} a"}, "chosen and rejected are equal"),
        ({"chosen": f"{HH} a", "rejected": f"{HH} b\n\nHuman: c\n\nAssistant: d"}, "differ before their last"),
        ({"chosen": f"\n\nHuman: x{HH} a", "rejected": f"\n\nHuman: x{HH} b"}, "must alternate"),
    ],
)
def test_what_is_wrong_with_a_dialogue_of_hh_rlhf_is_said(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(Malformed) as caught:
        to_items(row, "hh", "comparisons")
    assert fault in str(caught.value)


def test_a_ranking_may_have_any_shape() -> None:
    row = {"conversations": [human("u")], "responses": [gpt("bad"), gpt("good")], "scores": [1, 2]}
    assert to_items(row, "sharegpt", "comparisons") == [Comparison([USER], "good", "bad")]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"conversations": [human("u"), gpt("a")], "chosen": "x", "rejected": "y"}, "does not end with the user"),
        (
            {"conversations": [human("u")], "chosen": human("x"), "rejected": "y"},
            "must be text or one assistant message",
        ),
        ({"conversations": [human("u")], "chosen": {"from": "gpt"}, "rejected": "y"}, "`chosen` has no `value`"),
        ({"conversations": [human("u")], "chosen": "x"}, "no `rejected`"),
        ({"conversations": [human("u")]}, "no `chosen`"),
    ],
)
def test_what_is_wrong_with_a_comparison_of_a_shape_is_said(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(Malformed) as caught:
        to_items(row, "sharegpt", "comparisons")
    assert fault in str(caught.value)


@pytest.mark.parametrize("margin", [-0.5, math.nan, math.inf, "1", True, [1], 10**400])
def test_a_margin_is_a_finite_number_of_at_least_0(margin: Any) -> None:
    row = {"prompt": "u", "chosen": "a", "rejected": "b", "margin": margin}
    with pytest.raises(Malformed, match="`margin`"):
        to_comparisons(row)


def test_margin_and_weight_are_read_and_null_is_none() -> None:
    row = {"prompt": "u", "chosen": "a", "rejected": "b"}
    assert to_comparisons({**row, "margin": 2, "weight": 0.5}) == [Comparison([USER], "a", "b", margin=2.0, weight=0.5)]
    assert to_comparisons({**row, "margin": None, "weight": None, "source": None}) == [Comparison([USER], "a", "b")]
    with pytest.raises(Malformed, match="`weight` is 0"):
        to_comparisons({**row, "weight": 0})


def test_what_a_comparison_is_saved_as_is_read_back_the_same() -> None:
    saved = Comparison([USER], "a", "b", 1.0, 0.5, "s", 0.25, 1 / 6)
    assert to_comparisons(json.loads(json.dumps(saved._asdict()))) == [saved]


# Rankings


@pytest.mark.parametrize("order", [{"ranks": [2, 1, 3]}, {"ranking": [1, 0, 2]}, {"scores": [0.5, 9, -3]}])
def test_a_ranking_gives_all_pairs_each_with_its_share_of_the_prompts_weight(order: dict[str, Any]) -> None:
    row = {
        "prompt": "u",
        "responses": ["mid", [{"role": "assistant", "content": "top"}], "low"],
        "source": "s",
        **order,
    }
    found = to_comparisons({**row, "gold": [0.5, 1, 0]})
    # worked by hand: K = 3, so (3 choose 2) = 3 comparisons of weight 1/3
    assert found == [
        Comparison([USER], "top", "mid", 1.0, 0.5, "s", weight=1 / 3),
        Comparison([USER], "mid", "low", 0.5, 0.0, "s", weight=1 / 3),
        Comparison([USER], "top", "low", 1.0, 0.0, "s", weight=1 / 3),
    ]
    assert all(pair.gold_chosen is None for pair in to_comparisons(row))


def test_ties_and_equal_texts_are_passed_over_and_still_count_in_the_weight() -> None:
    found = to_comparisons({"prompt": "u", "responses": ["a", "b", "b", "c"], "ranks": [1, 1, 2, 2]})
    # of 6 pairs: a-b (first) tie, b-b equal, b-c tie; left are a-b (second), a-c and b-c, each of weight 1/6
    assert [(pair.chosen, pair.rejected, pair.weight) for pair in found] == [
        ("a", "b", 1 / 6),
        ("a", "c", 1 / 6),
        ("b", "c", 1 / 6),
    ]


@given(ranks=st.lists(st.integers(0, 3), min_size=2, max_size=7))
def test_rankings_against_a_naive_count(ranks: list[int]) -> None:
    count = len(ranks)
    expected = {(f"r{i}", f"r{j}") for i in range(count) for j in range(count) if ranks[i] < ranks[j]}
    row = {"prompt": "u", "responses": [f"r{i}" for i in range(count)], "ranks": ranks}
    if not expected:
        with pytest.raises(Malformed, match="nothing to compare"):
            to_comparisons(row)
        return
    found = to_comparisons(row)
    assert {(pair.chosen, pair.rejected) for pair in found} == expected
    assert len(found) == len(expected)
    assert {pair.weight for pair in found} == {2 / (count * (count - 1))}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({}, "`responses` without `ranks` (nor `ranking`, nor `scores`)"),
        ({"ranks": [1, 2], "scores": [1, 2]}, "`ranks` and `scores` both order the responses"),
        ({"ranks": [1, 1]}, "nothing to compare"),
        ({"responses": ["a", "a"], "ranks": [1, 2]}, "nothing to compare"),
        ({"ranks": [1, 2, 3]}, "`ranks` must be a list of 2 numbers, one for each response, not 3 entries"),
        ({"ranks": 3}, "`ranks` must be a list of 2 numbers, one for each response, not int"),
        ({"ranks": [1, "x"]}, "`ranks` holds 'x', which is no finite number"),
        ({"scores": [1, math.nan]}, "`scores` holds 'nan'"),
        ({"ranking": [1, 2]}, "`ranking` must hold each number from 0 to 1 once"),
        ({"ranking": [0, 0]}, "`ranking` must hold each number from 0 to 1 once"),
        ({"ranks": [1, 2], "gold": [1]}, "`gold` must be a list of 2 numbers"),
        ({"ranks": [1, 2], "gold": [1, None]}, "`gold` holds 'None'"),
        ({"responses": ["a"], "ranks": [1]}, "`responses` has 1, and two are the least"),
        ({"responses": "ab", "ranks": [1, 2]}, "`responses` must be a list, not str"),
        ({"responses": ["a", [USER]], "ranks": [1, 2]}, "`responses[1]` must be text or one assistant message"),
        ({"prompt": None, "ranks": [1, 2]}, "`prompt` must be a list of messages"),
    ],
)
def test_what_is_wrong_with_a_ranking_is_said(row: dict[str, Any], fault: str) -> None:
    with pytest.raises(Malformed) as caught:
        to_comparisons({"prompt": "u", "responses": ["a", "b"], **row})
    assert fault in str(caught.value)


def test_the_responses_of_either_kind_of_row() -> None:
    assert to_responses({"prompt": "u", "responses": ["a", "b", "a"]}) == ([USER], ["a", "b", "a"])
    assert to_responses({"prompt": "u", "chosen": "a", "rejected": "b"}) == ([USER], ["a", "b"])


def test_rows_and_weight_of_a_source_count_rows_and_not_comparisons(tmp_path: Path) -> None:
    ranking = {"prompt": "u", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]}
    bad = {"prompt": "u", "responses": ["a", "b", "c"], "ranks": [1, 1, 1]}
    pair = {"prompt": "u", "chosen": "x", "rejected": "y"}
    path = write(tmp_path / "rows.jsonl", ranking, bad, pair, ranking)
    texts = [(found.chosen, found.rejected) for found in items_of(path, "comparisons", "skip", rows=2)]
    assert texts == [("a", "b"), ("a", "c"), ("b", "c"), ("x", "y")]
    assert len(items_of(path, "comparisons", "skip", weight=2.0)) == 14
    many = write(tmp_path / "many.jsonl", *[ranking] * 200)
    half = items_of(many, "comparisons", weight=0.5)
    assert 60 <= len(half) / 3 <= 140
    assert len(half) % 3 == 0  # a row comes whole or not at all


# Files


def test_a_json_file_may_hold_one_array(tmp_path: Path) -> None:
    rows = [{"instruction": "u", "output": "a"}, {"instruction": "more", "input": "", "output": "last"}]
    path = tmp_path / "alpaca.json"
    for text in (json.dumps(rows), "\ufeff \n" + json.dumps(rows, indent=2) + "\n", " " * 5000 + json.dumps(rows)):
        path.write_text(text, encoding="utf-8")
        assert items_of(path, "conversations", format="alpaca") == [[USER, ANSWER], [MORE, LAST]]
    zipped = tmp_path / "alpaca.json.gz"
    zipped.write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert items_of(zipped, "conversations", format="alpaca") == [[USER, ANSWER], [MORE, LAST]]


def test_a_json_file_may_hold_lines_as_before(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", {"text": "a"}, {"text": "b"})
    assert items_of(path, "texts") == ["a", "b"]


def test_rows_of_an_array_are_named_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a"}, 7, {"text": None}, {"text": "b"}], indent=1), encoding="utf-8")
    opened = sources.open_sources((Source(path=path.name),), tmp_path, "texts", "train", 0)
    found = sources.DataSet(opened, "texts", Faults("skip"), 0)
    assert list(found) == ["a", "b"]
    assert found.faults.examples == [
        f"{path}, row 2: a JSON object is expected, this is a number",
        f"{path}, row 3: `text` of the row must be text, not NoneType",
    ]
    with pytest.raises(DataError, match="row 2: a JSON object is expected"):
        items_of(path, "texts")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'[{"text": "a"}, {"text"', "rows.json: not valid JSON"),
        (b'[{"text": "a"}]\n[{"text": "a"}]', "rows.json: not valid JSON: Extra data"),
        (b"[" * 100_000, "rows.json: JSON nested too deeply"),
        (b'[\n{"text": "\xff"}]', "rows.json, line 2: not UTF-8 text"),
        (b"[]", "rows.json: no good row"),
        (b"", "rows.json: no good row"),
        (b'["%s"]' % (b"x" * 2000), "rows.json: a JSON array larger than 0 MiB; make it JSON Lines"),
    ],
)
def test_an_array_that_cannot_be_read_is_named(
    tmp_path: Path, content: bytes, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if b"x" in content:
        monkeypatch.setattr(reader, "MAX_TEXT_BYTES", 1000)
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    for mode in ("error", "skip"):
        with pytest.raises(DataError) as caught:
            list(read_rows(path, Faults(mode)))  # type: ignore[arg-type]
        assert fault in str(caught.value)


# What a fault says of other formats


@pytest.mark.parametrize(
    ("kind", "row", "shape"),
    [
        ("conversations", {"instruction": "u", "output": "a"}, "alpaca"),
        ("conversations", {"conversations": [human("u"), gpt("a")]}, "sharegpt"),
        ("conversations", {"conversations": [USER, ANSWER]}, "chatml"),
        ("conversations", {"text": MARKUP}, "chatml"),
        ("texts", {"instruction": "u", "output": "a"}, "alpaca"),
        ("prompts", {"instruction": "u"}, "alpaca"),
        ("comparisons", {"instruction": "u", "chosen": "a", "rejected": "b"}, "alpaca"),
        ("comparisons", {"conversations": [human("u")], "chosen": gpt("a"), "rejected": gpt("b")}, "sharegpt"),
        ("comparisons", {"chosen": f"{HH} a", "rejected": f"{HH} b"}, "hh"),
        ("prompts", {"chosen": f"{HH} a", "rejected": f"{HH} b"}, "hh"),
    ],
)
def test_a_row_of_another_shape_names_the_format_that_would_read_it(
    kind: Kind, row: dict[str, Any], shape: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", row)
    with pytest.raises(DataError, match=f"line 1: no `.*; `format: {shape}` would read it"):
        items_of(path, kind)
    assert len(items_of(path, kind, format=shape)) == 1


def test_a_row_that_no_format_reads_names_none() -> None:
    for row in ({"messages": [USER]}, {"instruction": "u", "output": ""}, {"conversations": [human("u")]}):
        with pytest.raises(Malformed) as caught:
            to_items(row, "trl", "conversations")
        assert "format" not in str(caught.value)


def test_a_row_that_lacks_what_is_needed_is_told_what_it_has_and_what_is_needed() -> None:
    with pytest.raises(Malformed) as caught:
        to_items({"question": "q", "better": "a", "worse": "b"}, "trl", "comparisons")
    said = (
        "no `prompt`; the row has `question`, `better`, `worse`, and comparisons have `prompt`, `chosen` and `rejected`"
    )
    assert str(caught.value).startswith(said)
    with pytest.raises(Malformed) as caught:
        to_items({f"column {number}": "x" * 1000 for number in range(100)}, "trl", "prompts")
    assert "`column 9`, ..., and prompts have" in str(caught.value) and len(str(caught.value)) < 300


def test_the_built_in_world_has_one_shape() -> None:
    source = Source(builtin="tinyworld", rows=1, format="alpaca")
    with pytest.raises(RecipeError, match="leave out format: alpaca"):
        sources.open_sources((source,), Path(), "conversations", "train", 0)


# What a stage makes of each item


def shout(text: str) -> str:
    if text == "bad":
        raise UserError("the template refuses it")
    return text.upper()


def test_what_a_stage_makes_of_each_item_comes_in_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "bad"}, {"text": "b"}, {"text": "c"})
    assert items_of(path, "texts", "skip", shout, rows=2) == ["A", "B"]


def test_a_users_error_of_a_stage_is_the_fault_of_the_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "bad"}, {"text": "b"})
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: the template refuses it\n.*on_bad_row=skip"):
        items_of(path, "texts", "error", shout)
    opened = sources.open_sources((Source(path=path.name, weight=2.0),), tmp_path, "texts", "train", 0)
    found = sources.DataSet(opened, "texts", Faults("skip"), 0, shout)
    assert list(found) == ["A", "B", "A", "B"]
    assert found.faults.report() == (
        f"skipped 1 bad rows ({path}: 1); the first: {path}, line 2: the template refuses it"
    )


def test_other_errors_of_a_stage_are_no_fault_of_the_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "a"})
    with pytest.raises(ZeroDivisionError):
        items_of(path, "texts", "skip", lambda text: 1 / 0)
