"""Which items of a task occur in training texts, against a naive search."""

from hypothesis import given
from hypothesis import strategies as st

from evaluation.contamination import OverlapSearch
from rlhf.data.overlap import LONGEST_RUN, Probe
from rlhf.data.words import ngrams, words_of

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def long_text(key: str, words: int = 20) -> str:
    return " ".join(f"{key}{letter}" for letter in LETTERS[:words])


def search(probes: list[Probe], texts: list[str]) -> dict[str, object]:
    found = OverlapSearch({"task": probes})
    found.read(texts)
    return found.results()["task"].summary()


def test_a_copy_is_found_whatever_its_layout_and_an_unseen_item_is_not() -> None:
    probes = [Probe(long_text(key), "yes") for key in LETTERS[:10]]
    planted = "Intro words,\n" + long_text("c").upper().replace(" ", " - ") + "; and more."
    planted_with_answer = long_text("d") + "\nAnswer follows. " + long_text("e") + " YES!"
    found = search(probes, ["nothing of interest", planted, planted_with_answer])
    assert (found["items"], found["too_short"], found["overlap"], found["contaminated"]) == (10, 0, 0.3, True)
    assert found["overlap_with_answer"] == 1
    assert found["example"] == " ".join(long_text("c").split()[:13])


def test_thirteen_words_are_needed_and_twelve_are_not_enough() -> None:
    probe = [Probe(long_text("q"), "yes")] * 2
    words = long_text("q").split()
    for length, overlap in ((12, 0.0), (13, 1.0)):
        assert search(probe, ["x " + " ".join(words[3 : 3 + length]) + " y"])["overlap"] == overlap


def test_a_run_does_not_go_on_in_the_next_document() -> None:
    words = long_text("q").split()
    assert search([Probe(long_text("q"), "yes")], [" ".join(words[:10]), " ".join(words[10:])])["overlap"] == 0.0


def test_short_items_need_all_their_words_and_very_short_ones_are_counted_as_such() -> None:
    probes = [Probe("the capital of France is", "Paris"), Probe("two words", "no"), Probe("你好世界吗", "是")]
    found = search(probes, ["It is said that the capital of France is lovely.", "两人说：你好，世界！吗？"])
    assert (found["items"], found["too_short"], found["overlap"]) == (3, 1, 1.0)
    assert search(probes, ["the capital of Spain is France"])["overlap"] == 0.0


def test_the_tasks_own_wording_counts_for_none() -> None:
    wording = "in this puzzle three friends swap their books again and again until the evening ends"
    probes = [Probe(f"{wording} {long_text(key, 6)}", "yes") for key in LETTERS[:8]]
    assert search(probes, [f"Once {wording} and so on."])["overlap"] == 0.0
    assert search(probes, [f"Once {wording} {long_text('b', 6)}."])["overlap"] == 0.125


def test_where_all_items_ask_the_same_the_choices_tell_them_apart() -> None:
    def choice(key: str, words: int = 6) -> str:
        return long_text(f"{key}x", words)

    asked = "Which sentence has the correct adjective order:"
    probes = [Probe(asked, choice(key), (choice(f"{key}{key}"), choice(key))) for key in LETTERS[:20]]
    assert search(probes, [asked, f"The {choice('a')}. The {choice('bb')}."])["overlap"] == 0.0
    answered = f"Question: {asked} -- {choice('a')}!"
    listed = f"{asked} {choice('bb')} / {choice('b')}"
    found = search(probes, [answered, listed])
    assert (found["overlap"], found["too_short"], found["overlap_with_answer"]) == (0.1, 0, 1)
    long = [Probe(asked, choice(key, 8), (choice(key, 8), choice(key + key, 8))) for key in LETTERS[:20]]
    assert search(long, [choice("a", 8)])["overlap"] == 0.05  # an answer of eight words alone
    assert search(long, [choice("a", 7)])["overlap"] == 0.0
    alike = [Probe(asked, "yes", ("yes", "no")) for _ in range(20)]
    assert search(alike, [f"{asked} yes no"])["too_short"] == 20  # nothing tells them apart


def test_one_item_alone_does_not_name_a_task() -> None:
    probes = [Probe(long_text(key), "yes") for key in LETTERS]
    assert search(probes, [long_text("a")])["contaminated"] is False
    assert search(probes, [long_text("a"), long_text("b")])["contaminated"] is True


@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=5, max_size=16), min_size=1, max_size=5),
    st.lists(st.lists(st.sampled_from("abcd"), max_size=40), min_size=1, max_size=4),
)
def test_as_a_naive_search(items: list[list[str]], texts: list[list[str]]) -> None:
    probes = [Probe(" ".join(words), "") for words in items]
    read = OverlapSearch({"task": probes})
    read.read(" ".join(words) for words in texts)
    runs = [set(ngrams(words, min(LONGEST_RUN, len(words)))) for words in items]
    for own, overlap in zip(runs, read.results()["task"].items, strict=True):
        told = [run for run in own if sum(run in other for other in runs) <= 2]
        naive = any(run in ngrams(words, len(run)) for run in told for words in texts)
        assert overlap == (naive if told else None)


def test_words() -> None:
    assert words_of("Don't STOP, 你好!") == ["don", "t", "stop", "你", "好"]
    assert list(ngrams(["a", "b", "c"], 2)) == [("a", "b"), ("b", "c")]
    assert list(ngrams(["a"], 2)) == []
