"""What several stages do alike: open their data, find the model that they start from, order rows, check lengths."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.choices import loading_attention
from rlhf.data import sources as data
from rlhf.data.reader import Faults
from rlhf.data.tokens import PackedTokens, pack
from rlhf.errors import DataError, RecipeError, UserError
from rlhf.job import Job
from rlhf.model import end_ids, load_causal_lm
from rlhf.recipe import STAGES, Recipe, Sampling, Source, StageName, externals, upstream
from rlhf.rollout import Drawing, Response, build_engine, uniforms
from rlhf.rundir import RunDir
from rlhf.runtime import Bar, derive_seed, log
from rlhf.saver import once
from rlhf.tinyworld.words import Split
from rlhf.tokenizer import encode_documents, load_tokenizer

T = TypeVar("T")


def open_data(
    recipe: Recipe,
    stage: str,
    sources: tuple[Source, ...],
    kind: data.Kind,
    split: Split,
    then: Callable[[Any], Any] | None = None,
    *,
    split_texts: bool = False,
) -> data.DataSet:
    """The rows of a recipe's sources as texts, conversations, prompts or comparisons, or as what `then` makes of each.

    A UserError that `then` raises is the fault of the row, and obeys data.on_bad_row. With `split_texts` large plain
    text files are several documents.
    """
    seed = derive_seed(recipe.seed, stage, kind, split)
    opened = data.open_sources(sources, Path(recipe.data.root), kind, split, seed, split_texts=split_texts)
    return data.DataSet(opened, kind, Faults(recipe.data.on_bad_row), seed, then)


def report_faults(dataset: data.DataSet) -> None:
    """Says what was skipped, if anything was."""
    if dataset.faults.counts:
        log(dataset.faults.report())


class Start(NamedTuple):
    """The model that a stage starts from."""

    name: str  # directory or hub id
    remote_code: bool  # whether Python code that comes with it may be run
    attention: str | None  # the implementation; None: transformers' choice

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return load_tokenizer(self.name, remote_code=self.remote_code)

    def causal_lm(self, quantised: BitsAndBytesConfig | None = None) -> PreTrainedModel:
        """Its weights as a causal LM, in float32, on the CPU; or `quantised`, on the device, frozen."""
        return load_causal_lm(self.name, remote_code=self.remote_code, attention=self.attention, quantised=quantised)


def starting_model(recipe: Recipe, run: RunDir, stage: StageName) -> Start:
    """The latest model that the stage stands on: of sft, of pretrain, or the recipe's base."""
    for name in ("sft", "pretrain"):
        if name in upstream(recipe, stage):
            return named_model(recipe, str(run.stage(name).model))
    if recipe.base is None:
        raise RecipeError(f"{stage} has no model to start from: add the stage pretrain or `base`")
    return named_model(recipe, recipe.base)


def named_model(recipe: Recipe, name: str) -> Start:
    """A model by its directory or hub id."""
    return Start(name, runs_code(recipe, name), loading_attention(recipe))


def runs_code(recipe: Recipe, model: str) -> bool:
    """Whether Python code that comes with a model may be run: the recipe names it, or the base that it was made of."""
    brought = any(model == external.value for stage in STAGES for external in externals(recipe, stage))
    return model in recipe.trust_remote_code or (not brought and recipe.base in recipe.trust_remote_code)


def check_chats(name: str, tokenizer: PreTrainedTokenizerBase, *, apart: bool = False) -> None:
    """Raises UserError where a model is none to chat with; `apart`: its pad token isn't to be its end token."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if not tokenizer.chat_template:
        raise UserError(f"{name} has no chat template; run the stage sft first, or name a chat model as base")
    if pad is None or (apart and pad == end):
        has = "no pad token" if pad is None else f"one token, {tokenizer.eos_token!r}, as pad and as end token"
        raise UserError(
            f"{name} has {has}; run the stage sft first, which gives it a pad token of its own, or name one that it "
            "has and never uses as `pad_token` in its tokenizer_config.json"
        )


def check_context(context: int, key: str, tokens: int) -> None:
    """Raises RecipeError where a model's context has no room for so many tokens."""
    if tokens > context:
        raise RecipeError(f"{key} is {tokens}, more than the model's context of {context} tokens")


def packed_texts(
    job: Job, sources: tuple[Source, ...], tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> PackedTokens:
    """Texts as one file of token ids in STAGE/texts, written once by the first process, read in rows of `length`."""

    def make(folder: Path) -> dict[str, Any]:
        if not job.team.is_main:
            return {}
        dataset = open_data(job.recipe, job.stage, sources, "texts", "train")
        log(f"{job.stage}: packing the texts")
        stats = pack(_with_sizes(dataset, tokenizer), folder / "tokens.bin", len(tokenizer))
        report_faults(dataset)
        return stats._asdict()

    return PackedTokens(once(job, "texts", make).path / "tokens.bin", len(tokenizer), length, seed)


def _with_sizes(texts: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], int]]:
    sizes: list[int] = []

    def measured() -> Iterator[str]:
        for text in texts:
            sizes.append(len(text.encode()))
            yield text

    for number, ids in enumerate(encode_documents(tokenizer, measured())):
        yield ids, sizes[number]


def context_of(model: PreTrainedModel) -> int:
    """How many tokens a model can read; a very large number where its configuration doesn't say."""
    return int(getattr(model.config, "max_position_embeddings", None) or 2**31)


def fitting(prompts: list[T], length: Callable[[T], int], context: int, max_tokens: int, what: str) -> list[T]:
    """The prompts whose responses of `max_tokens` fit into a model's context; says how many don't.

    Raises DataError where none does.
    """
    room = context - max_tokens
    fit = [prompt for prompt in prompts if length(prompt) <= room]
    if not fit:
        raise DataError(
            f"{what}: no prompt leaves room for a response of {max_tokens} tokens in a context of {context}"
        )
    if len(fit) < len(prompts):
        log(
            f"{what}: {len(prompts) - len(fit)} of {len(prompts)} prompts have more than {room} tokens and are left out"
        )
    return fit


def sample_responses(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    seed: int,
    what: str = "",
) -> list[Response]:
    """A response to each prompt of token ids, drawn by all ranks together; every rank has them all.

    Row i's draws depend on (seed, i) alone. `what` names the progress bar; without it none is shown.
    """
    with Bar(what, len(prompts)) if what else nullcontext() as bar:
        engine = build_engine(
            model,
            tokenizer,
            Drawing(**sampling.model_dump()),
            end_ids=end_ids(model, tokenizer),
            progress=(lambda done: bar.show(min(done * job.team.size, len(prompts)))) if bar else None,
        )
        return job.team.share(
            range(len(prompts)),
            lambda mine: engine.generate([prompts[i] for i in mine], uniforms(seed, 0, mine, sampling.max_tokens)),
        )


BUCKET = 16  # steps whose rows are sorted by length together


def training_order(lengths: Sequence[int], rows_per_step: int, steps: int, seed: int) -> list[int]:
    """Which row is read at each place of the training: pass after pass over all rows, each in a new random order.

    Rows of like length come in one step, so that little is padded: the rows of every 16 steps are sorted by length and
    dealt to the steps, and the steps put in random order.
    """
    random = np.random.default_rng(seed)
    places: list[int] = []
    while len(places) < steps * rows_per_step:
        places += random.permutation(len(lengths)).tolist()
    del places[steps * rows_per_step :]
    ordered: list[int] = []
    for start in range(0, len(places), BUCKET * rows_per_step):
        bucket = sorted(places[start : start + BUCKET * rows_per_step], key=lambda row: lengths[row])
        for step in random.permutation(len(bucket) // rows_per_step).tolist():
            ordered += bucket[step * rows_per_step : (step + 1) * rows_per_step]
    return ordered


def card_facts(summary: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The figures of a summary that a model card shows."""
    return {key: summary[key] for key in keys if key in summary}
