"""The data sets and base models that shipped recipes name, made small: folders of their names, which go before the hub.

Columns, types, splits and the names of files are those of the real ones (looked up in their cards, 2026-11); the texts
are made up, with what is odd in the real ones: equal answers, turns that don't alternate, prompts of several turns.
"""

import copy
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import (
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
ULTRACHAT = pa.schema([("prompt", pa.string()), ("prompt_id", pa.string()), ("messages", MESSAGES)])
ULTRAFEEDBACK = pa.schema(
    [
        *(("prompt", pa.string()), ("prompt_id", pa.string())),
        *(("chosen", MESSAGES), ("rejected", MESSAGES), ("messages", MESSAGES)),
        *(("score_chosen", pa.float64()), ("score_rejected", pa.float64())),
    ]
)
FINEWEB = pa.schema(
    [
        *((name, pa.string()) for name in ("text", "id", "dump", "url", "file_path", "language")),
        *(("language_score", pa.float64()), ("token_count", pa.int64())),
        *(("score", pa.float64()), ("int_score", pa.int64())),
    ]
)
FINEWEB_CARD = """\
---
configs:
  - config_name: default
    data_files: [{split: train, path: "data/*/*"}]
  - config_name: sample-10BT
    data_files: [{split: train, path: "sample/10BT/*"}]
---
"""


def say(*texts: str) -> list[dict[str, str]]:
    """A conversation of these texts, the user's first; keys in the order that the hub has them in."""
    return [{"content": text, "role": ("user", "assistant")[place % 2]} for place, text in enumerate(texts)]


def question(number: int) -> str:
    return f"What is the opposite of hot, asked for the {number}th time?"


def ultrachat(first: int, rows: int) -> list[dict[str, Any]]:
    """Dialogues of two to six turns, from number `first` on."""
    found = []
    for number in range(first, first + rows):
        more = [f"Turn {turn} of {number}." for turn in range(2 * (number % 3))]
        turns = say(question(number), f"It is cold, for the {number}th time.", *more)
        found.append({"prompt": question(number), "prompt_id": f"{number:064x}", "messages": turns})
    return found


def ultrafeedback(first: int, rows: int) -> list[dict[str, Any]]:
    """Comparisons from number `first` on; the second one is of two equal answers, as some of the real ones are."""
    found = []
    for number in range(first, first + rows):
        better = say(question(number), f"The opposite of hot is cold ({number}).")
        worse = better if number == first + 1 else say(question(number), f"I don't know ({number}).")
        row = {"prompt": question(number), "prompt_id": f"{number:064x}", "chosen": better, "rejected": worse}
        found.append({**row, "messages": better, "score_chosen": 8.5, "score_rejected": 8.5 - number % 5})
    return found


def hh(first: int, rows: int) -> list[dict[str, str]]:
    """Comparisons of whole dialogues in one text; the second one's turns don't alternate, as in some real ones."""
    found = []
    for number in range(first, first + rows):
        asked = f"\n\nHuman: {question(number)}\n\nAssistant: In summer?\n\nHuman: Yes\n\nAssistant:"
        if number == first + 1:
            asked = f"\n\nHuman: {question(number)}\n\nHuman: Yes\n\nAssistant:"
        found.append({"chosen": f"{asked} Cold.\n\nIt is.", "rejected": f"{asked} No idea"})
    return found


def fineweb(rows: int) -> list[dict[str, Any]]:
    """Documents, every one another."""
    return [
        {
            "text": f"Page {number}. The opposite of hot is cold, and {number} plus one is {number + 1}.",
            "id": f"<urn:uuid:{number}>", "dump": "CC-MAIN-2024-10", "url": f"https://example.org/{number}",
            "file_path": "s3://commoncrawl/a.warc.gz", "language": "en", "language_score": 0.97, "token_count": 21,
            "score": 3.4, "int_score": 3,
        }
        for number in range(rows)
    ]  # fmt: skip


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def make_data_sets(folder: Path) -> None:
    """All data sets that shipped recipes name, below a folder."""
    chats, pairs = folder / "HuggingFaceH4/ultrachat_200k/data", folder / "HuggingFaceH4/ultrafeedback_binarized/data"
    for number, (split, rows) in enumerate({"train_sft": 12, "test_sft": 6, "train_gen": 2, "test_gen": 2}.items()):
        write_parquet(chats / f"{split}-00000-of-00001.parquet", ultrachat(100 * number, rows), ULTRACHAT)
    for number, (split, rows) in enumerate({"train_prefs": 25, "test_prefs": 9, "train_sft": 2, "test_sft": 2}.items()):
        write_parquet(
            pairs / f"{split}-00000-of-00001.parquet", ultrafeedback(1000 + 100 * number, rows), ULTRAFEEDBACK
        )
    for number, part in enumerate(("harmless-base", "helpful-base")):
        write_lines(folder / "Anthropic/hh-rlhf" / part / "train.jsonl.gz", hh(2000 + 100 * number, 12))
        write_lines(folder / "Anthropic/hh-rlhf" / part / "test.jsonl.gz", hh(3000 + 100 * number, 5))
    edu = folder / "HuggingFaceFW/fineweb-edu"
    write_parquet(edu / "sample/10BT/000_00000.parquet", fineweb(5400), FINEWEB)
    write_parquet(edu / "data/CC-MAIN-2024-10/train-00000-of-00014.parquet", fineweb(2), FINEWEB)
    (edu / "README.md").write_text(FINEWEB_CARD, encoding="utf-8")


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
QWEN_TEMPLATE = (  # as the bases have it: a system turn of their own in front
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def make_base(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A tiny random model of a base's family, with special tokens and template as the base has them.

    The family is told from the folder's name; any other than Qwen's is OLMo 2.
    """
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"eos_token": "<|endoftext|>"})
    made.bos_token = None
    made.pad_token = "<|endoftext|>"
    family: dict[str, Any] = {"Qwen2": (Qwen2Config, Qwen2ForCausalLM), "Qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = family.get(folder.name[:5], (Olmo2Config, Olmo2ForCausalLM))
    if folder.name[:5] in family:
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        made.chat_template = QWEN_TEMPLATE
    torch.manual_seed(1)
    config = config_class(
        vocab_size=len(made), num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=made.eos_token_id,
        bos_token_id=None, pad_token_id=made.pad_token_id, **SIZES,
    )  # fmt: skip
    model_class(config).save_pretrained(folder)
    made.save_pretrained(folder)
