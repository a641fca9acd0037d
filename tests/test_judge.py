"""Judges against a model that reads one row at a time, and against arithmetic by hand."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLNetConfig,
)

from rlhf.errors import RecipeError, StageFailed, UserError
from rlhf.functional.scores import log_odds, score_of_heads
from rlhf.judge import (
    ClassifierJudge,
    Conversation,
    FunctionJudge,
    Part,
    RewardModelJudge,
    Scores,
    WeightedSum,
    head_scores,
    score_means,
)
from rlhf.judge.batches import Row, batched_logits
from rlhf.judge.classifier import longest_input
from rlhf.judge.texts import read_as_pair, read_through_template, shortened
from rlhf.model import Critic, load_scorer, save_model
from rlhf.recipe import JudgeSection, Recipe, load_recipe
from rlhf.rundir import RunDir
from rlhf.tinyworld.documents import documents
from rlhf.tokenizer import encode_chat, prepare_for_chat, token_info, train_bpe
from stages.common import Start, starting_model
from stages.judges import build_critic, build_judge
from tests.conftest import TINY_RECIPE, rlhf

WORDS = 60
SIZE: dict[str, Any] = {"vocab_size": WORDS, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PLACES: dict[str, Any] = {"hidden_size": 16, "max_position_embeddings": 48}
GPT2_SIZE: dict[str, Any] = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZE, **PLACES, pad_token_id=0),
    "llama without pad": LlamaConfig(**SIZE, **PLACES),
    "llama that pads with its end": LlamaConfig(**SIZE, **PLACES, pad_token_id=3, eos_token_id=3),
    "gpt2": GPT2Config(**GPT2_SIZE, pad_token_id=0, eos_token_id=3, bos_token_id=2),
    "gpt2 without pad": GPT2Config(**GPT2_SIZE, eos_token_id=3, bos_token_id=2),
    "bert": BertConfig(**SIZE, **PLACES, pad_token_id=0),
    "roberta": RobertaConfig(**SIZE, **PLACES, pad_token_id=1),
    "deberta": DebertaV2Config(
        **SIZE, **PLACES, pad_token_id=0, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8
    ),
    "xlnet": XLNetConfig(vocab_size=WORDS, d_model=16, n_layer=2, n_head=2, d_inner=24, pad_token_id=1),
}


def classifier(kind: str, outputs: int = 1, **more: Any) -> PreTrainedModel:
    """A random sequence classifier with opinions."""
    config = CONFIGS[kind].__class__.from_dict({**CONFIGS[kind].to_dict(), "num_labels": outputs, **more})
    torch.manual_seed(outputs)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


def word_pieces(chat_template: str | None = None, **more: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, w0 to w49, that joins a pair as BERT's does."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[END]", "[UNK]", "user", "assistant", "system", ":", "["]
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(50))])}, "[UNK]")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[END]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **more,
    )
    found.chat_template = chat_template
    return found


TURNS = "{% for m in messages %}{{ '[CLS]' + m['role'] + ':' + m['content'] + '[SEP]' }}{% endfor %}"


def alone(model: PreTrainedModel, ids: list[int], segments: list[int] | None = None) -> list[float]:
    """The outputs for one row as anybody would ask for them."""
    more = {} if segments is None else {"token_type_ids": torch.tensor([segments])}
    with torch.inference_mode():
        found: list[float] = model(torch.tensor([ids]), **more).logits[0].double().tolist()
    return found


def rows(seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[int(i) for i in rng.integers(5, WORDS, n)] + [3] for n in (1, 7, 30, 2, 7, 12, 19, 1)]


def conversations(texts: list[tuple[str, str]]) -> list[Conversation]:
    return [Conversation([{"role": "user", "content": prompt}], response, []) for prompt, response in texts]


TEXTS = [("w1 w2 w3", "w4"), ("w5", "w6 w7 w8 w9 w10 w11 w12"), ("w1", "w1"), ("w30 w31 w32 w33 w34", "w35 w36")]


# Arithmetic


def test_an_ensembles_score_is_its_mean_less_its_spread() -> None:
    found = score_of_heads(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([0.0, 1.0]), 0.5)
    assert found.spread.tolist() == [0.5, 0.5]  # heads say 1 and 2, and 2 and 1
    assert found.scores.tolist() == [1.25, 1.25]
    assert score_of_heads(torch.tensor([[2.5]]), torch.tensor([0.25]), 0.0).scores.tolist() == [2.25]


def test_log_odds_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(2), math.log(3)]], dtype=torch.float64)  # 1/6, 2/6, 3/6
    found = [float(log_odds(logits, label)) for label in range(3)]
    assert found == pytest.approx([math.log(1 / 5), math.log(1 / 2), 0.0], abs=1e-12)


# Padding


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "xlnet"])
def test_a_batch_says_what_each_row_says_alone(kind: str) -> None:
    model = classifier(kind, 3)
    expected = [alone(model, ids) for ids in rows()]
    found = batched_logits(model, [Row(ids) for ids in rows()])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.std(expected) > 0.3
    assert batched_logits(model, [Row(ids) for ids in rows()], budget=40) == pytest.approx(np.array(found), abs=1e-5)
    assert model.config.pad_token_id == CONFIGS[kind].pad_token_id  # what was lent is taken back


def test_a_pair_in_a_batch_says_what_it_says_alone() -> None:
    model = classifier("bert")
    pairs = [Row(ids, [0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2)) for ids in rows()]
    expected = [alone(model, pair.ids, pair.segments) for pair in pairs]
    np.testing.assert_allclose(batched_logits(model, pairs), expected, atol=1e-5)
    assert np.abs(np.subtract(expected, [alone(model, pair.ids) for pair in pairs])).max() > 0.1


def test_a_model_that_padding_disturbs_reads_one_conversation_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = classifier("xlnet"), word_pieces()
    found = ClassifierJudge("ppo.judge odd", model, tokenizer).scores(conversations(TEXTS)).values
    expected = [alone(model, *read_as_pair(tokenizer, c.prompt, c.response).row)[0] for c in conversations(TEXTS)]
    assert found == pytest.approx(expected, abs=1e-6)
    assert "odd: padding changes its scores, so it reads one conversation at a time" in capsys.readouterr().out


# Reward models


def test_a_reward_model_of_one_head_says_its_output_less_its_mean() -> None:
    model = classifier("llama", score_mean=0.375)
    talks = [Conversation([], "", ids) for ids in rows()]
    found = RewardModelJudge(model).scores(talks)
    assert found.values == [row[0] - 0.375 for row in head_scores(model, rows())]
    assert not found.figures


def test_an_ensemble_says_its_mean_and_its_spread() -> None:
    means = [0.5, -0.25, 1.0]
    model = classifier("llama", 3, score_heads=3, score_mean=means)
    assert score_means(model) == means
    found = RewardModelJudge(model, 0.7).scores([Conversation([], "", ids) for ids in rows()])
    for place, ids in enumerate(rows()):
        heads = [logit - mean for logit, mean in zip(alone(model, ids), means, strict=True)]
        assert found.figures["spread"][place] == pytest.approx(np.std(heads), abs=1e-5)
        assert found.values[place] == pytest.approx(np.mean(heads) - 0.7 * np.std(heads), abs=1e-5)


def test_a_penalty_needs_an_ensemble() -> None:
    with pytest.raises(UserError, match="is for ensembles"):
        RewardModelJudge(classifier("llama"), 0.1)


def test_heads_are_told_from_classes(tmp_path: Path) -> None:
    classifier("llama", 3, score_heads=3).save_pretrained(tmp_path / "heads")
    classifier("llama", 3).save_pretrained(tmp_path / "classes")
    assert load_scorer(tmp_path / "heads").config.num_labels == 3
    with pytest.raises(UserError, match="has 3 outputs; a reward model has one"):
        load_scorer(tmp_path / "classes")
    torch.manual_seed(5)
    fresh = load_scorer(tmp_path / "classes", fresh_head=True, heads=2)  # of another size, so made anew
    assert (fresh.config.num_labels, fresh.config.score_heads, fresh.score.weight.shape) == (2, 2, (2, 16))
    kept = load_scorer(tmp_path / "heads", fresh_head=True, heads=3)
    assert torch.equal(kept.score.weight, classifier("llama", 3).score.weight)


# Texts


@pytest.mark.parametrize("content", ["w1 w2", "w1 [SEP] w2", "[END]", ""])
def test_text_that_looks_like_a_special_token_stays_text(content: str) -> None:
    tokenizer = word_pieces(TURNS)
    reading = read_through_template(tokenizer, [{"role": "user", "content": content}], "w3")
    words = [tokenizer.convert_tokens_to_ids(word) for word in ("user", ":", "assistant", "w3")]
    inside = {"w1 w2": [11, 12], "w1 [SEP] w2": [11, 9, 4, 4, 12], "[END]": [9, 4, 4], "": []}[content]
    assert reading.row.ids == [1, words[0], words[1], *inside, 2, 1, words[2], words[1], words[3], 2]


def test_a_template_of_ours_reads_as_it_is_trained(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What is <|end|> in English?"},
        {"role": "assistant", "content": " A sign. "},
        {"role": "user", "content": "Thanks!\n"},
    ]
    expected = encode_chat(chat_tokenizer, [*prompt, {"role": "assistant", "content": "You're welcome."}]).ids
    assert read_through_template(chat_tokenizer, prompt, "You're welcome.").row.ids == expected


def test_a_template_that_trims_is_obeyed_and_one_that_acts_on_contents_does_not_matter() -> None:
    """As Llama's and Qwen's do; a policy that writes `</think>` must not stop the run."""
    template = (
        "{% for m in messages %}{{ '[CLS]' + (m['content'] | trim).split('w9')[-1] + '[SEP]' }}{% endfor %}"
        "{% if messages[-1]['content'].startswith('w8') %}{{ raise_exception('no') }}{% endif %}"
    )
    tokenizer = word_pieces(template)
    reading = read_through_template(tokenizer, [{"role": "user", "content": "  w1 "}], "w8 w9 w3\n")
    assert reading.row.ids == [1, 11, 2, 1, 18, 19, 13, 2]


def test_what_can_be_trained_on_is_read_as_it_is_trained() -> None:
    """A tokenizer that puts a blank before every text it gets must not do so in the middle of one."""
    pieces = [("[END]", 0.0), ("[UNK]", 0.0), ("▁", -3.0)]
    for letter in "abQA:":
        pieces += [(f"▁{letter}", -1.0), (letter, -2.0)]
    core = Tokenizer(models.Unigram(pieces, 1))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[END]", unk_token="[UNK]")
    tokenizer.chat_template = "Q:{{ messages[0]['content'] }} A:{{ messages[1]['content'] + eos_token }}"
    reading = read_through_template(tokenizer, [{"role": "user", "content": "a"}], "b")
    assert reading.row.ids == tokenizer("Q:a A:b[END]")["input_ids"]


def test_templates_that_refuse_are_errors() -> None:
    refusing = word_pieces("{{ raise_exception('System role not supported') }}")
    with pytest.raises(UserError, match="refuses a conversation: System role not supported"):
        read_through_template(refusing, [{"role": "system", "content": "w1"}], "w2")
    prompt_only = word_pieces("{{ messages[0]['content'] }}")
    with pytest.raises(UserError, match="leaves out the response"):
        read_through_template(prompt_only, [{"role": "user", "content": "w1"}], "w2")
    with pytest.raises(UserError, match=r"ppo\.judge it: the chat template leaves out the response"):
        ClassifierJudge("ppo.judge it", classifier("llama"), prompt_only)


def test_a_tokenizer_without_template_reads_a_pair() -> None:
    tokenizer = word_pieces()
    expected = tokenizer("w1 w2", "w3")
    reading = read_as_pair(tokenizer, [{"role": "user", "content": "w1 w2"}], "w3")
    assert reading.row == Row(expected["input_ids"], expected["token_type_ids"])
    several = [{"role": role, "content": text} for role, text in (("user", "w1"), ("assistant", "w2"), ("user", "w4"))]
    expected = tokenizer("user: w1\nassistant: w2\nuser: w4", "w3")
    assert read_as_pair(tokenizer, several, "w3").row.ids == expected["input_ids"]
    assert 2 not in read_as_pair(tokenizer, [{"role": "user", "content": "[SEP]"}], "w3").row.ids[1:4]


@pytest.mark.parametrize("context", range(3, 12))
def test_the_prompts_start_is_cut_and_the_response_kept(context: int) -> None:
    """[CLS] w1 w2 w3 [SEP] w4 w5 [SEP] has 8 tokens, 3 of which can go; then the response's first ones go."""
    reading = read_as_pair(word_pieces(), [{"role": "user", "content": "w1 w2 w3"}], "w4 w5")
    expected = {
        3: [1, 2, 2],
        4: [1, 2, 15, 2],
        5: [1, 2, 14, 15, 2],
        6: [1, 13, 2, 14, 15, 2],
        7: [1, 12, 13, 2, 14, 15, 2],
    }
    whole = [1, 11, 12, 13, 2, 14, 15, 2]
    row = shortened(reading, context)
    assert row.ids == expected.get(context, whole)
    assert row.segments == [0] * (row.ids.index(2) + 1) + [1] * (len(row.ids) - row.ids.index(2) - 1)


def test_how_much_a_model_can_read() -> None:
    assert longest_input(classifier("llama"), word_pieces()) == 48
    assert longest_input(classifier("llama"), word_pieces(model_max_length=20)) == 20
    assert longest_input(classifier("roberta"), word_pieces()) == 46  # its positions begin behind the pad's
    assert longest_input(classifier("bert"), word_pieces()) == 48
    assert longest_input(classifier("xlnet"), word_pieces()) == 2**31


def test_what_is_too_long_is_cut_counted_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = classifier("bert"), word_pieces()
    judge = ClassifierJudge("ppo.judge it", model, tokenizer)
    long = " ".join(f"w{i}" for i in range(50))
    talks = conversations([("w1", "w2"), (long, "w2 w3"), ("w1", long)])
    found = judge.scores(talks)
    assert found.figures["cut"] == [0.0, 1.0, 1.0]
    kept = tokenizer(" ".join(f"w{i}" for i in range(7, 50)), "w2 w3")  # 3 special ones, 2 of the response, 43 of 50
    assert len(kept["input_ids"]) == 48
    assert found.values[1] == pytest.approx(alone(model, kept["input_ids"], kept["token_type_ids"])[0], abs=1e-5)
    judge.scores(talks)
    assert capsys.readouterr().out.count("2 of 3 conversations are longer than the 48 tokens") == 1


# Classifiers


@pytest.mark.parametrize("kind", ["llama", "llama without pad", "llama that pads with its end", "gpt2", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("template", [TURNS, TURNS + "[END]", None])
def test_a_classifier_says_of_each_conversation_what_it_says_alone(kind: str, side: str, template: str | None) -> None:
    tokenizer = word_pieces(template, padding_side=side)
    model = classifier(kind, score_mean=0.25)
    found = ClassifierJudge("ppo.judge it", model, tokenizer).scores(conversations(TEXTS))
    for talk, value in zip(conversations(TEXTS), found.values, strict=True):
        messages = [*talk.prompt, {"role": "assistant", "content": talk.response}]
        if template:
            one = tokenizer.apply_chat_template(messages, return_dict=True)
            expected = alone(model, one["input_ids"])
        else:
            one = tokenizer(talk.prompt[0]["content"], talk.response)
            expected = alone(model, one["input_ids"], None if "llama" in kind else one["token_type_ids"])
        assert value == pytest.approx(expected[0] - 0.25, abs=1e-5)


@pytest.mark.parametrize("label", ["good", 2, "2"])
def test_the_label_that_counts_is_named_or_numbered(label: str | int) -> None:
    model = classifier("bert", 3, id2label={0: "bad", 1: "dull", 2: "good"})
    tokenizer = word_pieces()
    found = ClassifierJudge("ppo.judge it", model, tokenizer, label=label).scores(conversations(TEXTS)).values
    for talk, value in zip(conversations(TEXTS), found, strict=True):
        one = tokenizer(talk.prompt[0]["content"], talk.response)
        odds = np.exp(alone(model, one["input_ids"], one["token_type_ids"]))
        share = odds[2] / odds.sum()
        assert value == pytest.approx(math.log(share / (1 - share)), abs=1e-4)


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_outputs_that_exclude_no_other_count_as_they_are(kind: str) -> None:
    """A label's log-odds under the sigmoid are its logit."""
    model, tokenizer = classifier("bert", 3, problem_type=kind), word_pieces()
    found = ClassifierJudge("ppo.judge it", model, tokenizer, label=1).scores(conversations(TEXTS[:1])).values
    one = tokenizer(*TEXTS[0])
    assert found == pytest.approx([alone(model, one["input_ids"], one["token_type_ids"])[1]], abs=1e-5)


@pytest.mark.parametrize(
    ("outputs", "label", "message"),
    [
        (3, None, r"3 outputs \(0: bad, 1: dull, 2: good\); `label` must say which counts"),
        (3, "nice", r"3 outputs \(0: bad, 1: dull, 2: good\); `label` 'nice' is none of them"),
        (3, 3, "`label` 3 is none of them"),
        (1, 0, "`label` is for classifiers of several classes"),
    ],
)
def test_labels_that_mean_nothing_are_refused(outputs: int, label: Any, message: str) -> None:
    names = {0: "bad", 1: "dull", 2: "good"} if outputs == 3 else {0: "score"}
    with pytest.raises(UserError, match=message):
        ClassifierJudge("ppo.judge it", classifier("bert", outputs, id2label=names), word_pieces(), label=label)


def test_an_ensemble_may_read_text_too() -> None:
    model, tokenizer = classifier("llama", 2, score_heads=2, score_mean=[1.0, 2.0]), word_pieces(TURNS)
    judge = ClassifierJudge("ppo.judge it", model, tokenizer, uncertainty_penalty=1.0)
    found = judge.scores(conversations(TEXTS[:1]))
    ids = read_through_template(tokenizer, conversations(TEXTS)[0].prompt, TEXTS[0][1]).row.ids
    a, b = (logit - mean for logit, mean in zip(alone(model, ids), (1.0, 2.0), strict=True))
    assert found.values == pytest.approx([min(a, b)], abs=1e-5)  # mean less half the difference
    assert found.figures["spread"] == pytest.approx([abs(a - b) / 2], abs=1e-5)
    with pytest.raises(UserError, match="is for ensembles"):
        ClassifierJudge("ppo.judge it", classifier("llama"), tokenizer, uncertainty_penalty=1.0)


def test_a_score_that_is_no_number_ends_the_stage() -> None:
    model = classifier("llama")
    with torch.no_grad():
        model.score.weight.fill_(math.nan)
    with pytest.raises(StageFailed, match="score 1 of 8 is nan"):
        RewardModelJudge(model).scores([Conversation([], "", ids) for ids in rows()])


# Functions


def test_a_function_gets_texts_and_gives_numbers() -> None:
    seen: list[Any] = []

    def lengths(asked: list[dict[str, Any]]) -> Any:
        seen.extend(json.loads(json.dumps(asked)))
        asked[0]["prompt"][0]["content"] = "changed"
        return np.array([len(one["response"]) for one in asked], dtype=np.float32)

    talks = conversations([("w1", "four"), ("w2", "")])
    assert FunctionJudge("f.py:lengths", lengths).scores(talks) == Scores([4.0, 0.0])
    assert seen[0] == {"prompt": [{"role": "user", "content": "w1"}], "response": "four"}
    assert talks[0].prompt[0]["content"] == "w1"  # ours is not its to change


@pytest.mark.parametrize("number", [True, 3, np.float64(0.5), torch.tensor(2.0)])
def test_numbers_of_any_kind_will_do(number: Any) -> None:
    found = FunctionJudge("f", lambda asked: [number for _ in asked]).scores(conversations(TEXTS))
    assert found.values == [float(number)] * 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], r"the judge f.py:score gave 1 scores for 2 conversations"),
        ([1.0, math.nan], "the judge f.py:score: score 2 of 2 is nan, which is no finite number"),
        ([math.inf, 1.0], "score 1 of 2 is inf"),
        ([10**400, 1.0], "score 1 of 2 is inf"),
        (["1.0", 1.0], "a score is '1.0', which is no number"),
        ([None, 1.0], "a score is None, which is no number"),
        (None, "the judge f.py:score raised TypeError: 'NoneType' object is not iterable"),
    ],
)
def test_what_a_function_must_not_give(answer: Any, message: str) -> None:
    with pytest.raises(StageFailed, match=message):
        FunctionJudge("f.py:score", lambda _: answer).scores(conversations([("w1", "w2"), ("w3", "w4")]))


def test_a_function_that_fails_is_told_by_its_own_line() -> None:
    def score(asked: list[dict[str, Any]]) -> list[float]:
        return [float(json.loads(one["response"])) for one in asked]  # fails inside of json, called from here

    with pytest.raises(StageFailed) as caught:
        FunctionJudge("f.py:score", score).scores(conversations([("w1", "w2")]))
    line = score.__code__.co_firstlineno + 1
    what = "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"
    assert str(caught.value) == f"the judge f.py:score raised {what} ({__file__}, line {line})"
    with pytest.raises(StageFailed, match="raised SystemExit: 0"):
        FunctionJudge("f.py:score", lambda _: exit(0)).scores(conversations([("w1", "w2")]))


# Sums


def test_a_sum_says_what_each_part_says() -> None:
    class Spread:
        def scores(self, asked: Any) -> Scores:
            return Scores([1.0, 2.0], {"spread": [0.5, 0.25]})

    whole = WeightedSum(
        [Part("model", 2.0, Spread()), Part("length", -0.5, FunctionJudge("f", lambda _: [10, 20]))],
    )
    found = whole.scores(conversations([("w1", "w2"), ("w3", "w4")]))
    assert found.values == [-3.0, -6.0]
    assert found.figures == {"model": [1.0, 2.0], "model_spread": [0.5, 0.25], "length": [10.0, 20.0]}
    assert found.figures_of_each()[1] == {"model": 2.0, "model_spread": 0.25, "length": 20.0}


def test_a_single_part_of_weight_1_is_the_score_itself() -> None:
    values = [0.1, -0.3, 1e-17, 12345.678]
    found = WeightedSum([Part("one", 1.0, FunctionJudge("f", lambda _: values))]).scores(conversations(TEXTS))
    assert found.values == values


# Recipes


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("[{model: reward, python: 'a:b'}]", "exactly one of the keys model, python"),
        ("[{python: 'a:b', label: good}]", "label, chat_template and uncertainty_penalty are for a judge with `model`"),
        ("[{model: reward}, {model: ./reward}]", "two parts have one name in metrics"),
        ("[{model: reward}, {python: 'a:b', name: reward_spread}]", "two parts have one name in metrics"),
        ("[{model: m, label: true}]", "label"),
    ],
)
def test_recipes_of_judges_that_make_no_sense(judge: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(TINY_RECIPE), [f"ppo.judge={judge}"])


def test_what_judges_are_called() -> None:
    def title(**keys: Any) -> str:
        return JudgeSection.model_validate(keys).title

    assert title(model="reward") == "reward"
    assert title(model="someone/their-judge") == "their-judge"
    assert title(python="rules.py:polite") == "polite"
    assert title(python="rules.py:polite", name="manners") == "manners"


# What a recipe's judges become


@pytest.fixture(scope="module")
def foreign_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ensemble of two heads with a tokenizer and a chat template that no stage has."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = train_bpe(itertools.islice(documents("train", seed=9), 200), 320)
    prepare_for_chat(tokenizer, "chatml")
    size = {**SIZE, "vocab_size": len(tokenizer)}
    torch.manual_seed(7)
    more: dict[str, Any] = {"num_labels": 2, "score_heads": 2, "score_mean": [0.1, -0.1], "initializer_range": 0.3}
    config = LlamaConfig(**size, hidden_size=16, max_position_embeddings=160, **more, **token_info(tokenizer))
    save_model(AutoModelForSequenceClassification.from_config(config), tokenizer, folder / "model", "for a test\n")
    return folder / "model"


class Ready(NamedTuple):
    """A recipe, and a run in which the stages before ppo are done, one of them with a changed model."""

    recipe: Recipe
    run: RunDir

    def policy(self) -> Start:
        return starting_model(self.recipe, self.run, "ppo")

    def judge(self) -> WeightedSum:
        policy = self.policy()
        assert self.recipe.ppo is not None
        sections = self.recipe.ppo.judge
        return build_judge(self.recipe, self.run, policy.tokenizer(), 160, torch.device("cpu"), sections, "score")

    def critic(self) -> Critic:
        return build_critic(self.recipe, self.run, self.policy(), self.policy().tokenizer(), 160)


def ready(finished_chain: Path, folder: Path, *overrides: str, reward: Path | None = None) -> Ready:
    """`reward` takes the place of the reward stage's model."""
    recipe = load_recipe(str(TINY_RECIPE), overrides)
    shutil.copytree(finished_chain / "runs/tiny/sft/model", folder / "tiny/sft/model")
    shutil.copytree(reward or finished_chain / "runs/tiny/reward/model", folder / "tiny/reward/model")
    return Ready(recipe, RunDir.of(recipe, folder))


def test_the_reward_stages_model_reads_the_policys_tokens_and_the_critic_starts_from_it(
    finished_chain: Path, tmp_path: Path
) -> None:
    chain = ready(finished_chain, tmp_path)
    assert [(part.name, part.weight, type(part.judge)) for part in chain.judge().parts] == [
        ("reward", 1.0, RewardModelJudge)
    ]
    model = load_scorer(chain.run.stage("reward").model)
    critic = chain.critic()
    assert torch.equal(critic.head.weight, model.score.weight)
    assert critic.mean == model.config.score_mean != 0


def test_a_reward_model_with_another_tokenizer_reads_text_and_the_critic_starts_from_the_policy(
    finished_chain: Path, tmp_path: Path, foreign_judge: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain = ready(finished_chain, tmp_path, reward=foreign_judge)
    (part,) = chain.judge().parts
    assert isinstance(part.judge, ClassifierJudge)
    assert "1 x reward (a model that reads text through its own chat template, 2 heads)" in capsys.readouterr().out
    assert not chain.critic().head.weight.any()
    assert "from the policy, since the reward model has another tokenizer than the policy" in capsys.readouterr().out
    chain = ready(finished_chain, tmp_path / "asked", "ppo.critic_from=reward", reward=foreign_judge)
    with pytest.raises(RecipeError, match=r"ppo.critic_from: the reward model in .* has another tokenizer"):
        chain.critic()


def test_a_reward_model_that_reads_less_than_the_policy_is_no_critic(finished_chain: Path, tmp_path: Path) -> None:
    chain = ready(finished_chain, tmp_path, "ppo.critic_from=reward")
    file = chain.run.stage("reward").model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 100}))
    with pytest.raises(RecipeError, match="reads 100 tokens at most, the policy 160; critic_from: policy is possible"):
        chain.critic()
    assert isinstance(chain.judge().parts[0].judge, ClassifierJudge)


def test_nothing_is_loaded_that_no_judge_needs(
    finished_chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rules.py").write_text("def none(asked):\n    return [0 for _ in asked]\n")
    chain = ready(finished_chain, tmp_path, "ppo.judge=[{python: 'rules.py:none'}]", f"data.root={tmp_path}")
    shutil.rmtree(chain.run.stage("reward").path)
    assert chain.judge().scores(conversations(TEXTS)).values == [0.0] * 4
    assert not chain.critic().head.weight.any()
    said = capsys.readouterr().out
    assert "the critic starts from the policy, since the reward stage's model is no part of the score" in said


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ("label: good", UserError, "ppo.judge reward: `label` is for classifiers of several classes"),
        ("uncertainty_penalty: 1", UserError, "`uncertainty_penalty` is for ensembles"),
        ("chat_template: empty.jinja", UserError, "ppo.judge reward: the chat template leaves out the response"),
        ("chat_template: none.jinja", UserError, r"ppo.judge.chat_template: .*none.jinja can't be read"),
    ],
)
def test_what_a_reward_model_cannot_do_is_refused(
    finished_chain: Path, tmp_path: Path, keys: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "empty.jinja").write_text("{{ bos_token }}")
    chain = ready(finished_chain, tmp_path, f"ppo.judge=[{{model: reward, {keys}}}]", f"data.root={tmp_path}")
    with pytest.raises(error, match=message):
        chain.judge()


# Judges that drive PPO

RULES = """
def polite(asked):
    return [float(one["response"].startswith("P")) - 0.01 * len(one["prompt"][-1]["content"]) for one in asked]

def broken(asked):
    return [1 / 0 for _ in asked]
"""


def driven(finished_chain: Path, folder: Path, judge: str, *more: str, code: int = 0) -> tuple[str, dict[str, Any]]:
    """What ppo says, and its summary, after one update in a copy of the finished chain."""
    (folder / "rules.py").write_text(RULES)
    for stage in ("tokenizer", "pretrain", "sft", "reward"):
        shutil.copytree(finished_chain / "runs/tiny" / stage, folder / "runs/tiny" / stage)
    stages = "stages=[tokenizer, pretrain, sft, reward, ppo]"
    overrides = (stages, f"ppo.judge={judge}", "ppo.updates=1", f"data.root={folder}", *more)
    said = rlhf("run", "all", "--recipe", str(TINY_RECIPE), *overrides, cwd=folder, code=code)
    summary = folder / "runs/tiny/ppo/summary.json"
    return said, json.loads(summary.read_text()) if summary.exists() else {}


def line(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "runs/tiny/ppo/metrics.jsonl").read_text().splitlines()[-1])
    return found


def test_a_function_drives_ppo_and_is_named(finished_chain: Path, tmp_path: Path) -> None:
    said, summary = driven(finished_chain, tmp_path, "[{python: 'rules.py:polite', name: manners}]")
    assert "score = 1 x manners (a Python function)" in said
    assert line(tmp_path)["judge/manners"] == line(tmp_path)["score"]
    assert summary["judge_before"] == {"manners": summary["score_before"]}
    assert summary["judge_after"] == {"manners": summary["score_after"]}


def test_an_ensemble_with_another_tokenizer_drives_ppo_with_a_reward_model_beside_it(
    finished_chain: Path, tmp_path: Path, foreign_judge: Path
) -> None:
    parts = f"{{model: {foreign_judge}, name: other, weight: 0.5, uncertainty_penalty: 0.3}}, {{model: reward}}"
    _, summary = driven(finished_chain, tmp_path, f"[{parts}]")
    found = line(tmp_path)
    assert found["score"] == pytest.approx(0.5 * found["judge/other"] + found["judge/reward"], abs=1e-9)
    assert found["judge/other_spread"] > 0
    assert found["judge/other_cut"] == 0
    assert set(summary["judge_after"]) == {"other", "other_spread", "other_cut", "reward"}
    expected = 0.5 * summary["judge_after"]["other"] + summary["judge_after"]["reward"]
    assert summary["score_after"] == pytest.approx(expected, abs=2e-4)


def test_an_ensemble_of_the_reward_stage_drives_ppo(finished_chain: Path, tmp_path: Path) -> None:
    judge = "[{model: reward, uncertainty_penalty: 0.5}]"
    said, summary = driven(finished_chain, tmp_path, judge, "reward.heads=3")
    assert "score = 1 x reward (a model that reads the policy's own tokens, 3 heads)" in said
    assert summary["judge_before"]["reward"] == summary["score_before"]
    assert summary["judge_before"]["reward_spread"] > 0
    assert line(tmp_path)["judge/reward_spread"] > 0


def test_a_reward_model_trained_with_another_tokenizer_drives_ppo(
    finished_chain: Path, tmp_path: Path, foreign_judge: Path
) -> None:
    said, summary = driven(finished_chain, tmp_path, "[{model: reward}]", f"reward.start={foreign_judge}")
    assert "score = 1 x reward (a model that reads text through its own chat template)" in said
    assert "the critic starts from the policy, since the reward model has another tokenizer" in said
    assert summary["judge_after"] == {"reward": summary["score_after"], "reward_cut": 0.0}


def test_a_function_that_fails_ends_the_stage_with_its_own_words(finished_chain: Path, tmp_path: Path) -> None:
    said, _ = driven(finished_chain, tmp_path, "[{python: 'rules.py:broken'}]", code=1)
    file = tmp_path / "rules.py"
    assert f"the judge rules.py:broken raised ZeroDivisionError: division by zero ({file}, line 6)" in said
