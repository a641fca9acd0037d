"""Perplexity and few-shot accuracy against naive loops in float64, and against models whose answers are known."""

import copy
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from evaluation.answers import is_right, write_answers
from evaluation.fewshot import (
    Outcome,
    Reader,
    _right,
    answer_by_likelihood,
    chance_level,
    copy_baseline,
    encode_questions,
    summarise,
)
from evaluation.perplexity import DocumentScore, perplexity, rolling_windows, score_documents
from evaluation.scoring import Request, Scorer, length_batches, shared_beginning
from evaluation.suite import Answer, Measured, compare, compare_texts
from evaluation.tasks import FileTask, Question, TaskFormat, TinyworldTask, as_number, file_tasks, tinyworld_tasks
from rlhf.data.reader import Faults
from rlhf.errors import DataError, StageFailed, UserError
from rlhf.tinyworld.documents import documents
from tests.conftest import CONTEXT, SHARED_DATA, TINY_RECIPE, VOCAB_SIZE, rlhf

FEWSHOT = SHARED_DATA / "fewshot"
MALFORMED_TASK = SHARED_DATA / "malformed" / "fewshot_bad_answer.jsonl"


class Bigram:
    """A model by hand: the logits after a token are a row of a table. Remembers the shape of each pass."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.config = SimpleNamespace(pad_token_id=0, vocab_size=table.shape[1])
        self.config.get_text_config = lambda decoder=True: self.config
        self.device, self.base_model = torch.device("cpu"), self
        self.shapes: list[tuple[int, ...]] = []

    def get_output_embeddings(self) -> None:
        return None

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.table[input_ids])


def uniform(vocab_size: int = VOCAB_SIZE) -> Any:
    return Bigram(torch.zeros(vocab_size, vocab_size))


def plain(model: Any, **more: Any) -> Scorer:
    """A scorer that shares nothing."""
    return Scorer(model, share=False, **more)


def logprobs_of(scorer: Scorer, contexts: list[list[int]], continuations: list[list[int]], **more: Any) -> list[float]:
    requests = [Request(*pair) for pair in zip(contexts, continuations, strict=True)]
    return scorer.logprobs(requests, **more)


@torch.no_grad()
def naive_logprob(model: PreTrainedModel, context: list[int], token: int) -> float:
    """One forward pass in float64 for one token."""
    logits = model(input_ids=torch.tensor([context]), use_cache=False).logits[0, -1]
    return float(logits.log_softmax(-1)[token])


# Log-probabilities


@given(lengths=st.lists(st.integers(1, 50), max_size=40), budget=st.integers(1, 120))
def test_batches_hold_every_row_once_and_keep_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(length_batches(lengths, budget))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


def test_logprobs_by_hand() -> None:
    # after token 0 the probabilities are 1/2, 1/4, 1/4; after 1 they are 1/8, 1/8, 3/4; after 2 all are 1/3
    table = torch.tensor([[2.0, 1, 1], [1, 1, 6], [1, 1, 1]]).log()
    found = logprobs_of(
        plain(Bigram(table)),
        [[0], [0], [2, 2, 1], [0, 1]],
        [[1], [0, 1, 2], [2], [2, 0]],
    )
    expected = [math.log(p) for p in (1 / 4, 1 / 2 * 1 / 4 * 3 / 4, 3 / 4, 3 / 4 * 1 / 3)]
    assert found == pytest.approx(expected, rel=1e-6)


def test_all_one_token_continuations_of_a_context_share_one_row() -> None:
    model = uniform(10)
    answered: list[int] = []
    contexts, continuations = [[1, 2, 3]] * 8 + [[4]], [[i] for i in range(8)] + [[5]]
    found = logprobs_of(plain(model), contexts, continuations, progress=answered.append)
    assert model.shapes == [(2, 3)]
    assert found == pytest.approx([-math.log(10)] * 9)
    assert answered == [9]


def test_logprobs_equal_a_naive_loop(tiny_model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(7, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (2, 9, 30, 5, 64, 17, 9)]
    cuts = [1, 4, 29, 3, 60, 1, 8]
    double = copy.deepcopy(tiny_model).double()
    expected = [
        sum(naive_logprob(double, sequence[:i], sequence[i]) for i in range(cut, len(sequence)))
        for sequence, cut in zip(sequences, cuts, strict=True)
    ]
    contexts = [sequence[:cut] for sequence, cut in zip(sequences, cuts, strict=True)]
    continuations = [sequence[cut:] for sequence, cut in zip(sequences, cuts, strict=True)]
    for budget in (1, 70, 8192):
        for share in (False, True):
            scorer = Scorer(tiny_model, budget=budget, share=share)
            assert scorer.why_not_shared == (None if share else "not asked for")
            assert logprobs_of(scorer, contexts, continuations) == pytest.approx(expected, abs=1e-4)


def test_the_order_of_requests_changes_nothing(tiny_gpt2: PreTrainedModel) -> None:
    contexts = [[0, *range(20, 20 + n)] for n in range(1, 12)]
    continuations = [[50 + n, 60] for n in range(1, 12)]
    scorer = Scorer(tiny_gpt2, budget=40)
    forward = logprobs_of(scorer, contexts, continuations)
    backward = logprobs_of(scorer, contexts[::-1], continuations[::-1])
    assert backward[::-1] == pytest.approx(forward, abs=1e-5)


# Perplexity


def test_rolling_windows_of_the_docstring() -> None:
    begin, *letters = range(7)
    a, b, c, d, e, f = letters
    assert rolling_windows(letters, begin, 4) == [([begin, a, b, c], [a, b, c, d]), ([b, c, d, e], [e, f])]


@given(context=st.integers(1, 40), more=st.integers(0, 160))
def test_every_token_is_predicted_once_from_the_ones_right_before_it(context: int, more: int) -> None:
    tokens = list(range(context + more))
    windows = rolling_windows(tokens, -1, context)
    assert [target for window in windows for target in window.targets] == tokens
    for inputs, targets in windows:
        assert len(inputs) == context
        assert inputs == list(range(inputs[0], inputs[0] + len(inputs)))
        assert inputs[-1] == targets[-1] - 1


@given(context=st.integers(2, 20), stride=st.integers(1, 25), length=st.integers(1, 90))
def test_a_stride_leaves_each_token_so_much_to_see(context: int, stride: int, length: int) -> None:
    windows = rolling_windows(list(range(length)), -1, context, stride)
    assert [target for window in windows for target in window.targets] == list(range(length))
    for inputs, targets in windows[1:]:
        assert len(inputs) == context
        assert len(targets) <= min(stride, context)
        assert inputs[-1] == targets[-1] - 1


def naive_nats(model: PreTrainedModel, ids: list[int], begin: int, context: int) -> float:
    """Token by token: blocks of `context` tokens, each read from as far back as the block's last pass can reach."""
    sequence = [begin, *ids]
    nats = 0.0
    for i in range(len(ids)):
        block_end = min((i // context + 1) * context, len(ids))
        nats -= naive_logprob(model, sequence[max(0, block_end - context) : i + 1], ids[i])
    return nats


def test_scores_equal_a_naive_loop(tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["", "The opposite of hot is cold. " * 9, "你好 -> hello\n" * 6, *itertools.islice(documents("test", 1), 2)]
    double = copy.deepcopy(tiny_model).double()
    for context in (16, 23):
        found = score_documents(Scorer(tiny_model), tokenizer, texts, context=context)
        for text, score in zip(texts, found, strict=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert (score.tokens, score.bytes) == (len(ids), len(text.encode()))
            assert score.nats == pytest.approx(naive_nats(double, ids, tokenizer.bos_token_id, context), abs=1e-4)


def test_batching_changes_no_score(tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = list(itertools.islice(documents("test", seed=2), 20))
    together = score_documents(Scorer(tiny_model), tokenizer, texts, context=CONTEXT)
    for budget in (1, 200):
        alone = score_documents(Scorer(tiny_model, budget=budget), tokenizer, texts, context=CONTEXT)
        assert [score.nats for score in alone] == pytest.approx([score.nats for score in together], abs=1e-4)


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_bits_a_token(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    texts = ["你好 -> hello", "cold", ""]
    found = perplexity(score_documents(plain(uniform()), tokenizer, texts, context=5))
    tokens = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])
    assert found.perplexity == pytest.approx(VOCAB_SIZE, rel=1e-6)
    assert found.bits_per_byte.mean == pytest.approx(tokens * math.log2(VOCAB_SIZE) / (15 + 4), rel=1e-6)
    assert (found.tokens, found.documents) == (tokens, 3)


def test_text_like_a_special_token_is_scored_as_text(tokenizer: PreTrainedTokenizerBase) -> None:
    (score,) = score_documents(plain(uniform()), tokenizer, ["<|eos|>"], context=64)
    assert score.tokens > 1
    assert score.bytes == 7
    (score,) = score_documents(plain(uniform()), tokenizer, ["<|eos|>"], context=64, control=True)
    assert score.tokens == 1


def test_perplexity_by_hand() -> None:
    # 8 bits over 4 tokens and 8 bytes, and 4 bits over 4 tokens and 4 bytes: 12 bits, 8 tokens, 12 bytes
    ln2 = math.log(2)
    found = perplexity([DocumentScore(8 * ln2, 4, 8), DocumentScore(4 * ln2, 4, 4)])
    assert found.perplexity == pytest.approx(2**1.5)
    assert found.nats_per_token.mean == pytest.approx(1.5 * ln2)
    assert found.bits_per_byte == pytest.approx((1.0, 1.0, 1.0))
    # residuals 8 ln2 - 1.5 ln2 * 4 = 2 ln2 and -2 ln2; sqrt(2/1 * 8 ln2^2) / 8 = ln2 / 2
    assert found.nats_per_token.high - found.nats_per_token.mean == pytest.approx(1.959964 * ln2 / 2)
    assert (found.tokens, found.documents) == (8, 2)
    summary = perplexity([DocumentScore(8 * ln2, 4, 8, 2), DocumentScore(4 * ln2, 4, 4, 1)]).summary()
    assert summary["byte_perplexity"] == 2.0
    assert summary["word_perplexity"] == 16.0  # 12 bits over 3 words


def test_hopeless_documents_have_a_finite_perplexity_and_none_at_all_is_an_error() -> None:
    assert math.isfinite(perplexity([DocumentScore(1e6, 2, 2)]).perplexity)
    for nothing in ([], [DocumentScore(0.0, 0, 0)]):
        with pytest.raises(DataError, match="the held-out texts are all empty"):
            perplexity(nothing)
    with pytest.raises(StageFailed, match="are not numbers"):
        perplexity([DocumentScore(1.0, 2, 2), DocumentScore(math.nan, 2, 2)])


def test_a_model_whose_weights_are_broken_is_named(tiny_llama: PreTrainedModel) -> None:
    broken = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    scorer, requests = Scorer(broken), [Request([1, 2, 3], [4, 5]), Request([1, 2, 3], [6])]
    for read in (scorer.logprobs, scorer.matches):
        with pytest.raises(StageFailed, match="log-probabilities are not numbers: its weights are broken"):
            read(requests)


# What is shared

LOCAL = {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, **LOCAL},
    "mistral": {**SMALL, "num_key_value_heads": 2, "sliding_window": 4},
    "gemma2": {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 5.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # its positions are made from the mask
    "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},  # no keys and values
}


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=99, initializer_range=0.3, **KINDS[kind])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return model


def items_behind_demonstrations() -> list[Request]:
    """Choices that share beginnings, are equal, stand alone, and have one token, behind 40 tokens that all share."""
    shared = [7 + i % 50 for i in range(40)]
    queries: list[tuple[list[int], list[list[int]]]] = [
        ([60, 61, 62], [[5, 6, 7], [5, 6, 8], [9], [5]]),
        ([60], [[61, 62, 5], [61, 7]]),  # the choices are another query's beginning
        ([70, 71], [[8, 8, 8, 8]]),
        ([70, 71, 72, 73], [[3], [4], [3]]),
    ]
    return [Request([*shared, *query], choice) for query, choices in queries for choice in choices]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shared_changes_no_log_probability(kind: str) -> None:
    """In float64 (but where models make norms and softmax in float32), against one plain pass for each token."""
    model, requests = made(kind).double(), items_behind_demonstrations()
    expected = [sum(naive_logprob(model, [*c, *t[:i]], t[i]) for i in range(len(t))) for c, t in requests]
    for budget in (20, 8192):
        scorer = Scorer(model, budget=budget)
        assert (scorer.why_not_shared is None) == (kind not in ("bloom", "mamba"))
        assert scorer.logprobs(requests) == pytest.approx(expected, abs=1e-6)


def test_the_beginning_is_read_once_and_the_choices_of_an_item_in_one_row() -> None:
    model, shapes = made("llama"), []
    scorer = Scorer(model)
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    scorer.logprobs(items_behind_demonstrations())
    # 40 tokens for all; then four rows, of which the longest has 3 tokens of the query and (5, 6) and (5, 6)
    assert shapes == [(1, 40), (4, 7)]


def test_many_continuations_of_one_context_do_not_look_past_each_other() -> None:
    """Items that differ in their choices alone: one row's attention would grow with the square of their number."""
    model, shapes = made("llama"), []
    context = [7 + i % 50 for i in range(40)]
    requests = [Request(context, [i % 90, *range(i, i + 11)]) for i in range(60)]
    plain_scores = Scorer(model, share=False).logprobs(requests)
    scorer = Scorer(model)
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    assert scorer.logprobs(requests) == pytest.approx(plain_scores, abs=1e-4)
    assert shapes[0] == (1, 39)
    assert all(length <= 34 for _, length in shapes[1:]) and sum(rows for rows, _ in shapes[1:]) == 30


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=90), min_size=1, max_size=6))
def test_the_shared_beginning_is_that_of_all_and_leaves_each_a_token(contexts: list[list[int]]) -> None:
    found = shared_beginning([Request([1] * 30 + context, [0]) for context in contexts])
    wholes = [[1] * 30 + context for context in contexts]
    most = min(map(len, wholes)) - 1
    naive = next((i for i in range(most) if len({whole[i] for whole in wholes}) > 1), most)
    distinct = len(set(map(tuple, wholes)))
    assert found == (wholes[0][:naive] if distinct > 1 and naive * (distinct - 1) >= 64 else [])


# Few-shot accuracy


def questions_of_many_kinds() -> list[Question]:
    """One-token and multi-token choices, choices that begin with another one, text like special tokens."""
    asked = [question for task in tinyworld_tasks() for question in task.questions(1, 5, seed=2)]
    asked.append(Question("Input: x\nAnswer:", ("no", "not", "not at all", "<|end|>", "不"), 2, ()))
    asked.append(Question("a b c d e f", ("g", "h"), 1, ("g",)))
    return asked


def asked_of(scorer: Scorer, tokenizer: PreTrainedTokenizerBase, asked: list[Question], context: int = CONTEXT) -> Any:
    style = TaskFormat()
    found = answer_by_likelihood(Reader(scorer, tokenizer, context, [tokenizer.bos_token_id]), style, asked)
    assert len(found) == len(asked)
    return [outcome for outcome in found if outcome]


def share_right(outcomes: Any, metric: str = "acc") -> float:
    return sum(outcome.right[metric] for outcome in outcomes) / len(outcomes)


def test_accuracy_equals_a_naive_loop(tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    double = copy.deepcopy(tiny_model).double()
    asked = questions_of_many_kinds()
    right = 0
    for question in asked:
        scores = []
        for choice in question.choices:
            prompt, answer = (
                tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                for text in (question.prompt, f" {choice}")
            )
            ids = [tokenizer.bos_token_id, *prompt, *answer]
            scores.append(sum(naive_logprob(double, ids[:i], ids[i]) for i in range(len(prompt) + 1, len(ids))))
        right += scores.index(max(scores)) == question.answer
    assert 0 < right < len(asked)
    for budget in (1, 8192):
        found = asked_of(Scorer(tiny_model, budget=budget), tokenizer, asked)
        assert share_right(found) == right / len(asked)


def test_the_whole_choice_counts_and_not_its_first_token_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    space, z, q, x = tokenizer(" ZQX", add_special_tokens=False)["input_ids"]
    table = torch.zeros(VOCAB_SIZE, VOCAB_SIZE)
    table[z, q], table[z, x], table[q, q] = 8.0, 9.0, 9.0
    model: Any = Bigram(table)  # after Z, X is likelier than Q; but then Q goes on with Q, and X with anything
    for choices, answer in ((("ZX", "ZQ"), 0), (("ZXX", "ZQQ"), 1)):
        assert tokenizer(f" {choices[0]}", add_special_tokens=False)["input_ids"][:3] == [space, z, x]
        assert share_right(asked_of(plain(model), tokenizer, [Question("p", choices, answer, ())])) == 1.0


def test_chance_by_hand() -> None:
    asked = [Question("", ("a", "b"), 0, ()), Question("", ("a", "b", "c", "d"), 0, ())]
    assert chance_level(asked) == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_copy_baseline_by_hand() -> None:
    choices = ("a", "b", "c")
    asked = [
        Question("", choices, 0, ("a", "a", "b")),  # the commonest is right: 1
        Question("", choices, 1, ("a", "a", "b")),  # it is wrong: 0
        Question("", choices, 2, ("c", "b")),  # one of two equally common: 1/2
        Question("", choices, 0, ("x",)),  # it isn't even offered: 0
    ]
    assert copy_baseline(asked) == pytest.approx(1.5 / 4)
    assert copy_baseline([Question("", choices, 0, ())]) is None


def test_copying_says_nothing_about_recall_but_what_chance_does() -> None:
    asked = TinyworldTask("recall_things").questions(8, 50, seed=0)
    assert copy_baseline(asked) == pytest.approx(chance_level(asked)) == pytest.approx(1 / 8)


def test_items_that_do_not_fit_are_not_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    fits, too_long = Question("ab", ("Z", "Q"), 0, ()), Question("ab", ("Z", "QQQQQ"), 0, ())
    longest = len(tokenizer("ab Z", add_special_tokens=False)["input_ids"])  # with BOS, the last one is only predicted
    found = asked_of(plain(uniform()), tokenizer, [too_long, fits, too_long], longest)
    assert [outcome.question for outcome in found] == [fits]
    assert asked_of(plain(uniform()), tokenizer, [fits], longest - 1) == []


def test_the_length_of_a_choice_counts_by_character_and_by_byte() -> None:
    """Of equal log-probabilities a character the shorter one's is the least, and Chinese has three bytes a sign."""
    question = Question("", ("ab", "abcd", "水"), 1, ())
    assert _right(question, [-2.0, -3.0, -1.5]) == {"acc": False, "acc_norm": True, "acc_bytes": False}
    # by character -1, -0.75, -1.5; by byte -1, -0.75, -0.5


def test_without_begin_nothing_stands_before_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    question = Question("ab", ("Z",), 0, ())
    for begin in ([], [tokenizer.bos_token_id]):
        ((request,),) = [r for r in encode_questions(Reader(plain(uniform()), tokenizer, 9, begin), [question]) if r]
        assert request.context == [*begin, *tokenizer("ab", add_special_tokens=False)["input_ids"]]


def pieces(*words: str) -> PreTrainedTokenizerBase:
    """A tokenizer of characters in which these words are tokens too; `B` is its BOS, and not put before anything."""
    signs = sorted({*"abcdefghijklmnopqrstuvwxyz :B", *words})
    merges = [(word[:n], word[n]) for word in words for n in range(1, len(word))]
    vocabulary = {sign: number for number, sign in enumerate(dict.fromkeys([*signs, *(a + b for a, b in merges)]))}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, merges)), bos_token="B")


def test_white_space_that_ends_a_prompt_is_part_of_the_choice() -> None:
    """As in lm-evaluation-harness: ` very` is one token, whose first character the prompt has already."""
    tokenizer = pieces(" very")
    reader = Reader(plain(uniform(len(tokenizer))), tokenizer, 99, [])
    for prompt, delimiter in (("it is: ", ""), ("it is:", " "), ("it is: ", " ")):
        ((request,),) = [r for r in encode_questions(reader, [Question(prompt, ("very ok",), 0, ())], delimiter) if r]
        assert tokenizer.convert_ids_to_tokens(request.context) == list("it is:")
        spoken = tokenizer.convert_ids_to_tokens(request.continuation)
        assert spoken == ([" "] if len(prompt + delimiter) > 7 else []) + [" very", " ", "o", "k"]


def test_a_choice_is_what_has_no_place_in_the_prompts_own_ids() -> None:
    """As in lm-evaluation-harness, where a token spans the end of the prompt and the beginning of the choice."""
    tokenizer = pieces(": ")
    reader = Reader(plain(uniform(len(tokenizer))), tokenizer, 99, [])
    ((request,),) = [r for r in encode_questions(reader, [Question("it is:", ("ok",), 0, ())]) if r]
    assert tokenizer.convert_ids_to_tokens(request.context) == list("it is:")
    assert tokenizer.convert_ids_to_tokens(request.continuation) == ["o", "k"]


@pytest.mark.parametrize(("prompt", "choice"), [("", "ok"), (" ", "ok"), ("", "o"), ("ve", "ry")])
def test_where_nothing_stands_before_a_choice_bos_does(prompt: str, choice: str) -> None:
    """Else its first token, or one that it shares with the prompt, would not be predicted at all."""
    tokenizer = pieces("very")
    reader = Reader(plain(uniform(len(tokenizer))), tokenizer, 99, [])
    ((request,),) = [r for r in encode_questions(reader, [Question(prompt, (choice,), 0, ())], "") if r]
    assert tokenizer.convert_ids_to_tokens(request.context) == ["B"]
    assert "".join(tokenizer.convert_ids_to_tokens(request.continuation)) == prompt + choice
    assert answer_by_likelihood(reader, TaskFormat(delimiter=""), [Question(prompt, (choice, "x"), 0, ())])[0]


def test_figures_of_several_draws_by_hand() -> None:
    questions = [Question("", ("a", "b"), 0, ("a",), item=item) for item in range(4)]
    task = FileTask("mood", (), ())

    def outcomes(*right: bool) -> list[Outcome]:
        return [Outcome(q, {"acc": r, "acc_norm": True}) for q, r in zip(questions, right, strict=True)]

    found = summarise(task, [outcomes(True, True, True, False), outcomes(True, False, False, False)], too_long=1)
    assert found["accuracy"] == 0.5
    assert (found["draws"], found["spread"]) == ([0.75, 0.25], 0.25)
    assert (found["metric"], found["acc_norm"], found["chance"], found["copy_baseline"]) == ("acc", 1.0, 0.5, 1.0)
    assert (found["items"], found["too_long"], found["version"]) == (4, 1, 1)
    low, high = found["accuracy_bootstrap95"]
    assert 0.0 <= low < 0.5 < high <= 1.0
    other = summarise(FileTask("mood", (), (), TaskFormat(metric="acc_norm")), [outcomes(True, True, True, False)], 0)
    assert other["accuracy"] == 1.0
    assert "spread" not in other


# Free answers


@pytest.mark.parametrize(
    ("written", "target", "style", "right"),
    [
        (" Paul ", "Paul", {}, True),
        (" paul", "Paul", {}, False),
        (" the Paul!", "paul", {"normalise": ["case", "articles", "punctuation", "spaces"]}, True),
        (" It is $1,234.50.", "1234.5", {"extract": "last_number"}, True),
        (" 3 + 4 = 7", "7", {"extract": "last_number"}, True),
        (" 3 + 4 = 7", "7", {"extract": "number"}, False),
        (" -5", "5", {"extract": "number"}, False),
        (" none", "5", {"extract": "number"}, False),
        (" seven\nor so", "seven", {"extract": "first_line"}, True),
        (" x = -5", "-5", {"extract": "last_number"}, True),
        (" (−5)", "-5", {"extract": "last_number"}, True),
        (" about 3-5", "5", {"extract": "last_number"}, True),  # a hyphen and no sign
        (" 10 - 5", "5", {"extract": "last_number"}, True),
        (" from 16–18 to 5%-7", "7", {"extract": "last_number"}, True),
        (" a ten-5", "5", {"extract": "number"}, True),
        (" 3,4", "4", {"extract": "last_number"}, True),  # two numbers
        (" 34", "3,4", {"extract": "last_number"}, False),
        (" $.5 or $-1,000,000", "-1000000", {"extract": "last_number"}, True),
        (" 18kg", "18.00", {"extract": "number"}, True),
        (" 1e5", "100000", {"extract": "last_number"}, True),
        (" 1e99999999999999999999", "99999999999999999999", {"extract": "last_number"}, True),
    ],
)
def test_a_free_answer_is_right_after_the_stated_normalisation(
    written: str, target: str, style: dict[str, Any], right: bool
) -> None:
    assert is_right(written, target, TaskFormat(**style)) == right


@pytest.mark.parametrize(
    ("text", "value"),
    [("-12", -12), (" 1,234.50 ", 1234.5), ("$18", 18), ("−3", -3), (".5", 0.5), ("1e3", 1000)]
    + [(text, None) for text in ("", "3,4", "1 2", "5%", "1/2", "12 apples", "nan", "inf", "1_000", "--5", "3-5")],
)
def test_what_a_number_is(text: str, value: float | None) -> None:
    found = as_number(text)
    assert (None if found is None else float(found)) == value


def test_free_answers_are_the_likeliest_tokens(tiny_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("The opposite of", "x", "你好 ->")]
    found = write_answers(tiny_model, tokenizer, prompts, TaskFormat(max_tokens=6, stop=()))
    for prompt, answer in zip(prompts, found, strict=True):
        with torch.no_grad():
            expected = tiny_model.generate(
                torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.eos_token_id
            )[0, len(prompt) :]
        assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)


# Tasks


def test_a_tinyworld_question_in_full() -> None:
    (question,) = TinyworldTask("rules_words").questions(2, 1, seed=0)
    task_line, *demonstrations, query = question.prompt.split("\n")
    assert task_line == "Find the rule."
    assert [line.partition(" -> ")[2] for line in demonstrations] == list(question.demonstrated)
    assert query.endswith(" ->")
    assert len(question.choices) == 5


def test_tinyworld_tasks_are_of_two_families_and_have_at_most_8_demonstrations() -> None:
    assert [task.name.split("_")[0] for task in tinyworld_tasks()] == ["rules", "rules", "recall", "recall"]
    assert all(len(task.questions(8, 3, 0)) == 3 for task in tinyworld_tasks())
    with pytest.raises(UserError, match="rules_words has at most 8 demonstrations, 9 were asked for"):
        TinyworldTask("rules_words").questions(9, 1, 0)


ROW: dict[str, Any] = {"instruction": "Good or bad?", "input": "fine", "choices": ["good", "bad"], "answer": 0}


def write_rows(path: Path, *rows: dict[str, Any] | str) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path / "mood.train.jsonl", *({**ROW, "input": f"demo {i}", "answer": i % 2} for i in range(6)))
    write_rows(tmp_path / "mood.test.jsonl", *({**ROW, "input": f"item {i}"} for i in range(4)))
    return tmp_path


def test_the_text_of_a_file_question(folder: Path) -> None:
    (task,) = file_tasks(folder, Faults())
    assert (task.name, task.most_shots, task.free) == ("mood", 6, False)
    first, *_ = task.questions(0, 10, seed=0)
    empty = tuple(f"Good or bad?\n\nInput: {word}\nOutput:" for word in ("N/A", "[MASK]", ""))
    assert first == Question("Good or bad?\n\nInput: item 0\nOutput:", ("good", "bad"), 0, (), empty=empty)
    question = task.questions(2, 10, seed=0)[2]
    assert question.demonstrated == ("good", "bad")
    assert question.prompt == (
        "Good or bad?\n\nInput: demo 0\nOutput: good\n\nInput: demo 1\nOutput: bad\n\nInput: item 2\nOutput:"
    )


def test_a_format_of_its_own(folder: Path) -> None:
    (folder / "mood.yaml").write_text(
        'version: 2\nmetric: acc_norm\ninstruction: "# {instruction}\\n"\n'
        'demonstration: "{input} is {answer}\\n"\nitem: "{input} is"\n'
    )
    (task,) = file_tasks(folder, Faults())
    assert task.questions(1, 1, 0)[0].prompt == "# Good or bad?\ndemo 0 is good\nitem 0 is"
    assert (task.format.version, task.format.metric) == (2, "acc_norm")


def test_braces_in_a_row_are_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "mood.test.jsonl", {**ROW, "input": "{answer} {0} {input.__class__}"})
    (task,) = file_tasks(tmp_path, Faults())
    assert "Input: {answer} {0} {input.__class__}\n" in task.questions(0, 1, 0)[0].prompt


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("metrik: acc", "metrik: unknown key (known: version,"),
        ("metric: best", "metric: Input should be 'acc'"),
        ("- a list", "must be keys with values"),
        ("a: [1", "not valid YAML: "),
        ("version: 1\nversion: 2", "not valid YAML: "),
        ('item: "{question}"', "line 1: no text `question`, which the task's format asks for"),
        ('demonstration: "{input}"', "`demonstration` shows no answer: write {answer} where it stands"),
        ("metric: exact_match", "exact_match needs free answers"),
        ('item: "{input} is {answer}, is"', "`item` shows {answer}, which gives the answer away"),
        ('instruction: "It is {answer}. "', "`instruction` shows {answer}, which gives the answer away"),
        ('stop: [""]', "stop.0: String should have at least 1 character"),
        ("version: .nan", "version"),
    ],
)
def test_a_malformed_format_is_named(folder: Path, text: str, fault: str) -> None:
    (folder / "mood.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        file_tasks(folder, Faults())
    assert fault in str(caught.value)
    assert str(folder / "mood") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("moot.yaml", r"moot\.yaml: there is no moot\.test\.jsonl beside it"),
        ("mood.yml", r"mood\.yml: a task's format is a file \.yaml; rename it"),
        ("moot.test.json", r"moot\.test\.json: a task's rows are a file \.jsonl"),
        ("mood.train.json", r"mood\.train\.json: a task's rows are a file \.jsonl"),
        ("mood.test.jsonl.gz", r"mood: both \.test\.jsonl and \.test\.jsonl\.gz"),
        ("mood.train.jsonl.gz", r"mood: both \.train\.jsonl and \.train\.jsonl\.gz"),
        (".test.jsonl", r"\.test\.jsonl has no task's name before \.test\.jsonl"),
    ],
)
def test_a_file_that_would_be_passed_over_is_an_error(folder: Path, name: str, fault: str) -> None:
    (folder / name).write_text("version: 1")
    with pytest.raises(DataError, match=fault):
        file_tasks(folder, Faults())


def test_a_tasks_name_may_have_points_and_be_its_folders(folder: Path) -> None:
    for name in ("a.b", "a.test.b", folder.name):
        write_rows(folder / f"{name}.test.jsonl", ROW)
    assert {task.name for task in file_tasks(folder, Faults())} == {"mood", "a.b", "a.test.b", folder.name}
    assert [task.name for task in file_tasks(folder, Faults(), folder.name)] == [folder.name]


def test_fields_with_the_free_answer_stand_in_demonstrations_alone(folder: Path) -> None:
    """In a task with choices, `target` and `solution` are fields as others are."""
    write_rows(folder / "sums.test.jsonl", {"input": "1 + 1", "target": "2", "solution": "1 and 1 are 2"})
    (folder / "sums.yaml").write_text('item: "{input}: {solution}"')
    with pytest.raises(DataError, match=r"sums\.yaml: `item` shows \{solution\}, which gives the answer away"):
        file_tasks(folder, Faults())
    (folder / "sums.yaml").write_text('demonstration: "{input}: {solution}, {target}\\n"')
    (folder / "mood.yaml").write_text('item: "{input}, of {target}:"')
    for part in ("test", "train"):
        write_rows(folder / f"mood.{part}.jsonl", {**ROW, "target": "the food"})
    mood, _ = file_tasks(folder, Faults())
    assert mood.questions(0, 1, 0)[0].prompt.endswith("fine, of the food:")
    (folder / "mood.yaml").write_text('demonstration: "{input} {target}"')
    with pytest.raises(DataError, match="`demonstration` shows no answer"):
        file_tasks(folder, Faults())


def test_a_target_without_the_number_that_counts_is_a_fault(folder: Path) -> None:
    path = write_rows(folder / "sums.test.jsonl", {"input": "1 + 1", "target": "2"}, {"input": "2", "target": "two"})
    (folder / "sums.yaml").write_text("extract: number")
    with pytest.raises(DataError) as caught:
        file_tasks(folder, Faults())
    assert str(caught.value).startswith(f"{path}, line 2: `target` has no number, and the task's format extracts numb")


def test_an_item_without_instruction_begins_with_its_input(tmp_path: Path) -> None:
    write_rows(tmp_path / "bare.test.jsonl", {key: value for key, value in ROW.items() if key != "instruction"})
    (task,) = file_tasks(tmp_path, Faults())
    assert task.questions(0, 1, 0)[0].prompt == "Input: fine\nOutput:"


def test_the_items_of_a_draw_share_its_demonstrations_and_draws_differ(folder: Path) -> None:
    (task,) = file_tasks(folder, Faults())
    orders = []
    for draw in range(4):
        asked = task.questions(6, 4, seed=0, draw=draw)
        found = {tuple(line for line in question.prompt.split("\n") if "demo" in line) for question in asked}
        assert len(found) == 1
        orders.append(found.pop())
        assert len(set(orders[-1])) == 6
        assert [question.prompt.split("\n")[-2] for question in asked] == [f"Input: item {i}" for i in range(4)]
        assert [question.item for question in asked] == [0, 1, 2, 3]
        assert asked == task.questions(6, 4, seed=0, draw=draw)
    assert orders[0] == tuple(f"Input: demo {i}" for i in range(6))
    assert len(set(orders)) == 4
    assert (task.draws(0, 5), task.draws(2, 5)) == (1, 5)


def test_more_demonstrations_than_a_file_has_are_refused(folder: Path) -> None:
    (task,) = file_tasks(folder, Faults())
    with pytest.raises(UserError, match="mood has at most 6 demonstrations, 7 were asked for"):
        task.questions(7, 1, 0)
    assert len(task.questions(6, 100, 0)) == 4


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"input": None}, "`input` must be text"),
        ({"choices": []}, "`choices` must be a list of at least one text"),
        ({"choices": "good"}, "`choices` must be a list of at least one text"),
        ({"choices": ["good", 7]}, "`choices` must be a list of at least one text"),
        ({"choices": ["good", "good"]}, "two `choices` are equal"),
        ({"answer": 2}, "`answer` is 2, but the choices are 0 to 1"),
        ({"answer": -1}, "`answer` is -1, but the choices are 0 to 1"),
        ({"answer": "0"}, "`answer` must be the index of a choice"),
        ({"answer": True}, "`answer` must be the index of a choice"),
        ({"answer": 0.0}, "`answer` must be the index of a choice"),
        ({"answer": None}, "`answer` must be the index of a choice"),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_malformed_task_row_is_named_or_counted(folder: Path, change: Any, fault: str, part: str) -> None:
    path = write_rows(folder / f"mood.{part}.jsonl", ROW, ROW | change, ROW)
    with pytest.raises(DataError) as caught:
        file_tasks(folder, Faults("error"))
    assert str(caught.value).startswith(f"{path}, line 2: {fault}")
    faults = Faults("skip")
    (task,) = file_tasks(folder, faults)
    assert faults.counts == {str(path): 1}
    if part == "test":
        assert len(task.questions(0, 10, 0)) == 2


def test_a_task_of_free_answers(folder: Path) -> None:
    write_rows(folder / "sums.test.jsonl", {"input": "1 + 1", "target": "2"}, {"input": "3 + 4", "target": "7"})
    write_rows(folder / "sums.train.jsonl", {"input": "1 + 2", "target": "3"})
    mood, sums = file_tasks(folder, Faults())
    assert (mood.name, sums.name, sums.free) == ("mood", "sums", True)
    assert sums.format.extract == "last_number"
    assert sums.questions(1, 1, 0)[0] == Question(
        "Input: 1 + 2\nOutput: 3\n\nInput: 1 + 1\nOutput:", (), -1, ("3",), "2"
    )
    assert [task.name for task in file_tasks(folder, Faults(), "sums")] == ["sums"]
    with pytest.raises(DataError, match=r"no file .*moods\.test\.jsonl"):
        file_tasks(folder, Faults(), "moods")
    write_rows(folder / "sums.test.jsonl", {"input": "1 + 1", "target": " "})
    with pytest.raises(DataError, match=r"line 1: `target` must be text, and not empty"):
        file_tasks(folder, Faults())


def test_a_folder_without_tasks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file \*\.test\.jsonl"):
        file_tasks(tmp_path, Faults())


@pytest.mark.skipif(not FEWSHOT.exists(), reason=f"no {FEWSHOT}")
def test_the_shared_tasks_load() -> None:
    found = file_tasks(FEWSHOT, Faults("error"))
    assert {task.name for task in found} == {path.name.split(".")[0] for path in FEWSHOT.glob("*.test.jsonl")}
    free = {"arithmetic_2digit_add", "arithmetic_2digit_sub", "gsm8k", "lambada"}
    assert {task.name for task in found if task.free} == free
    assert {task.name for task in found if task.format.extract == "last_number"} == free - {"lambada"}
    for task in found:
        rows = [json.loads(line) for line in (FEWSHOT / f"{task.name}.test.jsonl").read_text("utf-8").split("\n")[:9]]
        for shots in (0, 5):
            asked = task.questions(shots, 9, seed=0)
            assert [(list(q.choices), q.target) for q in asked] == [
                (row.get("choices", []), row.get("target", "")) for row in rows
            ]
            assert all(len(question.demonstrated) == shots for question in asked)


@pytest.mark.skipif(not MALFORMED_TASK.exists(), reason=f"no {MALFORMED_TASK}")
def test_the_shared_malformed_task_keeps_its_two_good_rows(tmp_path: Path) -> None:
    path = tmp_path / "bad.test.jsonl"
    path.write_bytes(MALFORMED_TASK.read_bytes())
    faults = Faults("skip")
    (task,) = file_tasks(tmp_path, faults)
    assert len(task.questions(0, 100, 0)) == 2
    assert faults.counts == {str(path): 9}
    with pytest.raises(DataError, match=r"bad\.test\.jsonl, line 2: "):
        file_tasks(tmp_path, Faults("error"))


# The suite


def test_two_processes_give_the_numbers_of_one(finished_chain: Path, tmp_path: Path, folder: Path) -> None:
    write_rows(folder / "sums.test.jsonl", *({"input": f"1 + {i}", "target": f"{1 + i}"} for i in range(5)))
    write_rows(folder / "sums.train.jsonl", {"input": "1 + 2", "target": "3"}, {"input": "1 + 3", "target": "4"})
    write_rows(folder / "more.jsonl", {"text": "The opposite of hot is cold."}, {"text": "你好 -> hello"})
    found = []
    for processes in ("1", "2"):
        home = tmp_path / processes
        shutil.copytree(finished_chain / "runs/tiny", home / "runs/tiny", ignore=shutil.ignore_patterns("evaluate"))
        rlhf(
            *("run", "evaluate", "--recipe", str(TINY_RECIPE), "--processes", processes, f"data.root={folder}"),
            f"evaluate.fewshot.tasks=[tinyworld, {folder}]",
            "evaluate.fewshot.shots=[0, 2, 3]",
            "evaluate.fewshot.draws=2",
            "evaluate.texts=[{builtin: tinyworld, rows: 9}, {path: more.jsonl}]",
            "evaluate.stride=32",
            cwd=home,
        )
        found.append(json.loads((home / "runs/tiny/evaluate/summary.json").read_text()))
    one, two = (each["models"]["sft"] for each in found)
    assert one["fewshot"] == two["fewshot"]
    assert found[0]["differences"] == found[1]["differences"]
    assert one["nats_per_token"] == pytest.approx(two["nats_per_token"], abs=2e-6)
    assert set(one["by_source"]) == {"builtin:tinyworld", "more.jsonl"}
    assert one["stride"] == 32
    assert one["fewshot"]["sums"]["3"] == {"not_available": "the task has 2 demonstrations, fewer than 3"}
    assert len(one["fewshot"]["mood"]["2"]["draws"]) == 2
    assert one["fewshot"]["sums"]["0"]["metric"] == "exact_match"


def test_choices_over_their_probability_where_nothing_is_asked(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Zhao et al. 2021, step by step: each choice's share with each of three empty inputs, their mean, the quotient."""
    (task,) = file_tasks(folder, Faults())
    reader = Reader(Scorer(tiny_llama), tokenizer, CONTEXT * 4, [1], calibrate=True)
    questions = task.questions(2, 4, seed=0)

    def probabilities(prompt: str) -> list[float]:
        found = []
        for choice in ("good", "bad"):
            whole = [1, *tokenizer(f"{prompt} {choice}", add_special_tokens=False).input_ids]
            cut = 1 + len(tokenizer(prompt, add_special_tokens=False).input_ids)
            found.append(
                math.exp(sum(naive_logprob(tiny_llama, whole[:at], whole[at]) for at in range(cut, len(whole))))
            )
        return found

    for question, outcome in zip(questions, answer_by_likelihood(reader, task.format, questions), strict=True):
        beginning = question.prompt.removesuffix(f"item {question.item}\nOutput:")
        empty = [probabilities(f"{beginning}{word}\nOutput:") for word in ("N/A", "[MASK]", "")]
        prior = [sum(p[choice] / sum(p) for p in empty) / 3 for choice in (0, 1)]
        good, bad = (p / q for p, q in zip(probabilities(question.prompt), prior, strict=True))
        assert outcome and outcome.right["acc_calibrated"] == ((0 if good > bad else 1) == question.answer)
        assert abs(good / bad - 1) > 1e-4  # no near tie, which would prove nothing
    plain_reader = reader._replace(calibrate=False)
    asked = answer_by_likelihood(plain_reader, TaskFormat(metric="acc_calibrated"), questions)
    assert all(outcome and "acc_calibrated" in outcome.right for outcome in asked)
    assert all(
        o and "acc_calibrated" not in o.right for o in answer_by_likelihood(plain_reader, task.format, questions)
    )


def test_models_are_compared_item_by_item() -> None:
    def answers(*right: bool) -> list[Answer]:
        return [Answer("mood", 0, 0, item, {"acc": r}, (), "") for item, r in enumerate(right)]

    better, worse = answers(*[True] * 30, *[False] * 10), answers(*[True] * 20, *[False] * 20)
    found = compare(better, worse, {"mood": "acc"})["mood"]["0"]
    assert found["difference"] == 0.25
    low, high = found["difference_ci95"]
    assert 0.1 <= low < 0.25 < high <= 0.4  # the standard error of 10 in 40 is 0.068
    assert found["items"] == 40
    assert compare(better, better, {"mood": "acc"})["mood"]["0"]["difference_ci95"] == [0.0, 0.0]


def test_models_are_compared_document_by_document() -> None:
    def read(*nats: float) -> Measured:
        return Measured({}, [], {"a": [DocumentScore(nat * math.log(2), 9, 4) for nat in nats]})

    found = compare_texts(read(5, 105, 9), read(1, 101, 5))
    assert (found["bits_per_byte"], found["bits_per_byte_ci95"]) == (
        1.0,
        [1.0, 1.0],
    )  # 4 bits more on 4 bytes, each time
    assert found["documents"] == 3
    assert compare_texts(read(), read()) == {}


def test_any_directory_is_measured_without_a_recipe(finished_chain: Path, tmp_path: Path, folder: Path) -> None:
    model = finished_chain / "runs/tiny/sft/model"
    options = ("--tasks", f"{folder}/mood", "--shots", "0,3", "--output", "found.json", "--details", "answers.jsonl")
    said = rlhf("evaluate", str(model), *options, cwd=tmp_path)
    assert "few-shot accuracy by number of demonstrations" in said and "the first" not in said
    found = json.loads((tmp_path / "found.json").read_text())["models"][str(model)]
    assert list(found) == ["fewshot"]
    assert {shots: figures["items"] for shots, figures in found["fewshot"]["mood"].items()} == {"0": 4, "3": 4}
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert {"model", "task", "shots", "item", "right", "logprobs"} <= lines[0].keys()
    write_rows(folder / "texts.jsonl", {"text": "cold"})
    rlhf("evaluate", str(model), "--texts", f"{folder}/texts.jsonl", "--output", "found.json", cwd=tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())["models"][str(model)]
    assert (found["documents"], found["fewshot"]) == (1, {})
    write_rows(folder / "long.test.jsonl", ROW, {**ROW, "input": "word " * 400})
    few = "evaluate.fewshot.items=3"
    said = rlhf("evaluate", str(model), "--tasks", f"{folder}", "--shots", "0,7", few, cwd=tmp_path)
    assert "the first 3 items (evaluate.fewshot.items) of mood (4)\n" in said
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines()]
    rows = {row[0]: row[2:] for row in cells if len(row) == 4 and row[0]}
    assert rows["long"][0].endswith("*") and rows["mood"] == [rows["mood"][0], "n/a"]
    assert "n/a at 7, the task has 6 demonstrations, fewer than 7: mood." in said
    assert "and don't count: 1 of long at 0." in said
    refused = rlhf("evaluate", str(model), "--tasks", f"{folder}/mod", cwd=tmp_path, code=2)
    assert f"no folder {folder}/mod, and no file {folder}/mod.test.jsonl" in refused
