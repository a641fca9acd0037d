"""The built-in world: the same on every machine, kept apart from its tests, and honest about what is right."""

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import pytest

from rlhf.tinyworld.dialogues import (
    ANSWERS,
    Dialogue,
    dialogues,
    prompts,
    questions,
    respond,
    shuffled_prompts,
    split_of_prompt,
)
from rlhf.tinyworld.documents import documents, split_of
from rlhf.tinyworld.incontext import MAX_SHOTS, items, lines, recall_families, rule_families, task_names
from rlhf.tinyworld.oracle import best_response, gold_reward, prefers_first
from rlhf.tinyworld.words import Draw, Split, answers, facts, mistakes, statement, text_hash, words

# SHA-256 of what seed 0 makes. A change of Python must not move them. Whoever changes words.yaml, a sentence or a share
# on purpose renews them: run this file, and copy the digests that the failure shows as found.
DIGESTS = {
    "documents": "a6060f7c7ab18e49127062945d4e63a129dcc37e2148a56b1e05e4008c168bf4",
    "dialogues": "cb8acbe8d4d84a4b2ec67a93e5c01a49cd0319adb3055e50b1afe8d57a2e7e18",
    "prompts": "38e4df9995a8a92073ea8eaad7fb8146433343bc81e9f05c87f3058914e5eb60",
    "items": "40953956e6a78361169f9dd85c0248dbb26e4e4c6eb1b157143da4593eab1b91",
}

RULES = ("rules_numbers", "rules_words")
RECALL = ("recall_things", "recall_colours")
SHOTS = range(MAX_SHOTS + 1)


@pytest.fixture(scope="module")
def training() -> list[str]:
    return list(itertools.islice(documents("train", seed=0), 5000))


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()


def first_dialogues(split: Split, seed: int, n: int) -> list[Dialogue]:
    return list(itertools.islice(dialogues(split, seed), n))


def pairs_of(document: str) -> list[tuple[str, str]]:
    """The `input -> answer` lines below a task line."""
    return [(x, y) for x, _, y in (line.partition(" -> ") for line in document.split("\n")[1:])]


# The same for everyone


def test_the_same_seed_makes_the_same_bytes_on_every_machine() -> None:
    found = {
        "documents": digest(list(itertools.islice(documents("train", 0), 200))),
        "dialogues": digest(first_dialogues("train", 0, 200)),
        "prompts": digest(shuffled_prompts("test", 0)),
        "items": digest([items(task, shots, 20, 0) for task in task_names() for shots in (0, 1, 2, 8)]),
    }
    assert found == DIGESTS


def test_another_seed_makes_something_else() -> None:
    assert list(itertools.islice(documents("train", 1), 20)) != list(itertools.islice(documents("train", 2), 20))
    assert first_dialogues("train", 1, 20) != first_dialogues("train", 2, 20)
    assert shuffled_prompts("test", 1) != shuffled_prompts("test", 2)
    assert items("recall_things", 4, 20, 1) != items("recall_things", 4, 20, 2)


def test_a_longer_request_begins_with_the_shorter_one() -> None:
    assert items("rules_words", 2, 50, 3)[:20] == items("rules_words", 2, 20, 3)
    assert shuffled_prompts("train", 3, 50)[:20] == shuffled_prompts("train", 3, 20)


def test_text_hash_is_the_first_48_bits_of_sha256() -> None:
    assert text_hash("a", "b") == int(hashlib.sha256(b"a\0b").hexdigest()[:12], 16) / 16**12


def test_weighted_draws_follow_their_weights() -> None:
    draw = Draw("weights")
    counts = Counter(draw.weighted({"a": 3.0, "b": 1.0, "never": 0.0}) for _ in range(4000))
    assert counts["a"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert counts["never"] == 0


def test_a_sample_holds_no_item_twice_and_is_in_any_order() -> None:
    draw = Draw("sample")
    drawn = [tuple(draw.sample("abc", 2)) for _ in range(600)]
    counts = Counter(drawn)
    assert set(counts) == set(itertools.permutations("abc", 2))
    assert min(counts.values()) > 70  # 100 expected of each


def test_every_word_of_the_lists_is_text() -> None:
    def leaves(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield key
                yield from leaves(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from leaves(inner)
        else:
            yield value

    assert [word for word in leaves(words()) if not isinstance(word, str)] == []  # YAML reads `no` as a boolean


# Documents


def test_document_splits_share_no_text(training: list[str]) -> None:
    train = set(training)
    validation = set(itertools.islice(documents("validation", seed=0), 150))
    test = set(itertools.islice(documents("test", seed=0), 150))
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_a_documents_split_is_told_by_its_text_alone(training: list[str]) -> None:
    assert {split_of(text) for text in training[:300]} == {"train"}
    assert {split_of(text) for text in itertools.islice(documents("test", seed=9), 30)} == {"test"}


def test_recall_documents_give_every_key_one_value_and_ask_again(training: list[str]) -> None:
    found = [pairs_of(text) for text in training if text.startswith("Remember the pairs.")]
    assert len(found) > 1000
    for pairs in found:
        mapping = dict(pairs)
        assert all(mapping[key] == value for key, value in pairs)
        assert len(pairs) > len(mapping)
        assert len(set(mapping.values())) == len(mapping)


def test_rules_documents_show_one_rule_on_different_inputs(training: list[str]) -> None:
    found = [pairs_of(text) for text in training if text.startswith("Find the rule.")]
    assert len(found) > 500
    for pairs in found:
        fitting = [
            rule
            for family in rule_families()
            for rule in family.rules
            if all(x in family.inputs and rule(x) == y for x, y in pairs)
        ]
        assert len(fitting) == 1
        assert len({x for x, _ in pairs}) == len(pairs)
        assert 1 <= len(pairs) <= 12


def test_documents_name_the_task_translate_from_chinese_and_state_facts(training: list[str]) -> None:
    whole = "\n".join(training)
    assert "\n你好 -> hello" in whole
    assert "The capital of France is Paris." in whole
    assert "Verdict: good" in whole
    for title in words()["titles"].values():
        assert f"\n{title}\n" in whole


# Questions and what is kept for tests


def test_prompt_splits_share_no_question_and_make_the_whole() -> None:
    parts = [set(prompts(split)) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(questions())
    assert 0.1 < len(parts[2]) / len(questions()) < 0.2
    assert all(split_of_prompt(prompt) == "test" for prompt in parts[2])


def test_shuffled_prompts_are_different_questions_of_their_split() -> None:
    some = shuffled_prompts("test", 5, 30)
    assert len(set(some)) == 30
    assert set(some) < set(prompts("test"))
    assert sorted(shuffled_prompts("test", 5)) == sorted(shuffled_prompts("test", 5, 10**6)) == sorted(prompts("test"))


def test_dialogues_ask_questions_of_their_split_alone() -> None:
    for split in ("train", "validation", "test"):
        assert {dialogue.prompt for dialogue in first_dialogues(split, 0, 300)} <= set(prompts(split))


def test_no_held_out_question_is_part_of_a_training_document(training: list[str]) -> None:
    whole = "\n".join(training)
    assert any(prompt in whole for prompt in prompts("train"))
    assert [prompt for prompt in (*prompts("validation"), *prompts("test")) if prompt in whole] == []


@pytest.mark.parametrize("task", RULES + RECALL)
def test_no_test_prompt_is_part_of_a_training_document(task: str, training: list[str]) -> None:
    whole = "\0".join(training)
    for shots in SHOTS:
        for item in items(task, shots, 40, seed=7):
            prompt = f"{lines(item.instruction, list(item.demonstrations))}\n{item.input} ->"
            assert prompt not in whole, prompt


# Few-shot items


@pytest.mark.parametrize("task", RULES)
@pytest.mark.parametrize("shots", SHOTS)
def test_rules_items_never_demonstrate_the_query(task: str, shots: int) -> None:
    for item in items(task, shots, 60, seed=3):
        shown = [x for x, _ in item.demonstrations]
        assert len(shown) == len(set(shown)) == shots
        assert item.input not in shown
        assert len(set(item.choices)) == len(item.choices) == 5


@pytest.mark.parametrize("task", RULES)
def test_rules_items_ask_each_query_once_under_every_rule(task: str) -> None:
    asked = items(task, 4, 100, seed=3)
    assert Counter(item.answer for item in asked) == dict.fromkeys(range(5), 20)
    for first in range(0, 100, 5):
        block = asked[first : first + 5]
        assert len({item.input for item in block}) == 1
        assert {item.answer for item in block} == set(range(5))


@pytest.mark.parametrize("task", RULES)
def test_one_demonstration_tells_which_choice_of_a_rules_item_is_right(task: str) -> None:
    family = next(family for family in rule_families() if family.name == task)
    for item in items(task, 3, 100, seed=4):
        for x, y in item.demonstrations:
            fitting = [rule for rule in family.rules if rule(x) == y]
            assert [rule(item.input) for rule in fitting] == [item.choices[item.answer]]


@pytest.mark.parametrize("task", RECALL)
@pytest.mark.parametrize("shots", range(1, MAX_SHOTS + 1))
def test_recall_items_demonstrate_the_query_exactly_once_and_not_last(task: str, shots: int) -> None:
    for item in items(task, shots, 60, seed=3):
        shown = [x for x, _ in item.demonstrations]
        assert len(shown) == len(set(shown)) == shots
        assert shown.count(item.input) == 1
        assert shots == 1 or shown[-1] != item.input


@pytest.mark.parametrize("task", RECALL)
@pytest.mark.parametrize("shots", SHOTS)
def test_recall_items_offer_eight_values_and_the_demonstrated_one_is_right(task: str, shots: int) -> None:
    for item in items(task, shots, 60, seed=3):
        assert len(set(item.choices)) == len(item.choices) == 8
        mapping = dict(item.demonstrations)
        assert mapping.get(item.input, item.choices[item.answer]) == item.choices[item.answer]
        assert len(set(mapping.values())) == len(mapping)
        assert set(mapping.values()) <= set(item.choices)


@pytest.mark.parametrize("task", RECALL)
@pytest.mark.parametrize("shots", [0, 2])
def test_recall_items_ask_each_query_once_with_every_choice_as_its_answer(task: str, shots: int) -> None:
    asked = items(task, shots, 400, seed=5)
    for first in range(0, 400, 8):
        block = asked[first : first + 8]
        assert len({(item.input, item.choices) for item in block}) == 1
        assert {item.answer for item in block} == set(range(8))


@pytest.mark.parametrize("task", RULES + RECALL)
def test_the_same_queries_and_answers_come_at_every_number_of_demonstrations(task: str) -> None:
    asked = [[(item.input, item.choices, item.answer) for item in items(task, shots, 40, seed=6)] for shots in SHOTS]
    assert all(same == asked[0] for same in asked)


def test_items_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="0 to 8 demonstrations, not 9"):
        items("rules_words", 9, 1, 0)
    with pytest.raises(ValueError, match="not -1"):
        items("rules_words", -1, 1, 0)
    with pytest.raises(ValueError, match="no task named 'rules_verbs'; there are rules_numbers"):
        items("rules_verbs", 1, 1, 0)


def test_every_rule_gives_another_output_for_every_input() -> None:
    for family in rule_families():
        for x in family.inputs:
            assert len({rule(x) for rule in family.rules}) == len(family.rules)


def test_rules_by_hand() -> None:
    numbers, adjectives = rule_families()
    assert [rule("20") for rule in numbers.rules] == ["21", "19", "30", "200", "二十"]
    assert [numbers.rules[4](x) for x in ("2", "10", "11", "19", "29", "30")] == [
        "二",
        "十",
        "十一",
        "十九",
        "二十九",
        "三十",
    ]
    assert [rule("hot") for rule in adjectives.rules] == ["cold", "热", "hot hot", "very hot", "not hot"]


def test_recall_families_have_no_name_or_value_twice() -> None:
    for family in recall_families():
        assert len(set(family.inputs)) == len(family.inputs)
        assert len(set(family.values)) == len(family.values) >= 8


# Truth


HOT = "What is the opposite of hot?"
WORKED = [
    (HOT, "", 0.0),
    (HOT, "cold.", 0.75),  # right 0.60, brief 0.15
    (HOT, "The opposite of hot is cold.", 0.75),
    (HOT, "The opposite of hot is cold. I am glad to help.", 1.0),  # polite 0.25
    (HOT, "Thank you for asking. I am glad to help. cold.", 1.0),  # polite counts once
    (HOT, "The opposite of hot is small.", 0.0),
    (HOT, "The opposite of hot is small. Good question.", 0.25),
    (HOT, "small. Leave me alone.", -0.25),
    (HOT, "small. Leave me alone. What a silly question.", -0.25),  # rude counts once
    (HOT, "cold. Leave me alone.", 0.5),
    (HOT, "cold. Thank you for asking. Leave me alone.", 0.5),  # a rude word undoes the polite one
    (HOT, "cold or small.", 0.0),  # naming two answers is no answer
    (HOT, "cold cold.", 0.75),
    (HOT, "hot.", 0.0),  # what was asked about is no answer
    (HOT, "colder.", 0.0),
    (HOT, "cold" + " so" * 15 + ".", 0.75),  # 16 words are brief
    (HOT, "cold" + " so" * 23 + ".", 0.675),  # 24 words are half as brief
    (HOT, "cold" + " so" * 31 + ".", 0.60),  # 32 words are not
    (HOT, "cold" + " so" * 99 + ".", 0.60),
    (HOT, "so " * 99, 0.0),
    ("What is 3 plus 4?", "The sum of 3 plus 4 is 7.", 0.75),
    ("What is 3 plus 4?", "The sum of 3 plus 4 is 12.", 0.0),
    ("What is 3 plus 4?", "3 plus 4.", 0.0),
    ("What is 3 plus 4?", "7 or 8.", 0.0),
    ("What is 3 plus 4?", "17.", 0.0),
    ("Translate 茶 into English.", "The English word for 茶 is tea.", 0.75),
    ("Translate tea into Chinese.", "茶", 0.75),
    ("Translate tea into Chinese.", "The Chinese word for tea is 水.", 0.0),
    ("What colour is the sky?", "blue. Nice to meet you.", 1.0),
    ("What colour is the sky?", "green and blue.", 0.0),
]


@pytest.mark.parametrize(("prompt", "response", "gold"), WORKED)
def test_gold_reward_by_hand(prompt: str, response: str, gold: float) -> None:
    assert gold_reward(prompt, response) == pytest.approx(gold, abs=1e-12)


def test_the_best_response_to_every_question_has_gold_exactly_1_and_none_at_all_0() -> None:
    for prompt in questions():
        assert gold_reward(prompt, best_response(prompt)) == 1.0
        assert gold_reward(prompt, "") == 0.0


def test_no_response_beats_the_best_one() -> None:
    rewards = [gold_reward(*dialogue) for dialogue in first_dialogues("train", 0, 3000)]
    assert max(rewards) <= 1.0
    assert min(rewards) >= -0.25


def test_only_this_worlds_questions_have_a_gold_reward() -> None:
    with pytest.raises(KeyError):
        gold_reward("Who are you?", "cold.")


def test_manners_say_nothing_that_could_be_an_answer() -> None:
    every_answer = {fact.answer for fact in facts()}
    for sentences in words()["manners"].values():
        for sentence in sentences:
            assert not every_answer & set(sentence.lower().rstrip(".").split()), sentence


def test_dialogues_are_of_mixed_quality_with_room_to_improve() -> None:
    made = first_dialogues("train", 0, 2000)
    rewards = [gold_reward(*dialogue) for dialogue in made]
    right = [dialogue for dialogue in made if questions()[dialogue.prompt].answer in dialogue.response]
    assert 0.15 <= fmean(rewards) <= 0.6
    assert 0.4 < len(right) / len(made) < 0.75
    assert min(rewards) == -0.25
    assert max(rewards) == 1.0
    assert len({len(dialogue.response.split()) for dialogue in made}) > 10


def test_people_make_the_same_two_mistakes_about_a_fact_again_and_again() -> None:
    for fact in facts():
        assert len(set(mistakes(fact))) == 2
        assert fact.answer not in mistakes(fact)
        assert set(mistakes(fact)) < set(answers(fact.kind))


def test_responses_are_right_mistaken_or_off_topic_in_stated_shares() -> None:
    found: Counter[str] = Counter()
    for prompt, response in first_dialogues("train", 0, 4000):
        asked = questions()[prompt]
        if response.endswith(statement(asked)):
            found["right"] += 1
        elif any(response.endswith(statement(asked, mistake)) for mistake in mistakes(asked)):
            found["mistaken"] += 1
        else:
            assert any(response.endswith(statement(fact)) for fact in facts())
            found["off topic"] += 1
    assert {kind: n / 4000 for kind, n in found.items()} == pytest.approx(ANSWERS, abs=0.03)


def test_labellers_mostly_agree_with_gold_and_length_alone_says_little() -> None:
    draw = Draw("labeller")
    agree, longer_wins = [], []
    for prompt in prompts("train") * 2:
        first, second = (respond(questions()[prompt], draw) for _ in range(2))
        gain = gold_reward(prompt, first) - gold_reward(prompt, second)
        if abs(gain) < 1e-9:
            continue
        chosen = prefers_first(prompt, first, second, draw)
        longer = len(first.split()) - len(second.split())
        agree.append(chosen == (gain > 0))
        longer_wins.append(0.5 if longer == 0 else float(chosen == (longer > 0)))
    assert len(agree) > 1000
    assert 0.70 <= fmean(agree) <= 0.90
    assert fmean(longer_wins) <= 0.65


def test_labellers_like_the_longer_of_two_equally_good_responses_a_little_more() -> None:
    draw = Draw("labeller", "length")
    short, long = "cold.", "The opposite of hot is cold."
    preferred = fmean(prefers_first(HOT, long, short, draw) for _ in range(4000))
    # 5 words more at 0.02 each: 0.95 / (1 + e^-0.1) + 0.05 / 2 = 0.5237
    assert preferred == pytest.approx(0.5237, abs=0.024)


def test_labellers_are_not_swayed_by_which_response_comes_first() -> None:
    draw = Draw("labeller", "order")
    best = best_response(HOT)
    first = fmean(prefers_first(HOT, best, "small.", draw) for _ in range(2000))
    second = fmean(not prefers_first(HOT, "small.", best, draw) for _ in range(2000))
    assert first == pytest.approx(second, abs=0.03)
    assert first > 0.9


def test_one_labeller_draw_gives_the_same_labels_again() -> None:
    labels: dict[int, list[bool]] = defaultdict(list)
    for again in range(2):
        draw = Draw("labeller", "again")
        labels[again] = [prefers_first(HOT, "cold.", "small. Nice to meet you.", draw) for _ in range(50)]
    assert labels[0] == labels[1]
