"""Comparisons made here: responses are drawn to prompts, and a labeller compares every two of a prompt.

What is drawn and what is said of it is kept (`once`), so that an interrupted stage goes on with the same; both also lie
beside the model for others to read: responses.SPLIT.jsonl (which `rlhf label` shows) and comparisons.SPLIT.jsonl.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf.data.rows import Comparison
from rlhf.data.sources import shuffled
from rlhf.errors import DataError, UserError
from rlhf.job import Job
from rlhf.recipe import CollectSection, SamplerSection, Sampling
from rlhf.rollout import cut_at_stop
from rlhf.rundir import write_atomically
from rlhf.runtime import derive_seed, device
from rlhf.saver import once
from rlhf.templates import Messages
from rlhf.tinyworld.dialogues import questions
from rlhf.tinyworld.oracle import gold_reward
from rlhf.tokenizer import encode_prompt
from stages.common import Start, context_of, fitting, named_model, open_data, report_faults, sample_responses
from stages.reward.labellers import Labels, label_all, labelled_by_a_person

Split = Literal["train", "test"]


class Sampled(NamedTuple):
    """A response that was drawn; `ids` are its prompt's and its own, where the reference drew it."""

    prompt: Messages
    text: str
    ids: list[int] | None


class Collected(NamedTuple):
    """What was collected of one split."""

    comparisons: list[Comparison]
    responses: list[Sampled]
    figures: dict[str, Any]


def collect_comparisons(
    job: Job, settings: CollectSection, reference: Start, splits: Sequence[Split]
) -> dict[Split, Collected]:
    """Draws the responses of these splits, and has them compared. All is drawn before anything is compared."""
    prompts = split_prompts(job, settings)
    drawn: dict[Split, list[Sampled]] = {}
    for split in splits:
        drawn[split] = _draw(job, settings, reference, prompts[split], split)
        if job.team.is_main:
            _save_responses(drawn[split], split, job.directory.path / f"responses.{split}.jsonl")
    by_person = labelled_by_a_person(job, splits) if settings.labeller == "person" else None
    found: dict[Split, Collected] = {}
    for split in splits:
        labels = by_person[split] if by_person else label_all(job, settings.labeller, _texts(drawn[split]), split)
        comparisons = [_with_gold(comparison) for comparison in as_rankings(labels.comparisons)]
        if job.team.is_main:
            save_comparisons(comparisons, job.directory.path / f"comparisons.{split}.jsonl")
        found[split] = Collected(comparisons, drawn[split], _figures(labels, drawn[split], split))
    return found


def reference_sampling(settings: CollectSection) -> Sampling | None:
    """How the responses were drawn, where the stage's own model drew them all in one way; None otherwise."""
    ways = {(sampler.model, sampler.temperature or settings.sampling.temperature) for sampler in settings.samplers}
    if len(ways) > 1 or next(iter(ways))[0] != "sft":
        return None
    return settings.sampling.model_copy(update={"temperature": next(iter(ways))[1]})


def as_rankings(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons of a prompt as a ranking of its responses: each weighs one over their number.

    So no prompt counts more than another (InstructGPT, arXiv:2203.02155, equation 1).
    """
    of_prompt = Counter(json.dumps(comparison.prompt) for comparison in comparisons)
    return [c._replace(weight=1 / of_prompt[json.dumps(c.prompt)]) for c in comparisons]


# Prompts


def split_prompts(job: Job, settings: CollectSection) -> dict[Split, list[Messages]]:
    """Different prompts to train on and, others, to measure on.

    The built-in world says itself which of its prompts are held out; of the files' prompts the first `test_prompts`
    are, in an order that depends on the seed alone. Raises DataError where none is left to train on.
    """
    seed = derive_seed(job.recipe.seed, "reward", "prompts")
    files = shuffled(_prompts(job, settings, "files", "train"), seed)
    pools: dict[Split, list[Messages]] = {
        "test": _prompts(job, settings, "builtin", "test") + files[: settings.test_prompts],
        "train": _prompts(job, settings, "builtin", "train") + files[settings.test_prompts :],
    }
    held_out = {json.dumps(prompt) for prompt in pools["test"]}
    pools["train"] = [prompt for prompt in pools["train"] if json.dumps(prompt) not in held_out]
    if not pools["train"]:
        raise DataError(
            f"reward.collect.prompts: there are {len(pools['test'])} different prompts, which are all held out for "
            f"testing (test_prompts: {settings.test_prompts}), so none is left to train on"
        )
    wanted: dict[Split, int] = {"train": settings.train_prompts, "test": settings.test_prompts}
    return {split: shuffled(pool, seed, split)[: wanted[split]] for split, pool in pools.items()}


def _prompts(job: Job, settings: CollectSection, kind: Literal["files", "builtin"], split: Split) -> list[Messages]:
    """The different prompts of the sources of one kind, in their order."""
    sources = tuple(source for source in settings.prompts if (source.builtin is not None) == (kind == "builtin"))
    if not sources:
        return []
    dataset = open_data(job.recipe, "reward", sources, "prompts", split)
    found = {json.dumps(prompt): prompt for prompt in dataset}
    report_faults(dataset)
    return list(found.values())


# Responses


def _draw(job: Job, settings: CollectSection, reference: Start, prompts: list[Messages], split: Split) -> list[Sampled]:
    """The responses to all prompts, those to one prompt together; a prompt's responses go round the samplers."""
    of_prompt: list[list[Sampled]] = [[] for _ in prompts]
    for number, sampler in enumerate(settings.samplers):
        each = len(range(number, settings.responses_per_prompt, len(settings.samplers)))
        if each == 0:
            continue
        for place, response in _drawn_by(job, settings, sampler, reference, prompts, split, number, each):
            of_prompt[place].append(response)
    return [response for responses in of_prompt for response in responses]


def _drawn_by(
    job: Job,
    settings: CollectSection,
    sampler: SamplerSection,
    reference: Start,
    prompts: list[Messages],
    split: Split,
    number: int,
    each: int,
) -> Iterable[tuple[int, Sampled]]:
    """`each` responses of one sampler to every prompt that leaves room for them, with the prompt's place."""
    own = sampler.model == "sft"
    sampling = settings.sampling.model_copy(
        update={"temperature": sampler.temperature or settings.sampling.temperature}
    )
    start = reference if own else named_model(job.recipe, sampler.model)
    key = f"reward.collect.samplers.{number}" if len(settings.samplers) > 1 else "reward.collect"
    rows = draw_once(
        job, start, prompts, each, sampling, f"responses-{split}-{number}", key, (split, f"sampler {number}")
    )
    return ((row.place, Sampled(prompts[row.place], row.text, row.ids if own else None)) for row in rows)


class Drawn(NamedTuple):
    """A response to the prompt at a place of a list; `ids` are the prompt's and the response's."""

    place: int
    text: str
    ids: list[int]


def draw_once(
    job: Job,
    start: Start,
    prompts: Sequence[Messages],
    each: int,
    sampling: Sampling,
    name: str,
    key: str,
    purpose: tuple[str, ...],
    at_most: int | None = None,
) -> list[Drawn]:
    """`each` responses of a model to every prompt, or the first `at_most`, that leaves room for them: drawn once, kept
    as STAGE/`name`. `key` is the recipe's, for messages; the draws depend on `purpose`.
    """

    def draw(folder: Path) -> dict[str, Any]:
        tokenizer = start.tokenizer()
        if not tokenizer.chat_template or tokenizer.pad_token_id is None:
            lacks = "pad token" if tokenizer.chat_template else "chat template"
            raise UserError(f"{key}: {start.name} has no {lacks}, so it can't be asked")
        model = start.causal_lm().to(device())
        encoded = [(place, encode_prompt(tokenizer, prompt)) for place, prompt in enumerate(prompts)]
        fit = fitting(encoded, lambda prompt: len(prompt[1]), context_of(model), sampling.max_tokens, key)
        asked = [prompt for prompt in fit[:at_most] for _ in range(each)]
        seed = derive_seed(job.recipe.seed, "reward", *purpose)
        what = f"reward: sampling {purpose[0]}"
        responses = sample_responses(job, model, tokenizer, [ids for _, ids in asked], sampling, seed, what)
        whole = [tokenizer.decode(response.ids, skip_special_tokens=True) for response in responses]
        texts = [cut_at_stop(text, sampling.stop) for text in whole]
        rows = [
            Drawn(place, text, ids + response.ids)
            for (place, ids), text, response in zip(asked, texts, responses, strict=True)
        ]
        if job.team.is_main:
            write_atomically(folder / "responses.json", json.dumps(rows))
        return {"responses": len(rows)}

    kept = once(job, name, draw)
    return [Drawn(*row) for row in json.loads((kept.path / "responses.json").read_text(encoding="utf-8"))]


def _texts(responses: Sequence[Sampled]) -> list[tuple[Messages, list[str]]]:
    """The different responses to each prompt."""
    groups = itertools.groupby(responses, key=lambda response: json.dumps(response.prompt))
    return [(json.loads(key), list(dict.fromkeys(response.text for response in group))) for key, group in groups]


# What is kept


def _save_responses(responses: Sequence[Sampled], split: Split, path: Path) -> None:
    rows = ({"prompt": prompt, "responses": texts, "split": split} for prompt, texts in _texts(responses))
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def save_comparisons(comparisons: Sequence[Comparison], path: Path) -> None:
    """A preference file in the usual format, so that what was compared can be read and used again."""
    rows = (json.dumps(comparison._asdict(), ensure_ascii=False) + "\n" for comparison in comparisons)
    write_atomically(path, "".join(rows))


def _with_gold(comparison: Comparison) -> Comparison:
    """With the gold rewards, where the prompt is one of the built-in world's."""
    prompt = comparison.prompt[0]["content"]
    if len(comparison.prompt) > 1 or prompt not in questions():
        return comparison
    gold = [gold_reward(prompt, text) for text in (comparison.chosen, comparison.rejected)]
    return comparison._replace(gold_chosen=gold[0], gold_rejected=gold[1])


def _figures(labels: Labels, responses: Sequence[Sampled], split: Split) -> dict[str, Any]:
    found: dict[str, Any] = {f"responses_{split}": len(responses)}
    if labels.digest:
        return found | {"labels_digest": labels.digest}
    return found | {f"ties_{split}": labels.ties, f"unlabelled_{split}": labels.unknown}
