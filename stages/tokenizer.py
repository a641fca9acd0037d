"""The tokenizer stage: a byte-level BPE, saved as a Hugging Face fast tokenizer.

Fixes the vocabulary and the document's begin and end tokens for every later stage.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from rlhf.errors import UserError
from rlhf.job import Job
from rlhf.runtime import Bar, log
from rlhf.tokenizer import LONGEST_RUN, encode_texts, shorten_runs, train_bpe
from stages.common import open_data, report_faults

MEASURED_TEXTS = 2000  # bytes per token are measured on the first so many texts


def run(job: Job) -> dict[str, Any]:
    """Trains the tokenizer and saves it in tokenizer/model."""
    recipe = job.recipe
    settings = recipe.tokenizer
    assert settings is not None
    dataset = open_data(recipe, "tokenizer", settings.train, "texts", "train")
    total = sum(1 for _ in dataset)
    log(f"tokenizer: byte-level BPE of {settings.vocab_size:,} tokens from {total:,} texts")
    runs_cut = 0
    with Bar("tokenizer", total) as bar:

        def texts() -> Iterator[str]:
            nonlocal runs_cut
            for number, text in enumerate(dataset, 1):
                if number % 100 == 0 or number == total:
                    bar.show(number)
                shortened, cut = shorten_runs(text)
                runs_cut += cut
                yield shortened

        tokenizer = train_bpe(texts(), settings.vocab_size)
    report_faults(dataset)
    if runs_cut:
        log(f"tokenizer: {runs_cut} runs of more than {LONGEST_RUN:,} characters without a break were cut to that")
    if len(tokenizer) < settings.vocab_size:
        raise UserError(
            f"the texts have merges for {len(tokenizer)} tokens only, tokenizer.vocab_size asks for "
            f"{settings.vocab_size}; give more text or ask for less"
        )
    measured = list(islice(dataset, MEASURED_TEXTS))
    tokens = sum(len(ids) for ids in encode_texts(tokenizer, measured))
    size = sum(len(text.encode()) for text in measured)
    tokenizer.save_pretrained(job.directory.model)
    log(f"tokenizer: {len(tokenizer):,} tokens, {size / tokens:.2f} bytes a token")
    return {
        "vocab_size": len(tokenizer),
        "bytes_per_token": round(size / tokens, 4),
        "texts": total,
        "parameters": 0,
    }
