"""The steps of preparing texts against naive ones: cleaning, filters, personal data, sketches, duplicates."""

import random
import re
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.pieces import pieces
from rlhf.data.prepare.cleaning import STEPS, clean
from rlhf.data.prepare.duplicates import DROPPED, Sketches, candidates, dropped_of, equal_texts, near_duplicates
from rlhf.data.prepare.filters import RULES, has_no_spaces, is_code, judge
from rlhf.data.prepare.incontext import Example, InContext, made_before
from rlhf.data.prepare.personal import KINDS, mask
from rlhf.data.prepare.repetition import DUPLICATE, NAMES, TOP, repeated_shares
from rlhf.data.prepare.sketches import (
    WordHashes,
    are_near_duplicates,
    least_similarity,
    most_changed,
    run_hashes,
    signatures,
    similarity,
    words_apart,
)
from rlhf.data.prepare.store import ROW, Store
from rlhf.data.prepare.treatment import Steps, treat
from rlhf.data.prepare.workers import Workers
from rlhf.data.words import words_of
from rlhf.recipe import FiltersSection
from rlhf.tinyworld.documents import documents

EVERY_STEP = tuple(STEPS)
LIMITS = {
    key: value for key, value in FiltersSection().model_dump().items() if value is not None and key != "from_words"
}
PROSE = (
    "The harbour was quiet that morning, and nobody on the old pier had noticed how far the water had gone down. A boy "
    "with a red cap sat beside his grandfather and asked why the boats lay on their sides. It happens twice a day, "
    "said the old man, and then he told him of the moon, of which the boy did not believe a single word."
)


# Cleaning


@pytest.mark.parametrize(
    ("text", "cleaned", "steps"),
    [
        ("schÃ¶n, cafÃ© â€œyesâ€\x9d", "schön, café “yes”", ("encoding",)),
        ("\x93quoted\x94", "“quoted”", ("encoding",)),
        ("a\r\nb\rc\u2028d\x0ce", "a\nb\nc\nd\ne", ("line_ends",)),
        ("a\x00b\x1b[31mred\x1b[0m\ufeff\x7f", "abred", ("control_characters",)),
        ("e\u0301 \u1100\u1161", "é 가", ("unicode",)),
        ("a\xa0b \t\nc\n\n\n\nd\n\n", "a b\nc\n\nd", ("white_space",)),
        ("    if x:\n        y  =  1", "    if x:\n        y  =  1", ()),
        ("第九回　恋风流", "第九回　恋风流", ()),
        ("l’été — “bon”…", "l’été — “bon”…", ()),
        ("Привет, мир! Ελλάδα", "Привет, мир! Ελλάδα", ()),
    ],
)
def test_cleaning_mends_what_is_wrong_and_nothing_else(text: str, cleaned: str, steps: tuple[str, ...]) -> None:
    assert clean(text, EVERY_STEP) == (cleaned, steps)


def test_each_step_of_cleaning_can_be_off() -> None:
    for step in EVERY_STEP:
        others = tuple(name for name in EVERY_STEP if name != step)
        text = {"encoding": "cafÃ©", "line_ends": "a\rb", "control_characters": "a\x01b", "unicode": "e\u0301",
                "white_space": "a \n"}[step]  # fmt: skip
        assert clean(text, (step,))[1] == (step,)
        assert step not in clean(text, others)[1]


@given(st.text(st.characters(codec="utf-8"), max_size=200))
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    steps = tuple(step for step in EVERY_STEP if step != "encoding")
    once, _ = clean(text, steps)
    assert clean(once, steps) == (once, ())
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]|\n\n\n|[ \t]\n", once)


@given(st.lists(st.text(string.ascii_letters + string.digits + ",.;!?", min_size=1), max_size=30))
def test_cleaning_leaves_plain_words_alone(words: list[str]) -> None:
    text = " ".join(words)
    assert clean(text, EVERY_STEP) == (text, ())


# Filters


def verdict_of(text: str, from_words: int = 50, **limits: float) -> str | None:
    found = judge([text], [[words_of(text)]], {**LIMITS, **limits}, from_words)[0]
    return found.rule if found else None


LINES = [f"{word} {other} went there with number {n}" for n, (word, other) in enumerate(zip(
    PROSE.split()[:40], PROSE.split()[20:], strict=False))]  # fmt: skip
DISTINCT = " ".join(f"{a}{b}ing" for a in string.ascii_lowercase for b in "aeiou")  # 130 different words


@pytest.mark.parametrize(
    ("rule", "broken", "kept"),
    [
        ("min_words", "only four words here", "these are just five words"),
        ("max_words", "one two three four five six seven", "one two three four five six"),
        ("replacement_characters", "a lost \ufffd character stands here", f"{PROSE} \ufffd"),
        ("min_mean_word_length", "ab cd " * 0 + " ".join(f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh"), DISTINCT),
        ("max_mean_word_length", " ".join(w * 3 for w in DISTINCT.split()), DISTINCT),
        ("hashes", DISTINCT + " #" * 14, DISTINCT + " #" * 12),
        ("ellipses", DISTINCT.replace(" ", " ... ", 14), DISTINCT.replace(" ", " ... ", 12)),
        ("bullet_lines", "\n".join(f"- {line}" for line in LINES), "\n".join(["- x"] * 0 + LINES)),
        (
            "ellipsis_lines",
            "\n".join([f"{line}…" for line in LINES[:7]] + LINES[7:20]),
            "\n".join([f"{line}…" for line in LINES[:6]] + LINES[6:20]),
        ),
        ("min_alphabetic", DISTINCT + " " + "4711 " * 33, DISTINCT + " " + " ".join(map(str, range(1000, 1032)))),
        ("stop_words", DISTINCT + " the", PROSE),
        ("duplicate_lines", "\n".join([*(["ab"] * 12), *LINES[:20]]), "\n".join([*(["ab"] * 8), *LINES[:20]])),
        (
            "duplicate_paragraphs",
            "\n\n".join([*(["x\ny"] * 5), *("\n".join(LINES[n : n + 2]) for n in range(0, 16, 2))]),
            "\n\n".join([*(["x\ny"] * 3), *("\n".join(LINES[n : n + 2]) for n in range(0, 16, 2))]),
        ),
        ("duplicate_line_characters", "\n".join([PROSE] * 2 + LINES[:3]), "\n".join([PROSE[:80]] * 2 + LINES)),
        ("duplicate_paragraph_characters", f"{PROSE}\n\n{PROSE}\n\n" + "\n".join(LINES[:9]), PROSE),
        ("top_2gram", DISTINCT + " more money" * 20, DISTINCT),
        ("top_3gram", DISTINCT + " x more money now y".replace("x", "") * 14, DISTINCT),
        ("top_4gram", DISTINCT + "".join(f" buy more money now {c}{c}" for c in string.ascii_lowercase[:9]), DISTINCT),
        ("duplicate_5grams", DISTINCT + " " + " ".join(DISTINCT.split()[:30]), DISTINCT),
        ("duplicate_6grams", DISTINCT + " " + " ".join(DISTINCT.split()[:30]), DISTINCT),
        ("duplicate_7grams", DISTINCT + " " + " ".join(DISTINCT.split()[:30]), DISTINCT),
        ("duplicate_8grams", DISTINCT + " " + " ".join(DISTINCT.split()[:30]), DISTINCT),
        ("duplicate_9grams", DISTINCT + " " + " ".join(DISTINCT.split()[:30]), DISTINCT),
        ("duplicate_10grams", DISTINCT + " " + " ".join(DISTINCT.split()[:30]), DISTINCT),
    ],
)
def test_every_rule_removes_what_breaks_it_alone(rule: str, broken: str, kept: str) -> None:
    limit = {"max_words": 6.0, "stop_words": 2.0}.get(rule, LIMITS.get(rule))
    assert limit is not None
    for text, found in ((broken, rule), (kept, None)):
        verdict = judge([text], [[words_of(text)]], {rule: limit}, 0)[0]
        assert (verdict.rule if verdict else None) == found


def test_every_rule_is_tested_and_in_the_recipe() -> None:
    marks = test_every_rule_removes_what_breaks_it_alone.pytestmark  # type: ignore[attr-defined]
    tested = [case[0] for case in marks[0].args[1]]
    assert tested == [rule.name for rule in RULES]
    assert set(tested) == set(FiltersSection.model_fields) - {"from_words"}


def test_what_the_rules_were_not_made_for_is_not_judged_by_them() -> None:
    short = "20 -> 30\n12 -> 22\n7 -> 17"
    assert (verdict_of(short), verdict_of(short, from_words=0)) == (None, "min_mean_word_length")
    chinese = "".join(chr(0x4E00 + 37 * n % 5000) + ("，" if n % 9 == 0 else "") for n in range(400))
    assert has_no_spaces(chinese)
    assert verdict_of(chinese) is None
    code = Path(__file__).read_text(encoding="utf-8")
    assert is_code(code)
    assert not is_code(PROSE)
    assert not is_code("\n".join(documents_of(60)))
    assert verdict_of(code) is None
    set_apart = re.sub(r"([.,])", r" \1 ", PROSE)  # as tokenizers leave it
    assert verdict_of(set_apart) is None
    assert verdict_of(PROSE) is None


def documents_of(count: int) -> list[str]:
    found = documents("train", 5)
    return [next(found) for _ in range(count)]


@given(
    st.lists(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=30), min_size=1, max_size=4),
    st.sampled_from([1, 2]),
)
def test_repetition_as_counted_naively(texts: list[list[str]], unit: int) -> None:
    found = repeated_shares(texts, unit)
    for words, shares in zip(texts, found, strict=True):
        total = max(1, sum(map(len, words)))
        for name, n, share in zip(NAMES, (*TOP, *DUPLICATE), shares, strict=True):
            runs = [tuple(words[i : i + n * unit]) for i in range(len(words) - n * unit + 1)]
            if name.startswith("top"):
                counts = Counter(runs)
                naive = max((c * sum(map(len, run)) for run, c in counts.items() if c > 1), default=0)
            else:
                again = {i + k for i, run in enumerate(runs) if run in runs[:i] for k in range(n * unit)}
                naive = sum(len(words[i]) for i in again)
            assert share == pytest.approx(naive / total), (name, words)


# Personal data

ALL_KINDS = tuple(KINDS)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *(("email", text) for text in ("a@b.co", "john.doe+x@mail.example.org",
            "联系 zhang@163.com。", "Émile.zola@exämple.fr", "иван@почта.рф",
            "写信到bob@x.com谢谢", "bob@x.com: hello", "_bob@x.com_", "jo@image.png.com")),
        *(("phone", text) for text in (
            "+44 161 496 0000", "+1 (212) 555-0123", "(212) 555-0123", "call 212.555.0123.", "1-800-555-0199",
            "+4915112345678", "+86 138 0013 8000", "13800138000", "0161 496 0000", "030/12345678", "+33 1 23 45 67 89",
            "01 23 45 67 89", "电话：010-62781234", "+91-98765-43210",
            "我的手机号是13812345678谢谢", "800-400-5001", "电话（010）62781234", "+1.2125550123", "+12125550123",
            "+7 495 123-45-67", "+49 (0)30 123456",
        )),
        *(("ip", text) for text in ("8.8.8.8", "from 93.184.216.34 to", "Server 8.8.8.8",
            "Visit 93.184.216.34", "Client/93.184.216.34", "http://93.184.216.34/",
            "ip=93.184.216.34", "地址8.8.8.8在", "2001:4860:4860::8888")),
        *(("card", text) for text in ("4111 1111 1111 1111", "5555-5555-5555-4444", "3782 822463 10005")),
    ],
)  # fmt: skip
def test_personal_data_is_masked(kind: str, text: str) -> None:
    masked, counts = mask(text, ALL_KINDS)
    assert counts == {kind: 1}
    assert f"[{kind.upper()}]" in masked
    assert mask(text, tuple(other for other in ALL_KINDS if other != kind))[1].get(kind) is None


@pytest.mark.parametrize(
    "text",
    [
        "version 1.2.3.4", "v10.1.2.3", "1.2.3.4.5", "192.168.0.1", "127.0.0.1", "256.1.1.1", "chapter 1.2.3.4",
        "2003-04-05", "04/05/2003", "04.05.2003", "05-04-2003", "12:30:45", "2026-11-21T10:00:00", "07/04/1776 18:00",
        "$1,234,567.89", "1.234.567,89", "100 000 000", "1 000 000 000 000", "3.14159265358979", "0.5 0.25 0.125",
        "ISBN 978-0-306-40615-7", "0-306-40615-2", "9780306406157", "10.1016/j.cell.2019.05.031", "arXiv:2112.11446",
        "1234567890123456", "4111 1111 1111 1112", "2010-2015", "1990 1995 2000 2005", "1010 1101 1001 0001 1010 1111",
        "@john", "a@b", "user@localhost", "std::vector<int>", "dead::beef", "2001:db8::1", "01 02 03 04 05 06",
        "Python 3.11.4.1", "Matrix rows 01 02 03 04 05", "300-400-5000", "git@github.com:owner/repo",
        "ssh://git@github.com/owner", "bob@host.com:~/notes/", "icon@2x.png", "hero@3x.jpg 2x", "a@b.c_d",
        "Chrome/120.0.0.0 Safari/537.36", 'version="98.1.2.3"', '"version": "98.1.2.3"', "v=98.1.2.3", "版本98.1.2.3",
        "版本号：98.1.2.3", "第98.1.2.3节", "224.0.0.251", "+3.14159265", "+0.123456789012", "+1.234567890",
        "+5 10 15 20 25", "01234.5678", "00001,2345", "01234+5678",
    ],
)  # fmt: skip
def test_what_only_looks_like_personal_data_stays(text: str) -> None:
    assert mask(text, ALL_KINDS) == (text, Counter())


@given(st.from_regex(r"[a-z][a-z0-9]{0,9}(\.[a-z]{1,8})?@[a-z]{2,9}\.(com|org|de|co\.uk)", fullmatch=True))
def test_any_ordinary_address_is_masked(address: str) -> None:
    assert mask(f"Write to {address}, please.", ("email",))[0] == "Write to [EMAIL], please."


@given(st.sampled_from(["4", "51", "37"]), st.integers(0, 10**12), st.sampled_from(["", " ", "-"]))
def test_card_numbers_are_masked_when_the_check_digit_is_right(first: str, number: int, between: str) -> None:
    length = 15 if first == "37" else 16
    body = (first + f"{number:014}")[: length - 1]
    total = sum(int(d) if n % 2 else sum(divmod(2 * int(d), 10)) for n, d in enumerate(reversed(body)))
    right = -total % 10
    for check in range(10):
        digits = body + str(check)
        grouped = between.join(digits[i : i + 4] for i in range(0, length, 4))
        assert ("[CARD]" in mask(f"No. {grouped}", ("card",))[0]) == (check == right)


@given(st.dates(), st.sampled_from(["%Y-%m-%d", "%d.%m.%Y", "%d/%m/%Y", "%m-%d-%Y", "%H:%M:%S", "%Y%m%d"]))
def test_dates_and_times_are_not_masked(date: "object", form: str) -> None:
    text = f"on {date:{form}} it was"
    assert mask(text, ALL_KINDS)[0] == text


# Sketches


def naive_similarity(first: list[str], second: list[str]) -> float:
    def runs(words: list[str]) -> Counter[tuple[str, ...]]:
        marked = ["<", "<", *words, ">", ">"]
        return Counter(tuple(marked[i : i + 3]) for i in range(len(words) + 2))

    one, other = runs(first), runs(second)
    return sum((one & other).values()) / sum((one | other).values())


@given(*[st.lists(st.sampled_from("abcd"), max_size=25)] * 2)
def test_similarity_is_jaccards_of_the_runs_with_their_counts(first: list[str], second: list[str]) -> None:
    runs, bounds = run_hashes([first, second], WordHashes())
    one, other = runs[: bounds[1]], runs[bounds[1] :]
    assert similarity(one, other) == pytest.approx(naive_similarity(first, second))


def test_limits_by_hand() -> None:
    # 5 %: below 20 words one may differ; 20: 1 + 1.96 * sqrt(0.95) = 2.91; 100: 5 + 1.96 * sqrt(4.75) = 9.27
    assert most_changed(np.array([10, 19, 20, 100]), 0.05).tolist() == [1, 1, 2, 9]
    # (22 - 6) / (22 + 6), (102 - 27) / (102 + 27)
    assert least_similarity(np.array([20, 100]), 0.05).tolist() == pytest.approx([16 / 28, 75 / 129])


@given(*[st.lists(st.sampled_from("abc"), max_size=8)] * 2)
def test_words_apart_as_counted_naively(first: list[str], second: list[str]) -> None:
    def naive(a: list[str], b: list[str]) -> int:
        if not a or not b:
            return len(a) + len(b)
        if a[0] == b[0]:
            return naive(a[1:], b[1:])
        return 1 + min(naive(a[1:], b), naive(a, b[1:]), naive(a[1:], b[1:]))

    assert words_apart(first, second) == naive(first, second)


def test_short_texts_of_the_same_phrases_are_told_apart() -> None:
    one = words_of(
        "The soup was great. Verdict: good\nThe film was dull. Verdict: bad\nThe trip was fine. Verdict: good"
    )
    other = words_of(
        "The trip was fine. Verdict: good\nThe soup was great. Verdict: good\nThe film was dull. Verdict: bad"
    )
    assert naive_similarity(one, other) >= 0.6
    assert not are_near_duplicates(one, other, naive_similarity(one, other), 0.05)
    assert are_near_duplicates(one, [*one[:-1], "bad"], naive_similarity(one, [*one[:-1], "bad"]), 0.05)


def test_signatures_estimate_similarity_of_short_and_long_texts() -> None:
    draw = random.Random(1)
    for length in (12, 200):
        first = [[str(draw.random()) for _ in range(length)] for _ in range(200)]
        second = [[*words[: length - 3], "x", "y", "z"] for words in first]
        agree = (signatures(first, WordHashes()) == signatures(second, WordHashes())).mean()
        assert agree == pytest.approx(naive_similarity(first[0], second[0]), abs=0.02)


# Duplicates


def stored(folder: Path, texts: list[str], steps: Steps) -> Store:
    """Texts in a store of three parts."""
    store = Store(folder)
    third = len(texts) // 3 + 1
    for start in range(0, len(texts), third):
        treated = treat(steps, texts[start : start + third])
        rows = np.zeros(len(treated.kept), dtype=ROW)
        rows["row"], rows["size"], rows["words"], rows["digest"] = (
            treated.kept + start, treated.sizes, treated.words, treated.digests,
        )  # fmt: skip
        rows["start"] = np.cumsum(treated.sizes) - treated.sizes
        arrays = {"rows": rows, "sketched": treated.sketched, "keys": treated.keys, "slots": treated.slots}
        facts = {"rows": third, "files": [], "kept": len(rows), "sketched": len(treated.sketched), "counts": {}}
        store.add([treated.text], arrays, [], facts)
    return store


SKETCHED = Steps(band_rows=4, sketched_words=10)


def changed(text: str, share: float, vocabulary: list[str], draw: random.Random) -> str:
    words = text.split(" ")
    for place in draw.sample(range(len(words)), max(1, round(share * len(words)))):
        other = draw.choice(vocabulary)
        words[place] = draw.choice([other, "", f"{words[place]} {other}"])
    return " ".join(word for word in words if word)


@pytest.mark.parametrize("kind", ["english", "chinese", "templates"])
def test_planted_copies_are_found_and_distinct_documents_kept(tmp_path: Path, kind: str) -> None:
    draw = random.Random(kind)
    vocabulary = [f"w{n}" for n in range(3000)]
    if kind == "english":
        originals = [" ".join(draw.choices(vocabulary, k=draw.randint(20, 300))) for _ in range(600)]
    elif kind == "chinese":
        vocabulary = [chr(0x4E00 + n) for n in range(3000)]
        originals = [" ".join(draw.choices(vocabulary, k=draw.randint(20, 300))) for _ in range(600)]
    else:  # the built-in world's: few words, few patterns
        originals = [" ".join(text.split()) for text in dict.fromkeys(documents_of(1500))]
        originals = [text for text in originals if len(text.split()) >= 20][:600]
        vocabulary = sorted({word for text in originals for word in text.split()})
    copies = [(number, changed(originals[number], 0.05, vocabulary, draw)) for number in range(400)]
    rows = [*enumerate(originals), *copies]
    draw.shuffle(rows)
    texts = [text.replace(" ", "") if kind == "chinese" else text for _, text in rows]
    store = stored(tmp_path, texts, SKETCHED)
    equal = equal_texts(store)
    dropped = near_duplicates(store, equal, 0.05, Workers(1))
    gone = {int(document) for document in (*equal["document"], *dropped["document"])}
    left = Counter(group for place, (group, _) in enumerate(rows) if place not in gone)
    found = sum(left[group] == 1 for group in range(400))
    lost = sum(left[group] == 0 for group in range(600))
    assert found + lost >= 0.95 * 400
    assert lost <= 0.01 * 600
    assert found >= 0.95 * 400


def test_each_copy_goes_with_one_that_stays_whatever_the_order(tmp_path: Path) -> None:
    draw = random.Random(2)
    vocabulary = [f"w{n}" for n in range(2000)]
    original = " ".join(draw.choices(vocabulary, k=150))
    family = [original, *(changed(original, 0.05, vocabulary, draw) for _ in range(5))]
    others = [" ".join(draw.choices(vocabulary, k=150)) for _ in range(30)]
    for seed in range(4):
        texts = [*others, *family]
        random.Random(seed).shuffle(texts)
        store = stored(tmp_path / str(seed), texts, SKETCHED)
        equal = equal_texts(store)
        dropped = near_duplicates(store, equal, 0.05, Workers(1))
        assert len(dropped) == 5
        assert {texts[int(row["of"])] for row in dropped} == {original}  # it is like most of them


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda pair: pair[0] < pair[1]), unique=True))
def test_what_is_dropped_is_like_what_stays_and_nothing_alike_stays(pairs: list[tuple[int, int]]) -> None:
    alike = np.array([(b, a, 0.9) for a, b in pairs], dtype=DROPPED)
    dropped = {int(row["document"]): int(row["of"]) for row in dropped_of(alike)}
    edges = {frozenset(pair) for pair in pairs}
    for document, of in dropped.items():
        assert of not in dropped
        assert frozenset((document, of)) in edges
    assert all(a in dropped or b in dropped for a, b in pairs)


def test_a_document_that_others_went_for_stays() -> None:
    alike = np.array([(1, 0, 0.9), (2, 0, 0.9), (2, 1, 0.9), (3, 2, 0.8)], dtype=DROPPED)
    assert [int(row["document"]) for row in dropped_of(alike)] == [0, 1, 3]  # 2 is like all others
    assert [(int(row["document"]), int(row["of"])) for row in dropped_of(alike, np.array([1, 3], dtype=np.uint64))] == [
        (0, 1),
        (2, 1),
    ]


def test_thousands_of_copies_of_one_page_make_few_pairs(tmp_path: Path) -> None:
    draw = random.Random(5)
    page = [f"w{n}" for n in range(60)]
    texts = []
    for number in range(400):
        words = list(page)
        words[draw.randrange(60)] = f"x{number}"
        texts.append(" ".join(words))
    store = stored(tmp_path, [*texts, *documents_of(20)], SKETCHED)
    dropped = near_duplicates(store, equal_texts(store), 0.05, Workers(1))
    assert len(dropped) == 399
    assert len(set(dropped["of"].tolist())) == 1
    pairs = [store.array(f"pairs-{number}") for number in range(3)]
    assert sum(len(found) for found in pairs if found is not None) < 400 * 16


def test_equal_texts_leave_the_first_one(tmp_path: Path) -> None:
    texts = ["b", "a", "b", "c", "a", "b"]
    found = equal_texts(stored(tmp_path, texts, Steps()))
    assert [(int(row["document"]), int(row["of"])) for row in found] == [(2, 0), (4, 1), (5, 0)]


def test_candidates_are_the_same_when_sorted_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(3)
    texts = [" ".join(draw.choices([f"w{n}" for n in range(30)], k=40)) for _ in range(40)]
    texts += [changed(text, 0.05, ["x", "y"], draw) for text in texts[:20]] * 2
    found = []
    for number, at_once in enumerate((2**22, 7)):
        monkeypatch.setattr("rlhf.data.prepare.duplicates.AT_ONCE", at_once)
        store = stored(tmp_path / str(number), texts, SKETCHED)
        equal = equal_texts(store)
        sketches = Sketches(store, equal["document"])
        found.append((equal.tolist(), candidates(sketches, 0.05, False, "pairs").tolist()))
    assert found[0] == found[1]
    assert len(found[0][0]) == 20 and len(found[0][1]) >= 20


# A chunk


def test_a_texts_fate_does_not_depend_on_its_chunk() -> None:
    texts = [
        *documents_of(30),
        PROSE,
        "x",
        "",
        "a\x00b c d e f",
        PROSE.replace("quiet", "calm"),
        "mail a@b.com now to me",
    ]
    steps = Steps(EVERY_STEP, LIMITS, 20, ALL_KINDS, None, 0, 4, 10)
    whole = treat(steps, texts)
    single = [treat(steps, [text]) for text in texts]
    assert whole.text == b"".join(one.text for one in single)
    assert whole.kept.tolist() == [n for n, one in enumerate(single) if len(one.kept)]
    assert (whole.digests == np.concatenate([one.digests for one in single])).all()
    assert (whole.slots == np.concatenate([one.slots for one in single])).all()
    assert [(r.number, r.why) for r in whole.removed] == [
        (n, r.why) for n, one in enumerate(single) for r in one.removed
    ]
    assert whole.masked == {"email": 1}


@given(st.text(" \nab", max_size=80), st.integers(2, 9))
def test_pieces_are_the_whole(text: str, longest: int) -> None:
    found = list(pieces(text, longest))
    assert "".join(found) == text
    assert all(len(piece) <= longest for piece in found)
    assert all(found[:-1])


# In-context documents


def test_in_context_documents_are_of_every_kind_and_evenly_among_the_others() -> None:
    rows = [Example("Task line.\n\n", f"Q{n} -> A{n}\n", f"Q{n} -> A{n}!") for n in range(6)]
    few = [Example("", f"D{n}\n", f"E{n}") for n in range(2)]
    made = InContext({"many": rows, "few": few, "none": []}, (0, 1, 4), seed=1)
    assert made.left_out == {"few": [4], "none": [0, 1, 4]}
    texts = [made.document(n) for n in range(300)]
    assert texts == [InContext({"many": rows, "few": few}, (0, 1, 4), seed=1).document(n) for n in range(300)]
    shots: Counter[tuple[str, int]] = Counter()
    for text in texts:
        lines = [line for line in text.split("\n") if line]
        if lines[0] == "Task line.":
            shown, item = lines[1:-1], lines[-1]
            assert item.endswith("!") and item[:-1] not in shown and len(set(shown)) == len(shown)
            shots["many", len(shown)] += 1
        else:
            assert len({line[1] for line in lines}) == len(lines)
            shots["few", len(lines) - 1] += 1
    assert set(shots) == {("many", 0), ("many", 1), ("many", 4), ("few", 0), ("few", 1)}
    assert min(shots.values()) > 25
    assert [made_before(n, 0.25) for n in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
