"""The plan of the stage evaluate."""

from itertools import islice

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
from stages.common import open_data
from stages.evaluate import tasks_of
from stages.evaluate.answering import read_test_prompts
from stages.plan import passes
from stages.plan.base import Beginning, Context, StagePlan, first_rows, memory_of, read_if_there
from stages.plan.machine import Work

TEXTS_READ = 50  # of each source, to know how long they are
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
    with passes.on(machine) as footprint:
        with footprint.role("weights"):
            model = passes.causal_lm(beginning.config, machine)
        found.parameters = count_parameters(model)
        if settings.texts or settings.training:
            passes.read_texts(footprint, model, longest, TOKEN_BUDGET)
        read = _ask(context, settings, beginning, model, footprint)
        if settings.fewshot.tasks and beginning.tokenizer is None:
            found.unchecked.append("the questions of the few-shot tasks: the tokenizer isn't here yet")
        if settings.prompts:
            prompts = _prompts(context, beginning, drawing)
            passes.draw(footprint, model, (prompts * settings.responses_per_prompt)[:ANSWERED], drawing)
            read += settings.responses_per_prompt * sum(tokens + drawing.max_tokens for tokens in prompts)
        del model
        if (settings.prompts or settings.comparisons) and evaluating_judges(recipe)[1]:
            with footprint.role("a judge's weights"):
                judge = passes.scorer(beginning.config, machine)
            passes.score(footprint, judge, longest, ANSWERED)
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
        texts = open_data(context.recipe, "evaluate", first_rows(settings.texts, TEXTS_READ), "texts", "test")
        return max(map(len, encode_texts(tokenizer, list(texts), control=False)))

    return min(most, read_if_there(found, settings.texts, "the texts", longest) or most)


def _prompts(context: Context, beginning: Beginning, drawing: Drawing) -> list[int]:
    """Tokens of the prompts that are answered, as far as they are known."""
    most = max(1, min(beginning.context, 2048) - drawing.max_tokens)
    if beginning.tokenizer is None or not beginning.tokenizer.chat_template:
        return [most] * ANSWERED
    return [min(most, len(encode_prompt(beginning.tokenizer, each))) for each in read_test_prompts(context.recipe)]


def _ask(
    context: Context,
    settings: EvaluateSection,
    beginning: Beginning,
    model: PreTrainedModel,
    footprint: Footprint,
) -> int:
    """The largest batches of the few-shot tasks' questions; how many tokens all of them have."""
    if beginning.tokenizer is None:
        return 0
    scorer = Scorer(model)
    reader = Reader(scorer, beginning.tokenizer, beginning.context, [begin_id(beginning.tokenizer)])
    seed, tokens = derive_seed(context.recipe.seed, "evaluate", "items"), 0
    batches: list[tuple[list[int], list[Row]]] = []
    for task in tasks_of(context.recipe, settings):
        for shots in settings.fewshot.shots:
            if shots > task.most_shots or task.free:
                continue
            questions = task.questions(shots, settings.fewshot.items, seed)
            requests = [
                each for found in encode_questions(reader, questions, task.format.delimiter) for each in found or ()
            ]
            if requests:
                shared, rows = scorer.batches(requests)
                batches += [(shared, batch) for batch in islice(rows, 1)]  # the longest rows come first
                tokens += sum(len(row.ids) for batch in rows for row in batch)
    for shared, batch in sorted(batches, key=lambda each: -_pairs(*each))[:LARGEST_BATCHES]:
        with footprint.phase("questions"), torch.inference_mode():
            states_reader = TokenReader(model)
            kept = read_beginning(model, states_reader, shared) if shared else []
            states = branched_states(model, states_reader, batch, kept)
            places = torch.zeros(sum(len(row.places) for row in batch), dtype=torch.long)
            states_reader.logprobs(states[places, places], places)
    return tokens


def _pairs(shared: list[int], batch: list[Row]) -> int:
    """Positions, and others that they look at: what the memory of a batch grows with."""
    longest = max(len(row.ids) for row in batch)
    return len(batch) * longest * (len(shared) + longest)
