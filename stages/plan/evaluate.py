"""The plan of the stage evaluate."""

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from evaluation.branches import Row, branched_states, read_beginning
from evaluation.fewshot import Reader, encode_questions
from evaluation.scoring import TOKEN_BUDGET, Scorer
from rlhf.footprint import Footprint
from rlhf.likelihood import TokenReader
from rlhf.model import count_parameters
from rlhf.recipe import EvaluateSection, evaluating_judges, evaluating_sampling, upstream
from rlhf.rollout import Drawing
from rlhf.runtime import derive_seed
from rlhf.tokenizer import begin_id, encode_prompt, encode_texts
from stages.evaluate import tasks_of
from stages.evaluate.answering import read_test_prompts
from stages.plan import passes
from stages.plan.base import Beginning, Context, StagePlan, counting, memory_of, read_first, read_if_there
from stages.plan.machine import Work

ANSWERED = 256  # prompts that are answered at a time
LARGEST_BATCHES = 3  # of all tasks


def plan(context: Context) -> StagePlan:
    """What the evaluation will do and need."""
    recipe, machine = context.recipe, context.machine._replace(sharded=False)
    settings = recipe.evaluate
    assert settings is not None
    found = StagePlan("evaluate")
    beginning = context.beginning("evaluate")
    drawing = Drawing(**evaluating_sampling(recipe).model_dump())
    models = len({"base", *(name for name in ("sft", "ppo") if name in upstream(recipe, "evaluate"))})
    longest = _longest_text(context, settings, beginning, found)
    compared = settings.comparisons
    read_if_there(
        found, compared, "the comparisons", lambda: read_first(context, "evaluate", compared, "comparisons", "test")
    )
    with passes.on(machine) as footprint:
        with footprint.role("weights"):
            model = passes.causal_lm(beginning.config, machine)
        found.parameters = count_parameters(model)
        batches = _batches(context, settings, beginning, model)
        if settings.fewshot.tasks and beginning.tokenizer is None:
            found.unchecked.append("the questions of the few-shot tasks: the tokenizer isn't here yet")
        prompts = _prompts(context, beginning, drawing) if settings.prompts else []
        read = sum(batch.tokens for batch in batches)
        read += settings.responses_per_prompt * sum(tokens + drawing.max_tokens for tokens in prompts)
        with counting(found):
            if settings.texts or settings.training:
                passes.read_texts(footprint, model, longest, TOKEN_BUDGET)
            _ask(model, batches, footprint)
            if prompts:
                passes.draw(footprint, model, (prompts * settings.responses_per_prompt)[:ANSWERED], drawing)
            del model
            judges = evaluating_judges(recipe)[1] if settings.prompts or settings.comparisons else ()
            for judge in context.judges(judges, beginning):
                with footprint.role(f"judge {judge.title}: weights"):
                    scorer = passes.scorer(judge.config, machine, judge.heads)
                passes.score(footprint, scorer, longest, ANSWERED)
                del scorer
            found.memory = memory_of(footprint, machine)
    found.tokens = float(models * read)
    found.work = Work(2.0 * found.parameters * found.tokens)
    known = f"; questions and answers of about {read:,} tokens each" if read else ""
    found.lines = [f"{models} models, one after the other{known}"]
    return found


def _longest_text(context: Context, settings: EvaluateSection, beginning: Beginning, found: StagePlan) -> int:
    """Tokens of the longest window of a held-out text."""
    most = min(beginning.context, TOKEN_BUDGET)
    tokenizer = beginning.tokenizer
    if tokenizer is None or not settings.texts:
        return most

    def longest() -> int:
        texts = read_first(context, "evaluate", settings.texts, "texts", "test")
        return max(map(len, encode_texts(tokenizer, texts, control=False)), default=0)

    return min(most, read_if_there(found, settings.texts, "the texts", longest) or most)


def _prompts(context: Context, beginning: Beginning, drawing: Drawing) -> list[int]:
    """Tokens of the prompts that are answered, as far as they are known."""
    most = max(1, min(beginning.context, 2048) - drawing.max_tokens)
    if beginning.tokenizer is None or not beginning.tokenizer.chat_template:
        return [most] * ANSWERED
    return [min(most, len(encode_prompt(beginning.tokenizer, each))) for each in read_test_prompts(context.recipe)]


class Batch(NamedTuple):
    """The largest batch of a task's questions; how many tokens all of them have."""

    shared: list[int]
    rows: list[Row]
    tokens: int

    @property
    def pairs(self) -> int:
        """Positions, and others that they look at: what the memory of a batch grows with."""
        longest = max(len(row.ids) for row in self.rows)
        return len(self.rows) * longest * (len(self.shared) + longest)


def _batches(context: Context, settings: EvaluateSection, beginning: Beginning, model: PreTrainedModel) -> list[Batch]:
    """Of each few-shot task and number of demonstrations."""
    if beginning.tokenizer is None:
        return []
    scorer = Scorer(model)
    reader = Reader(scorer, beginning.tokenizer, beginning.context, [begin_id(beginning.tokenizer)])
    seed = derive_seed(context.recipe.seed, "evaluate", "items")
    batches = []
    for task in tasks_of(context.recipe, settings):
        for shots in settings.fewshot.shots:
            if shots > task.most_shots or task.free:
                continue
            questions = task.questions(shots, settings.fewshot.items, seed)
            requests = [
                each for found in encode_questions(reader, questions, task.format.delimiter) for each in found or ()
            ]
            if requests:
                shared, parts = scorer.batches(requests)
                every = list(parts)  # the longest rows come first
                batches.append(Batch(shared, every[0], sum(len(row.ids) for rows in every for row in rows)))
    return batches


def _ask(model: PreTrainedModel, batches: list[Batch], footprint: Footprint) -> None:
    """The largest batches of all."""
    for shared, rows, _ in sorted(batches, key=lambda batch: -batch.pairs)[:LARGEST_BATCHES]:
        with footprint.phase("questions"), torch.inference_mode():
            reader = TokenReader(model)
            kept = read_beginning(model, reader, shared) if shared else []
            states = branched_states(model, reader, rows, kept)
            places = torch.zeros(sum(len(row.places) for row in rows), dtype=torch.long)
            reader.logprobs(states[places, places], places)
