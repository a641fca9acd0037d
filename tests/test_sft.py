"""The sft stage: packing changes no gradient, long rows are treated as asked, the best weights are what is kept."""

import copy
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)
from trl import SFTConfig, SFTTrainer

from rlhf.errors import DataError, MissingInput, RecipeError, UserError
from rlhf.recipe import EarlyStoppingSection, Recipe, SftSection, parse_recipe
from rlhf.sharding import WholeModel
from rlhf.team import Team
from rlhf.templates import CHAT_TEMPLATES
from rlhf.tokenizer import encode_chat, encode_texts
from stages.packing import IGNORED, PackingCollator, check_isolation, fitted
from stages.sft import Dialogues, Row, dataset_of, dialogues_of, marked, prepared, validation_loss
from stages.sft_trainer import LeanSFTTrainer
from stages.trl_glue import Progress, Validation, Validator, trainer_arguments
from tests.conftest import TINY_RECIPE, rlhf

# Packing


def test_rows_are_filled_by_hand() -> None:
    assert fitted([5, 4, 8], 9) == [[2], [0, 1]]
    assert fitted([3, 3, 3, 6, 1, 9], 9) == [[5], [3, 0], [1, 2, 4]]
    # best fit: the 2 goes where it leaves nothing over, not into the first row with room
    assert fitted([6, 7, 2, 3], 9) == [[1, 2], [0, 3]]
    assert fitted([], 9) == []
    with pytest.raises(ValueError, match="doesn't fit"):
        fitted([10], 9)


@given(lengths=st.lists(st.integers(1, 50), max_size=60))
def test_every_item_stands_in_one_row_and_few_rows_are_used(lengths: list[int]) -> None:
    rows = fitted(lengths, 50)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= 50 for row in rows)
    assert sum(sum(lengths[item] for item in row) <= 25 for row in rows) <= 1, "two half-empty rows would be one"


def test_packed_rows_by_hand() -> None:
    examples = [{"input_ids": [1, 2], "labels": [IGNORED, 2]}, {"input_ids": [3, 4, 5], "labels": [3, 4, IGNORED]}]
    found = PackingCollator(room=6, pad=9)([*examples, {"input_ids": [6, 7, 8], "labels": [IGNORED, 7, 8]}])
    assert {name: values.tolist() for name, values in found.items()} == {
        "input_ids": [[3, 4, 5, 6, 7, 8], [1, 2, 9, 9, 9, 9]],
        "labels": [[IGNORED, 4, IGNORED, IGNORED, 7, 8], [IGNORED, 2, IGNORED, IGNORED, IGNORED, IGNORED]],
        "position_ids": [[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]],
    }


SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 64, "intermediate_size": 64, "max_position_embeddings": 64}
SLIDING: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 3}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "qwen3-sliding": Qwen3Config(**SIZES, head_dim=8, **SLIDING, layer_types=["sliding_attention", "full_attention"]),
    "gpt2": GPT2Config(
        vocab_size=64, n_layer=2, n_embd=32, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}


def a_model(name: str, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    config.initializer_range = 0.2
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)


def some_rows() -> list[dict[str, list[int]]]:
    """Twelve conversations of 3 to 20 tokens, of which about half are trained, the last always and the first never."""
    draw = torch.Generator().manual_seed(5)
    rows = []
    for length in torch.randint(3, 21, (12,), generator=draw).tolist():
        ids = torch.randint(1, 64, (length,), generator=draw).tolist()
        trained = [False, *(torch.rand(length - 2, generator=draw) < 0.5).tolist(), True]
        rows.append({"input_ids": ids, "labels": [i if t else IGNORED for i, t in zip(ids, trained, strict=True)]})
    return rows


def a_trainer(kind: type, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, **more: Any) -> Any:
    arguments = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], max_length=None)
    data = Dataset.from_list(some_rows())
    return kind(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, **more)


def loss_and_gradient(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


def one_by_one(model: PreTrainedModel) -> torch.Tensor:
    """The oracle: each conversation alone, each trained token's nats added up."""
    total, count = torch.zeros(()), 0
    for row in some_rows():
        logprobs = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0].log_softmax(-1)
        for place, label in enumerate(row["labels"]):
            if label != IGNORED:
                total, count = total - logprobs[place - 1, label], count + 1
    return total / count


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_neither_packing_nor_our_loss_changes_a_gradient(
    chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, attention: str
) -> None:
    model = a_model(name, attention)
    check_isolation(model, "sft.packing")
    expected = loss_and_gradient(model, one_by_one(model))
    rows = some_rows()
    count = torch.tensor(sum(label != IGNORED for row in rows for label in row["labels"]))
    trainer = a_trainer(LeanSFTTrainer, model, chat_tokenizer, tmp_path)
    assert trainer._lean
    for collator in (trainer.data_collator, PackingCollator(21, 0), PackingCollator(60, 0)):
        # in two microbatches, whose gradients add up
        halves = [
            trainer.compute_loss(model, collator(half), num_items_in_batch=count) for half in (rows[:5], rows[5:])
        ]
        found = loss_and_gradient(model, halves[0] + halves[1])
        assert found.keys() == expected.keys()
        for part, value in expected.items():
            assert torch.allclose(found[part], value, atol=1e-6), (part, (found[part] - value).abs().max())


def test_our_loss_is_trls(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = a_model("llama", "sdpa")
    found = []
    for kind in (SFTTrainer, LeanSFTTrainer):
        trainer = a_trainer(kind, model, chat_tokenizer, tmp_path)
        batch = trainer.data_collator(some_rows())
        found.append(loss_and_gradient(model, trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(70))))
    for part, value in found[0].items():
        assert torch.allclose(found[1][part], value, atol=1e-6), part


def test_a_model_that_lets_conversations_see_each_other_is_refused() -> None:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
    model = OPTForCausalLM(OPTConfig(vocab_size=64, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3, **sizes))
    with pytest.raises(RecipeError, match=r"sft\.packing: OPTForCausalLM lets packed conversations see each other"):
        check_isolation(model, "sft.packing")


# Conversations


def a_recipe(folder: Path, rows: list[dict[str, Any]], **sft: Any) -> tuple[Recipe, SftSection]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    section = {
        "train": [{"path": "rows.jsonl"}],
        "validation": [{"path": "rows.jsonl"}],
        "steps": 1,
        "dialogues_per_step": 1,
        "max_tokens": 24,
        "learning_rate": 1e-3,
        "sampling": {"max_tokens": 8},
        **sft,
    }
    raw = {"name": "t", "stages": ["sft"], "base": "nowhere", "data": {"root": str(folder)}, "sft": section}
    recipe = parse_recipe(raw, "a test")
    assert recipe.sft
    return recipe, recipe.sft


def row(question: str, answer: str) -> dict[str, Any]:
    return {"prompt": question, "completion": answer}


LONG_ANSWER, LONG_QUESTION = row("a", "b" * 30), row("a" * 30, "b")
SHORT = row("a", "b")


def read(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], **sft: Any) -> Dialogues:
    recipe, settings = a_recipe(folder, rows, **sft)
    return dialogues_of(recipe, settings, tokenizer, "train")


def test_long_rows_are_dropped_and_counted(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    found = read(tmp_path, chat_tokenizer, [SHORT, LONG_ANSWER, LONG_QUESTION, SHORT])
    whole = encode_chat(chat_tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert [row.chat() for row in found.chats] == [whole, whole]
    assert found.facts("dialogues") == {
        "dialogues_too_long": 2,
        "dialogues_truncated": 0,
        "dialogues_without_trained_tokens": 0,
    }
    assert "2 dialogues (2 were too long: 0 of them truncated, 2 dropped)" in found.say()
    assert len(found.asked) == 4, "a prompt may be sampled for though its answer is too long to learn"


def test_long_rows_are_truncated_at_their_end(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """One that has no trained token left is dropped, and both are counted."""
    found = read(tmp_path, chat_tokenizer, [SHORT, LONG_ANSWER, LONG_QUESTION], too_long="truncate")
    assert (found.too_long, found.truncated, found.untrained) == (2, 1, 1)
    ids, trained = found.chats[1].chat()
    assert len(ids) == len(trained) == 24
    assert chat_tokenizer.decode(ids).startswith("<|bos|><|user|>a<|end|><|assistant|>bbbb")
    assert not chat_tokenizer.decode(ids).endswith("<|end|>")
    assert trained.index(True) == ids.index(chat_tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1
    assert all(trained[trained.index(True) :])


def test_long_rows_are_an_error_that_names_the_line(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: \d+ tokens, more than sft\.max_tokens, which is 24"):
        read(tmp_path, chat_tokenizer, [SHORT, LONG_ANSWER], too_long="error")


def test_nothing_left_is_an_error(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 1 conversations has at most 24 tokens"):
        read(tmp_path, chat_tokenizer, [LONG_ANSWER])
    with pytest.raises(DataError, match="nor a trained token among its first ones"):
        read(tmp_path, chat_tokenizer, [LONG_QUESTION], too_long="truncate")
    with pytest.raises(DataError, match=r"end token '<\|end\|>' is nowhere .* larger sft.max_tokens"):
        read(tmp_path, chat_tokenizer, [LONG_ANSWER], too_long="truncate")


def test_dialogues_are_kept_as_arrays(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As lists they took up to a hundred bytes a token, and some hundred thousand dialogues all the memory."""
    rows = [{"prompt": "a", "completion": "b" * 2000}, {"prompt": "a", "completion": "bc" * 900}] * 50
    tracemalloc.start()
    found = read(tmp_path, chat_tokenizer, rows, max_tokens=3000)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    dataset = dataset_of(found.chats)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    tokens = sum(len(row.ids) for row in found.chats)
    assert tokens > 50_000
    assert held < 8 * tokens and most < 30 * tokens
    for row, read_again in zip(found.chats, dataset, strict=True):
        ids, trained = row.chat()
        assert read_again["input_ids"] == ids
        assert read_again["labels"] == [
            token if learned else IGNORED for token, learned in zip(ids, trained, strict=True)
        ]


def test_the_loss_is_on_all_answers_or_the_last(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    roles = ["system", "user", "assistant", "user", "assistant"]
    rows = [{"messages": [{"role": role, "content": f"{role[0]}{n}"} for n, role in enumerate(roles)]}]
    texts = []
    for mode in ("all", "last"):
        (chat,) = read(tmp_path, chat_tokenizer, rows, loss_on=mode, max_tokens=60).chats
        texts.append(chat_tokenizer.decode([i for i, trained in zip(*chat.chat(), strict=True) if trained]))
    assert texts == ["a2<|end|>a4<|end|>", "a4<|end|>"]


def test_what_a_template_refuses_is_the_fault_of_a_row(chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Named by file and line, and skipped where that is asked for."""
    picky = copy.deepcopy(chat_tokenizer)
    picky.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns, please') }}{% endif %}"
        + picky.chat_template
    )
    system = {"messages": [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]}
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: the chat template refuses .*no system turns, please"):
        read(tmp_path, picky, [SHORT, system])
    nobody = {"messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: no assistant turn to learn from"):
        read(tmp_path, picky, [nobody])


def test_a_blank_answer_that_the_template_leaves_out_is_named_by_its_line(
    chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    silent = copy.deepcopy(chat_tokenizer)
    silent.chat_template = silent.chat_template.replace(
        "in messages -%}", "in messages if message['role'] == 'user' or message['content'] | trim -%}"
    )
    turns = [("user", "a"), ("assistant", " "), ("user", "b"), ("assistant", "c")]
    blank = {"messages": [{"role": role, "content": content} for role, content in turns]}
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: message 2, the assistant's, is blank"):
        read(tmp_path, silent, [SHORT, blank])
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: the last answer is empty"):
        read(tmp_path, silent, [SHORT, row("a", " \n")])


def test_the_first_dialogue_shows_what_is_trained(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "你好 ⟦x⟧\x1b[31m"}, {"role": "assistant", "content": "a\nb"}]
    shown = marked(chat_tokenizer, encode_chat(chat_tokenizer, messages))
    assert shown.plain == ("  <|bos|><|user|>你好 \\u27e6x\\u27e7\\x1b[31m<|end|><|assistant|>⟦a\n  b<|end|>⟧")
    assert [shown.plain[span.start : span.end] for span in shown.spans if "green" in str(span.style)] == [
        "⟦a\n  b<|end|>⟧"
    ]
    long = marked(
        chat_tokenizer, encode_chat(chat_tokenizer, [messages[0], {"role": "assistant", "content": "c" * 9000}])
    )
    assert "... and 5,0" in long.plain and len(long.plain) < 4100


# The base


def prepare(folder: Path, tokenizer: PreTrainedTokenizerBase, **sft: Any) -> PreTrainedTokenizerBase:
    recipe, settings = a_recipe(folder, [SHORT], **sft)
    found = copy.deepcopy(tokenizer)
    prepared(recipe, settings, "the base", found)
    return found


def test_a_template_comes_by_name_or_from_a_file(
    tokenizer: PreTrainedTokenizerBase, chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert prepare(tmp_path, tokenizer, chat_template="chatml").eos_token == "<|im_end|>"
    assert prepare(tmp_path, chat_tokenizer, chat_template="chatml").eos_token == "<|end|>", "it has one"
    assert (
        prepare(tmp_path, chat_tokenizer, chat_template="chatml", replace_chat_template=True).eos_token == "<|im_end|>"
    )
    own = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(own)
    assert prepare(tmp_path, tokenizer, chat_template="own.jinja").chat_template == own
    with pytest.raises(MissingInput, match=r"sft\.chat_template: .*gone\.jinja"):
        prepare(tmp_path, tokenizer, chat_template="gone.jinja")
    (tmp_path / "bad.jinja").write_text("{% for")
    with pytest.raises(UserError, match="the base with its chat template: the chat template refuses"):
        prepare(tmp_path, tokenizer, chat_template="bad.jinja")


def test_a_base_whose_turns_dont_end_with_eos_is_refused_before_any_row_is_read(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    base = copy.deepcopy(tokenizer)
    base.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    base.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(UserError, match=r"the base .* EOS token '<\|eos\|>'.*sft\.end_token='<\|im_end\|>'"):
        prepare(tmp_path, base)
    assert prepare(tmp_path, base, end_token="<|im_end|>").eos_token == "<|im_end|>"


def test_a_generation_prompt_that_answers_dont_follow_is_warned_of(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    )
    prepare(tmp_path, tokenizer, chat_template="own.jinja")
    assert "warning: the chat template's generation prompt is not what" in capsys.readouterr().out
    prepare(tmp_path, tokenizer)
    assert "warning" not in capsys.readouterr().out


def test_markers_that_hold_more_than_the_answer_are_told_of_once(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = CHAT_TEMPLATES["rlhf"].replace(
        "{{- '<|assistant|>' -}}{%- generation -%}", "{%- generation -%}<|assistant|>"
    )
    (tmp_path / "wide.jinja").write_text(wide)
    prepared = prepare(tmp_path, tokenizer, chat_template="wide.jinja", end_token="<|end|>")
    said = "markers hold '<|assistant|>b<|end|>'; of that only 'b<|end|>' is trained"
    assert capsys.readouterr().out.count(said) == 1
    read(tmp_path, prepared, [SHORT, SHORT])
    prepare(tmp_path, tokenizer)
    assert "markers" not in capsys.readouterr().out


# Steps


@pytest.mark.parametrize(("steps", "expected"), [(1, 0), (2, 1), (10, 1), (100, 5)])
def test_a_single_step_is_no_warm_up(steps: int, expected: int) -> None:
    """It was at a learning rate of 0, and nothing was learned."""
    settings: dict[str, Any] = {"seed": 1, "stage": "sft", "precision": "float32", "size": 1, "passes": 1}
    settings |= {"learning_rate": 1.0, "warmup": 0.05, "weight_decay": 0.0, "gradient_clipping": 1.0}
    assert trainer_arguments(output=Path(), steps=steps, **settings)["warmup_steps"] == expected


# Validation


def test_the_validation_loss_is_the_mean_over_trained_tokens(
    chat_tokenizer: PreTrainedTokenizerBase, tiny_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a", "hot and cold", "你好", "x" * 20, ""]
    chats = [
        encode_chat(chat_tokenizer, [{"role": "user", "content": text}, {"role": "assistant", "content": text + "!"}])
        for text in texts
    ]
    nats, count = 0.0, 0
    for ids, trained in chats:
        logprobs = tiny_model(torch.tensor([ids])).logits[0].detach().double().log_softmax(-1)
        for place in range(1, len(ids)):
            if trained[place]:
                nats, count = nats - float(logprobs[place - 1, ids[place]]), count + 1
    for held in (2**26, 1):  # all in one batch, and each alone
        monkeypatch.setattr("stages.sft.LOGITS", held)
        found = validation_loss(Team(), tiny_model, [Row.of(chat) for chat in chats])
        assert found["validation_nats_per_token"] == pytest.approx(nats / count, abs=2e-6)


class Script:
    """A validation whose losses are given, on a model of one weight that counts the steps."""

    def __init__(self, losses: dict[int, float], steps: int, **stopping: Any) -> None:
        self.model, self.progress, self.losses = torch.nn.Linear(1, 1, bias=False), Progress(), losses
        validation = Validation(self._measure, 3, "loss", EarlyStoppingSection(**stopping))
        self.validator = Validator("sft", validation, steps, self.progress, self.model, WholeModel(self.model))
        self.measured: list[int] = []
        self.step = 0

    def _measure(self) -> dict[str, float]:
        assert not self.model.training
        self.measured.append(self.step)
        return {"loss": self.losses[self.step]}

    def run(self) -> tuple[int, int, float]:
        """(last step, best step, the weight that is kept)."""
        for step in range(len(self.losses)):
            self.step = step
            with torch.no_grad():
                self.model.weight.fill_(step)
            if self.validator.due(step):
                self.validator.measure(step)
                assert self.model.training
            if self.progress.stopped:
                break
        self.validator.keep_best()
        return self.step, self.progress.best_step, self.model.weight.item()


def losses(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


@pytest.mark.parametrize(
    ("values", "stopping", "expected"),
    [
        ((9, 5, 4, 6, 3, 7, 2), {"every": 1, "patience": 2}, (6, 6, 6.0)),  # never two without gain
        ((9, 5, 4, 6, 4, 1, 1), {"every": 1, "patience": 2}, (4, 2, 2.0)),  # 4 again is no gain
        ((9, 5, 4, 6, 3, 7, 2), {"every": 1, "patience": 1}, (3, 2, 2.0)),
        # what gains too little is kept, but doesn't put off the end
        ((9, 5, 4.5, 4.2, 4.1, 7, 2), {"every": 1, "patience": 2, "min_gain": 1.0}, (3, 3, 3.0)),
        ((9, 5, 4.5, 3.9, 3, 7, 2), {"every": 1, "patience": 2, "min_gain": 1.0}, (5, 4, 4.0)),
        ((9, 1, 4, 6, 3, 7, 2), {"every": 2, "patience": 2}, (6, 6, 6.0)),  # the 1 of step 1 decides nothing
        ((1, 5, 4, 6, 3, 7, 2), {"every": 2, "patience": 9}, (6, 0, 0.0)),  # training made it worse
        ((9, 5, 4, 1, 8, 7, 2), {"every": 4, "patience": 9}, (6, 6, 6.0)),  # the last step decides too
    ],
)
def test_the_weights_with_the_lowest_loss_are_kept(
    values: tuple[float, ...], stopping: dict[str, Any], expected: tuple[int, int, float]
) -> None:
    script = Script(losses(*values), steps=len(values) - 1, **stopping)
    assert script.run() == expected
    every = stopping["every"]
    assert script.measured == [n for n in range(expected[0] + 1) if n % every == 0 or n % 3 == 0 or n == 6]


def test_the_best_weights_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    before, after = (Script(losses(9, 2, 5, 6), steps=10, every=1, patience=9) for _ in range(2))
    before.run()
    before.validator.save(tmp_path, writes=True)
    after.validator.load(tmp_path, (0, 1))
    after.progress.kept = {"loss": 2.0}
    after.validator.keep_best()
    assert after.model.weight.item() == 1.0


# The stage


SMALL = ("sft.steps=12", "sft.sampled_prompts=8", "sft.validate_every=5")


def start_from(finished_chain: Path, folder: Path) -> Path:
    import shutil

    for before in ("tokenizer", "pretrain"):
        shutil.copytree(finished_chain / "runs/tiny" / before, folder / "runs/tiny" / before)
    return folder / "runs/tiny/sft"


def test_an_adapter_is_saved_and_merged_and_the_loss_is_measured_on_the_way(
    finished_chain: Path, tmp_path: Path
) -> None:
    directory = start_from(finished_chain, tmp_path)
    said = rlhf(
        *("run", "sft", "--recipe", str(TINY_RECIPE), *SMALL, "sft.lora={rank: 4}", "sft.chat_template=chatml"),
        *("sft.packing=true", "sft.microbatch_size=8", "sft.ended_warning=1.0"),
        cwd=tmp_path,
    )
    assert "the embeddings of <|im_start|> <|im_end|> are trained beside the adapters" in said
    assert "<|im_start|>assistant\n  ⟦" in said
    assert "packed); 300 dialogues" in said
    assert "sft: warning: only" in said
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["parameters_trained"] < summary["parameters"]
    assert summary["validation_nats_per_token"] < summary["validation_nats_per_token_before"]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    measured = {
        line["step"]: line["validation_nats_per_token"] for line in lines if "validation_nats_per_token" in line
    }
    assert list(measured) == [0, 5, 10, 12]
    assert measured[0] == summary["validation_nats_per_token_before"]
    assert measured[12] == summary["validation_nats_per_token"]

    plain = AutoModelForCausalLM.from_pretrained(directory / "model")
    chat = AutoTokenizer.from_pretrained(directory / "model")
    assert sum(parameter.numel() for parameter in plain.parameters()) == summary["parameters"]
    assert plain.get_input_embeddings().num_embeddings == len(chat) == 602
    assert plain.generation_config.eos_token_id == plain.config.eos_token_id == chat.convert_tokens_to_ids("<|im_end|>")
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "runs/tiny/pretrain/model")
    base.resize_token_embeddings(len(chat), mean_resizing=False)
    adapted = PeftModel.from_pretrained(base, directory / "adapter")
    ids = torch.tensor(
        [encode_texts(chat, ["What is the opposite of hot?"])[0] + chat.convert_tokens_to_ids(["<|im_end|>"])]
    )
    with torch.no_grad():
        assert (adapted(ids).logits - plain(ids).logits).abs().max() < 1e-5


def test_two_processes_with_adapters_packing_and_early_stopping_do_what_one_does(
    finished_chain: Path, tmp_path: Path
) -> None:
    found = []
    for processes in ("1", "2"):
        folder = tmp_path / processes
        directory = start_from(finished_chain, folder)
        rlhf(
            *("run", "sft", "--recipe", str(TINY_RECIPE), *SMALL, "--processes", processes, "sft.lora={rank: 4}"),
            *("sft.packing=true", "sft.microbatch_size=4", "sft.early_stopping={every: 4, patience: 2}"),
            cwd=folder,
        )
        summary = json.loads((directory / "summary.json").read_text())
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        found.append((summary, [line["loss"] for line in lines if "loss" in line]))
    (one, losses_of_one), (two, losses_of_two) = found
    assert losses_of_two == pytest.approx(losses_of_one, abs=1e-4)
    assert two["validation_nats_per_token"] == pytest.approx(one["validation_nats_per_token"], abs=1e-4)
    assert (two["best_step"], two["stopped_early"]) == (one["best_step"], one["stopped_early"]) == (12, False)


def test_what_cant_be_done_is_said_before_anything_is_trained(finished_chain: Path, tmp_path: Path) -> None:
    start_from(finished_chain, tmp_path)
    run = ("run", "sft", "--recipe", str(TINY_RECIPE))
    said = rlhf(*run, "sft.lora={targets: [query]}", cwd=tmp_path, code=2)
    assert "sft.lora.targets: LlamaForCausalLM has no linear layer 'query'" in said
    said = rlhf(*run, "sft.end_token='</s>'", cwd=tmp_path, code=2)
    assert "the end token '</s>' is not a token of the vocabulary" in said
