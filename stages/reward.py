"""The reward stage: Bradley-Terry on comparisons of two responses to a prompt, on TRL's RewardTrainer.

Comparisons come from files, or are made here: the SFT model samples responses, the built-in world's labellers compare
them. Bradley-Terry fixes neither origin nor scale of the scores, so both are set after training: on the responses that
were compared in training, the score has mean 0 and variance 1. The scale is folded into the head's weight; the mean
travels in the model's configuration, since the head has no bias, and is taken off by every judge.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, Literal, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from rlhf.data.rows import Comparison
from rlhf.errors import DataError, UserError
from rlhf.functional.intervals import Estimate, mean_estimate, proportion_estimate, ratio_estimate
from rlhf.job import Job
from rlhf.judge import raw_scores, score_mean
from rlhf.model import (
    count_parameters,
    load_scorer,
    model_card,
    save_model,
    scale_last_norm,
    use_special_tokens,
)
from rlhf.recipe import CollectSection, RewardSection, microbatches
from rlhf.rundir import write_atomically
from rlhf.runtime import derive_seed, device, log
from rlhf.saver import once
from rlhf.team import Team
from rlhf.tinyworld.dialogues import shuffled_prompts
from rlhf.tinyworld.oracle import gold_reward, prefers_first
from rlhf.tinyworld.words import Draw
from rlhf.tokenizer import encode_chat, encode_prompt, load_tokenizer
from stages.common import (
    Start,
    card_facts,
    context_of,
    fitting,
    open_data,
    report_faults,
    runs_code,
    sample_responses,
    starting_model,
    training_order,
)
from stages.trl_glue import run_trainer, trainer_arguments

NOT_MEASURED: dict[str, Any] = {
    "pairs_test": 0,
    "accuracy": None,
    "accuracy_ci95": None,
    "length_baseline_accuracy": None,
    "length_baseline_accuracy_ci95": None,
}


class Pair(NamedTuple):
    """A comparison with the ids that the model reads."""

    comparison: Comparison
    chosen_ids: list[int]
    rejected_ids: list[int]


def run(job: Job) -> dict[str, Any]:
    """Trains the reward model and saves it in reward/model."""
    recipe, run, directory = job.recipe, job.run, job.directory
    settings = recipe.reward
    assert settings is not None
    start = starting_model(recipe, run, "reward")
    tokenizer = start.tokenizer()
    if not tokenizer.chat_template or tokenizer.pad_token_id is None:
        lacks = "pad token" if tokenizer.chat_template else "chat template"
        raise UserError(f"{start.name} has no {lacks}; run the stage sft first, or name a chat model as base")
    trained: dict[str, Any] = {"pairs_train": 0}
    if settings.from_:
        judge_code = runs_code(recipe, settings.from_)
        model = load_scorer(settings.from_, remote_code=judge_code).to(device())
        _check_same_tokenizer(settings.from_, tokenizer, judge_code)
        test = _comparisons(job, settings, tokenizer, start, model, "test")
    else:
        torch.manual_seed(derive_seed(recipe.seed, "reward", "head"))
        model = load_scorer(start.name, fresh_head=True, remote_code=start.remote_code)
        train = _comparisons(job, settings, tokenizer, start, model, "train")
        test = _comparisons(job, settings, tokenizer, start, model, "test")
        trained = _train(job, settings, model, tokenizer, train)
        _normalise(job.team, model, train)
    measured = _measure(job.team, model, test, settings.gold_margin) if test else NOT_MEASURED
    summary = {"parameters": count_parameters(model), **trained, **measured}
    if test:
        log(
            f"reward: accuracy {summary['accuracy']:.3f} on {summary['pairs_test']} held-out pairs; "
            f"'longer wins' has {summary['length_baseline_accuracy']:.3f}"
            + (f"; gold accuracy {summary['gold_accuracy']:.3f}" if summary.get("gold_accuracy") is not None else "")
        )
    else:
        log("reward: the judge is taken as it is; without comparisons (`reward.test`) its accuracy is not known")
    card = model_card(
        f"{recipe.name}: reward model",
        "Scores a conversation at its last token. Subtract `score_mean` of config.json from the output.",
        card_facts(summary, "parameters", "pairs_train", "accuracy", "length_baseline_accuracy", "gold_accuracy"),
    )
    if job.team.is_main:
        save_model(model, tokenizer, directory.model, card)
    return summary


# Comparisons


def _comparisons(
    job: Job,
    settings: RewardSection,
    tokenizer: PreTrainedTokenizerBase,
    start: Start,
    model: PreTrainedModel,
    split: Literal["train", "test"],
) -> list[Pair]:
    """The comparisons to learn from or to measure on, none longer than the recipe and the model's context allow.

    Raises DataError where there is none, unless an existing judge is taken and none were asked for.
    """
    found: list[Pair] = []
    if settings.collect:
        sft = start.causal_lm().to(device())
        found += _collect(job, settings.collect, sft, tokenizer, split)
        if job.team.is_main:
            _save_comparisons(found, job.directory.path / f"comparisons.{split}.jsonl")
    sources = settings.train if split == "train" else settings.test
    if sources:
        dataset = open_data(job.recipe, "reward", sources, "comparisons", "train")
        found += [_tokenised(tokenizer, comparison) for comparison in dataset]
        report_faults(dataset)
    longest = min(settings.max_tokens, context_of(model))
    fit = [pair for pair in found if max(len(pair.chosen_ids), len(pair.rejected_ids)) <= longest]
    if len(fit) < len(found):
        log(f"reward: {len(found) - len(fit)} of {len(found)} {split} pairs are longer than {longest} tokens, left out")
    if not fit and (found or not settings.from_):
        raise DataError(f"reward.{split}: no comparison of at most {longest} tokens")
    return fit


def _collect(
    job: Job,
    settings: CollectSection,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: Literal["train", "test"],
) -> list[Pair]:
    """Samples responses and has every two different ones of a prompt compared by a simulated labeller."""
    seed = derive_seed(job.recipe.seed, "reward", split)
    prompts = shuffled_prompts(split, seed, settings.train_prompts if split == "train" else settings.test_prompts)
    each = settings.responses_per_prompt
    encoded = [(prompt, encode_prompt(tokenizer, [{"role": "user", "content": prompt}])) for prompt in prompts]
    fit = fitting(encoded, lambda prompt: len(prompt[1]), model, settings.sampling.max_tokens, "reward.collect")
    asked = [prompt for prompt, _ in fit for _ in range(each)]
    prompt_ids = [ids for _, ids in fit for _ in range(each)]
    responses = _sampled(job, settings, model, tokenizer, split, prompt_ids, seed)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    labeller = Draw("labeller", seed)
    pairs = []
    for group in range(0, len(asked), each):
        for a, b in itertools.combinations(range(group, group + each), 2):
            if texts[a] == texts[b]:
                continue
            first = prefers_first(asked[a], texts[a], texts[b], labeller)
            better, worse = (a, b) if first else (b, a)
            comparison = Comparison(
                [{"role": "user", "content": asked[a]}],
                texts[better],
                texts[worse],
                gold_reward(asked[a], texts[better]),
                gold_reward(asked[a], texts[worse]),
                "tinyworld",
            )
            pairs.append(Pair(comparison, prompt_ids[better] + responses[better], prompt_ids[worse] + responses[worse]))
    return pairs


def _sampled(
    job: Job,
    settings: CollectSection,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    prompt_ids: list[list[int]],
    seed: int,
) -> list[list[int]]:
    """A response to each of the prompts, as token ids with the end token."""

    def draw(folder: Path) -> dict[str, Any]:
        what = f"reward: sampling {split}"
        responses = sample_responses(job, model, tokenizer, prompt_ids, settings.sampling, seed, what)
        if job.team.is_main:
            write_atomically(folder / "responses.json", json.dumps([response.ids for response in responses]))
        return {"responses": len(responses)}

    kept = once(job, f"responses-{split}", draw)
    found: list[list[int]] = json.loads((kept.path / "responses.json").read_text(encoding="utf-8"))
    return found


def _save_comparisons(pairs: list[Pair], path: Path) -> None:
    """A preference file in the usual format, so that what was compared can be read and used again."""
    with path.open("w", encoding="utf-8") as file:
        for comparison, _, _ in pairs:
            file.write(json.dumps(comparison._asdict(), ensure_ascii=False) + "\n")


def _tokenised(tokenizer: PreTrainedTokenizerBase, comparison: Comparison) -> Pair:
    ids = [
        encode_chat(tokenizer, [*comparison.prompt, {"role": "assistant", "content": response}]).ids
        for response in (comparison.chosen, comparison.rejected)
    ]
    return Pair(comparison, *ids)


def _check_same_tokenizer(directory: str, tokenizer: PreTrainedTokenizerBase, remote_code: bool) -> None:
    other = load_tokenizer(directory, remote_code=remote_code)
    if other.get_vocab() != tokenizer.get_vocab() or other.chat_template != tokenizer.chat_template:
        raise UserError(
            f"reward.from: the judge in {directory} has another tokenizer or chat template than the model that it "
            "is to judge; it must have been made from the same SFT model"
        )


# Training


def _train(
    job: Job, settings: RewardSection, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: list[Pair]
) -> dict[str, Any]:
    """Trains the model in place; returns what the summary says of it."""
    seed = job.recipe.seed
    scale_last_norm(model)
    use_special_tokens(model, tokenizer)
    size, passes = microbatches(job.recipe, "reward", job.team.size)
    steps = max(1, round(settings.epochs * len(train) / settings.pairs_per_step))
    log(
        f"reward: {count_parameters(model):,} parameters; {len(train):,} pairs, {settings.epochs} epochs = {steps} "
        f"steps of {settings.pairs_per_step} pairs ({job.team.size} processes x {passes} microbatches x {size})"
    )
    arguments = RewardConfig(
        **trainer_arguments(
            output=job.directory.path,
            seed=seed,
            stage="reward",
            steps=steps,
            size=size,
            passes=passes,
            learning_rate=settings.learning_rate,
            warmup=settings.warmup,
            weight_decay=settings.weight_decay,
            gradient_clipping=settings.gradient_clipping,
        ),
        max_length=None,
    )
    figures = {
        "loss": "loss",
        "accuracy": "accuracy",
        "margin": "margin",
        "learning_rate": "learning_rate",
        "grad_norm": "gradient_norm",
    }
    lengths = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in train]
    order = training_order(lengths, settings.pairs_per_step, steps, derive_seed(seed, "reward", "order"))
    dataset = Dataset.from_dict(
        {"chosen_ids": [pair.chosen_ids for pair in train], "rejected_ids": [pair.rejected_ids for pair in train]}
    ).select(order)
    trainer = RewardTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    run_trainer(trainer, job, steps, figures, settings.log_every)
    model.eval()
    return {"steps": steps, "pairs_train": len(train)}


def _scored(team: Team, model: PreTrainedModel, pairs: list[Pair]) -> dict[tuple[int, ...], float]:
    """The raw score of every response that is compared, each scored once however often it is."""
    distinct = sorted({tuple(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)})
    scores = team.share(distinct, lambda mine: raw_scores(model, [list(ids) for ids in mine]))
    return dict(zip(distinct, scores, strict=True))


@torch.no_grad()
def _normalise(team: Team, model: PreTrainedModel, train: list[Pair]) -> None:
    """Gives the scores of the compared responses mean 0 and variance 1."""
    scores = list(_scored(team, model, train).values())
    scale = pstdev(scores)
    if scale < 1e-6:
        raise UserError("the reward model gives every response the same score: nothing was learned from the pairs")
    model.score.weight.div_(scale)
    model.config.score_mean = fmean(scores) / scale


# Measuring


def _measure(team: Team, model: PreTrainedModel, test: list[Pair], gold_margin: float) -> dict[str, Any]:
    """Accuracy on held-out comparisons, beside what the length alone would give, and on gold where it is known."""
    mean = score_mean(model)
    score_of = _scored(team, model, test)
    scores = [score_of[tuple(ids)] for pair in test for ids in (pair.chosen_ids, pair.rejected_ids)]
    right = [a > b for a, b in zip(scores[::2], scores[1::2], strict=True)]
    longer = [_longer_wins(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in test]
    found: dict[str, Any] = {
        "pairs_test": len(test),
        **_clustered(test, right).as_keys("accuracy", 4),
        **_clustered(test, longer).as_keys("length_baseline_accuracy", 4),
        **mean_estimate([score - mean for score in scores]).as_keys("score", 4),
    }
    return {**found, **_gold_figures(test, right, gold_margin)}


def _longer_wins(chosen: int, rejected: int) -> float:
    return 0.5 if chosen == rejected else float(chosen > rejected)


def _gold_figures(test: Sequence[Pair], right: Sequence[bool], margin: float) -> dict[str, Any]:
    """How often the model and the labellers prefer what gold prefers, where the truth is known.

    None stands for a share of no pairs: all responses may be worth the same.
    """
    if all(pair.comparison.gold_chosen is None for pair in test):
        return {}
    model_agrees: list[tuple[Pair, bool]] = []
    labels_agree: list[tuple[Pair, bool]] = []
    for pair, is_right in zip(test, right, strict=True):
        if pair.comparison.gold_chosen is None or pair.comparison.gold_rejected is None:
            continue
        difference = pair.comparison.gold_chosen - pair.comparison.gold_rejected
        if abs(difference) > 1e-9:
            labels_agree.append((pair, difference > 0))
        if abs(difference) > 1e-9 and abs(difference) >= margin - 1e-9:
            model_agrees.append((pair, is_right == (difference > 0)))
    return {
        **_share("gold_accuracy", model_agrees),
        "gold_margin": margin,
        "gold_pairs": len(model_agrees),
        **_share("labellers_agree_with_gold", labels_agree),
    }


def _share(name: str, trials: list[tuple[Pair, bool]]) -> dict[str, Any]:
    if not trials:
        return {name: None, f"{name}_ci95": None}
    return dict(_clustered([pair for pair, _ in trials], [right for _, right in trials]).as_keys(name, 4))


def _clustered(pairs: Sequence[Pair], right: Sequence[float]) -> Estimate:
    """The share that is right. Comparisons of one prompt are not independent: the interval is over prompts."""
    groups: dict[str, list[float]] = {}
    for pair, value in zip(pairs, right, strict=True):
        groups.setdefault(json.dumps(pair.comparison.prompt), []).append(float(value))
    if len(groups) == len(pairs):
        return proportion_estimate(sum(right), len(pairs))
    return ratio_estimate([sum(group) for group in groups.values()], [float(len(group)) for group in groups.values()])
