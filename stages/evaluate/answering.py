"""The models answer the same prompts: how they behave, what a judge says of it, which model it prefers."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation import preference
from evaluation.responses import Response, behaviour, win_rate
from rlhf.data.rows import Comparison
from rlhf.judge import Conversation, Judge
from rlhf.model import end_ids
from rlhf.recipe import Recipe, Sampling, evaluating_judges, evaluating_sampling
from rlhf.rollout import Drawing, build_engine, cut_at_stop, uniforms
from rlhf.rundir import RunDir, write_atomically
from rlhf.runtime import Bar, derive_seed, device, log
from rlhf.team import Team
from rlhf.tokenizer import Messages, begin_id, encode_prompt, encode_texts
from stages.common import context_of, open_data, report_faults
from stages.gold import gold_rewards
from stages.judges import build_judge

Answers = list[list[Response]]  # of each prompt; none for one that doesn't fit the model's context
RESPONSES = "responses.jsonl"
SCORED_AT_ONCE = 512


def read_test_prompts(recipe: Recipe) -> list[Messages]:
    """The prompts that all models answer."""
    assert recipe.evaluate is not None
    if not recipe.evaluate.prompts:
        return []
    dataset = open_data(recipe, "evaluate", recipe.evaluate.prompts, "prompts", "test")
    found = list(dataset)
    report_faults(dataset)
    return found


def draw_answers(
    recipe: Recipe,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    team: Team,
) -> Answers:
    """So many responses to each prompt; those of a place have the same random numbers for every model.

    A model without a chat template reads the messages' texts, a line each.
    """
    assert recipe.evaluate is not None
    sampling, times = evaluating_sampling(recipe), recipe.evaluate.responses_per_prompt
    if not tokenizer.chat_template:
        log(f"evaluate: {name} has no chat template: it reads the prompts as plain text")
    encode = encode_prompt if tokenizer.chat_template else _encode_plainly
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    asked = [place for place, each in enumerate(ids) if len(each) + sampling.max_tokens <= context_of(model)]
    if len(asked) < len(ids):
        left_out = len(ids) - len(asked)
        log(f"evaluate: {name}: {left_out} of {len(ids)} prompts leave no room for a response in its context")
    rows = [(place, time) for place in asked for time in range(times)]
    seed = derive_seed(recipe.seed, "evaluate", "responses")
    with Bar(f"evaluate {name}: responses", len(rows)) as bar:
        engine = build_engine(
            model,
            tokenizer,
            Drawing(**sampling.model_dump()),
            end_ids=end_ids(model, tokenizer),
            progress=lambda done: bar.show(min(done * team.size, len(rows))),
        )

        def generate(mine: list[tuple[int, int]]) -> list[Response]:
            draws = uniforms(seed, 0, [place * times + time for place, time in mine], sampling.max_tokens)
            found = engine.generate([ids[place] for place, _ in mine], draws)
            return [Response(_text(tokenizer, each.ids, sampling), len(each.ids), each.ended) for each in found]

        drawn = team.share(rows, generate)
    answers: Answers = [[] for _ in prompts]
    for (place, _), response in zip(rows, drawn, strict=True):
        answers[place].append(response)
    return answers


def _encode_plainly(tokenizer: PreTrainedTokenizerBase, prompt: Messages) -> list[int]:
    text = "".join(f"{message['content']}\n" for message in prompt)
    return [begin_id(tokenizer), *encode_texts(tokenizer, [text])[0]]


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], sampling: Sampling) -> str:
    return cut_at_stop(tokenizer.decode(ids, skip_special_tokens=True), sampling.stop)


# What is said of them


def scored(
    prompts: Sequence[Messages], answers: Mapping[str, Answers], judge: Judge | None, team: Team
) -> dict[str, Answers]:
    """The answers with the judge's score of each, and with the gold reward where the built-in world knows it.

    A response that several models gave is scored once: rounding, which depends on what is read beside it, would else
    make one of them win.
    """
    places = {
        (place, response.text): prompt
        for given in answers.values()
        for place, (prompt, responses) in enumerate(zip(prompts, given, strict=True))
        for response in responses
    }
    asked = [(prompt, text) for (_, text), prompt in places.items()]
    scores: Sequence[float | None] = [None] * len(asked)
    if judge:
        scores = _scores(judge, asked, team, "evaluate: scores")
    gold = gold_rewards([prompt for prompt, _ in asked], [text for _, text in asked])
    known = dict(zip(places, zip(scores, gold, strict=True), strict=True))

    def told(place: int, response: Response) -> Response:
        score, worth = known[place, response.text]
        return response._replace(score=score, gold=worth)

    return {
        name: [[told(place, response) for response in responses] for place, responses in enumerate(given)]
        for name, given in answers.items()
    }


def figures_of(answers: Mapping[str, Answers]) -> dict[str, dict[str, Any]]:
    """How each model behaves; nothing for one that has answered nothing."""
    return {name: behaviour(given) for name, given in answers.items() if any(given)}


def win_rates(answers: Mapping[str, Answers], seed: int) -> dict[str, Any]:
    """Each model against the one before it."""
    return {
        f"{later} over {earlier}": win_rate(answers[later], answers[earlier], seed)
        for earlier, later in pairwise(answers)
        if any(one and other for one, other in zip(answers[later], answers[earlier], strict=True))
    }


def write_responses(path: Path, prompts: Sequence[Messages], answers: Mapping[str, Answers]) -> None:
    """A JSON line for every prompt, with each model's first response: what people read side by side."""
    lines = []
    for place, prompt in enumerate(prompts):
        first = {name: given[place][0] for name, given in answers.items() if given[place]}
        responses = {
            name: {key: value for key, value in response._asdict().items() if value is not None}
            for name, response in first.items()
        }
        lines.append(json.dumps({"prompt": prompt, "responses": responses}, ensure_ascii=False))
    write_atomically(path, "".join(f"{line}\n" for line in lines))


# Judges


def open_judge(recipe: Recipe, run: RunDir | None) -> Judge | None:
    """What the recipe's judges say together, of texts; None where it has none."""
    key, sections = evaluating_judges(recipe)
    return build_judge(recipe, run, None, 0, device(), sections, "evaluate: score", key=key) if sections else None


def judge_accuracies(recipe: Recipe, run: RunDir | None, team: Team) -> dict[str, Any]:
    """How often each judge prefers what the comparisons prefer, overall and by source, beside the length's accuracy.

    Length is in characters.
    """
    assert recipe.evaluate is not None
    dataset = open_data(recipe, "evaluate", recipe.evaluate.comparisons, "comparisons", "test")
    comparisons: list[Comparison] = list(dataset)
    report_faults(dataset)
    key, sections = evaluating_judges(recipe)
    found = {}
    for section in sections:
        judge = build_judge(recipe, run, None, 0, device(), (section,), f"evaluate: judge {section.title}", key=key)
        found[section.title] = preference.accuracies(_outcomes(judge, comparisons, team))
    return found


def _outcomes(judge: Judge, comparisons: Sequence[Comparison], team: Team) -> list[preference.Outcome]:
    asked = [(c.prompt, text) for c in comparisons for text in (c.chosen, c.rejected)]
    scores = _scores(judge, asked, team, "evaluate: comparisons")
    answers = iter(preference.Answer(text, len(text), (score,)) for (_, text), score in zip(asked, scores, strict=True))
    return [
        preference.Outcome("\n".join(turn["content"] for turn in c.prompt), c.source, next(answers), next(answers))
        for c in comparisons
    ]


def _scores(judge: Judge, asked: Sequence[tuple[Messages, str]], team: Team, what: str) -> list[float]:
    """The judge's score of each response to its prompt; all processes share the work."""

    def read(mine: list[tuple[Messages, str]]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(mine), SCORED_AT_ONCE):
            part = [Conversation(prompt, text, []) for prompt, text in mine[start : start + SCORED_AT_ONCE]]
            found += judge.scores(part).values
            bar.show(min(len(found) * team.size, len(asked)))
        return found

    with Bar(what, len(asked)) as bar, torch.inference_mode():
        return team.share(asked, read)
