"""Our rollout engine beside transformers' generate: same model, prompts, batch size and threads, in alternating rounds.

    scripts/bench_rollout --model DIR [--prompts FILE] [--batch 16] [--limit 64] [--new 48] [--threads 2] [--rounds 5]
    scripts/bench_rollout --random 60 [--end-share 0.02] ...

DIR is a chat model (a run's sft/model). FILE is JSON Lines of `prompt`, a text that is already rendered or messages;
without it the prompts are the built-in world's. --random makes a Llama of about so many million parameters with random
weights, and prompts of 8 to 48 random tokens; the share --end-share of its tokens end a response, so about that is the
probability with which each token does. Theirs samples from the whole distribution in batches in the order of the
prompts, padded on the left, and returns no log-probabilities; ours returns them.

Prints the medians of the response tokens a second (the end token counts, padding does not), and checks ours on the
first prompts: whether transformers' generate gives the same responses when it is handed the same draws, and how far the
log-probabilities are from those of one plain pass over each response.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import GenerationConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.model import build_causal_lm, end_ids, load_causal_lm
from rlhf.rollout import Drawing, Engine, EngineKind, Response, build_engine, uniforms
from rlhf.tinyworld.dialogues import shuffled_prompts
from rlhf.tokenizer import encode_prompt, load_tokenizer, train_bpe

SEED = 7
CHECKED = 8  # prompts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path)
    model.add_argument("--random", type=int, metavar="MILLIONS")
    parser.add_argument("--end-share", type=float, default=0.02)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--limit", type=int, default=64, help="prompts of a round")
    parser.add_argument("--batch", type=int, default=16, help="responses that are drawn at a time")
    parser.add_argument("--new", type=int, default=48, help="tokens of the longest response")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also append the result to this file")
    return parser.parse_args()


# What both sides are given


class Case(NamedTuple):
    """A model, prompts of token ids, and the ids that end a response."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    ends: list[int]
    pad: int


def trained_case(args: argparse.Namespace) -> Case:
    """The model of --model."""
    model, tokenizer = load_causal_lm(args.model), load_tokenizer(args.model)
    rows: Sequence[Any]
    if args.prompts:
        rows = [json.loads(line)["prompt"] for line in args.prompts.open(encoding="utf-8") if line.strip()]
    else:
        rows = [[{"role": "user", "content": text}] for text in shuffled_prompts("train", 0, args.limit)]
    prompts = [
        tokenizer(row, add_special_tokens=False)["input_ids"] if isinstance(row, str) else encode_prompt(tokenizer, row)
        for row in rows
    ]
    room = model.config.max_position_embeddings - args.new
    prompts = [ids for ids in prompts if 0 < len(ids) <= room][: args.limit]
    return Case(model, tokenizer, prompts, end_ids(model, tokenizer), tokenizer.pad_token_id)


def random_case(args: argparse.Namespace) -> Case:
    """The model of --random: a narrow one with few tokens, or a wide one with many, with as many layers as it takes."""
    torch.manual_seed(0)
    vocabulary, width, mlp = (1024, 128, 352) if args.random < 20 else (32000, 512, 1408)
    layers = max(1, round((args.random * 1e6 - vocabulary * width) / (4 * width * width + 3 * width * mlp)))
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 if width > 256 else width // 32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    random = np.random.default_rng(SEED)
    prompts = [random.integers(1, vocabulary, random.integers(8, 49)).tolist() for _ in range(args.limit)]
    ends = list(range(1, 1 + round(vocabulary * args.end_share)))
    return Case(build_causal_lm(config), train_bpe([], 264), prompts, ends, 0)


# The two sides


@torch.no_grad()
def their_responses(case: Case, batch_size: int, max_tokens: int) -> list[list[int]]:
    """transformers' generate on one batch after the other."""
    config = GenerationConfig(
        max_new_tokens=max_tokens,
        pad_token_id=case.pad,
        eos_token_id=case.ends,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    found: list[list[int]] = []
    final = set(case.ends)
    for start in range(0, len(case.prompts), batch_size):
        batch = case.prompts[start : start + batch_size]
        longest = max(map(len, batch))
        ids = torch.tensor([[case.pad] * (longest - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
        whole = case.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for row in whole[:, longest:].tolist():
            end = next((place for place, token in enumerate(row) if token in final), len(row) - 1)
            found.append(row[: end + 1])
    return found


def our_engine(case: Case, args: argparse.Namespace, kind: EngineKind = "cache") -> Engine:
    """One of our engines."""
    drawing = Drawing(args.new)
    return build_engine(case.model, case.tokenizer, drawing, end_ids=case.ends, kind=kind, batch_size=args.batch)


class Round(NamedTuple):
    """How one round went."""

    tokens_per_second: float
    tokens_per_cpu_second: float  # of all threads: says more where other programs use the machine
    tokens_per_response: float


def timed(respond: Callable[[], Sequence[Sequence[int]]]) -> Round:
    started, started_cpu = time.perf_counter(), time.process_time()
    responses = respond()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    tokens = sum(map(len, responses))
    return Round(tokens / seconds, tokens / cpu_seconds, tokens / len(responses))


def rounds(case: Case, args: argparse.Namespace) -> tuple[list[Round], list[Round]]:
    """Ours and theirs, in turns, after a batch of each that does not count."""
    engine = our_engine(case, args)

    def round_of(case: Case, number: int) -> tuple[Round, Round]:
        draws = uniforms(SEED, number, range(len(case.prompts)), args.new)
        theirs = timed(lambda: their_responses(case, args.batch, args.new))
        return timed(lambda: [each.ids for each in engine.generate(case.prompts, draws)]), theirs

    torch.manual_seed(SEED)
    round_of(case._replace(prompts=case.prompts[: args.batch]), 0)
    ours, theirs = zip(*(round_of(case, number) for number in range(args.rounds)), strict=True)
    return list(ours), list(theirs)


# The checks


@torch.no_grad()
def furthest(case: Case, responses: list[Response]) -> float:
    """The largest distance, in nats, of a log-probability from that of a plain pass over its response."""
    worst = 0.0
    for prompt, response in zip(case.prompts, responses, strict=True):
        logits = case.model(torch.tensor([prompt + response.ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(-1).gather(1, torch.tensor(response.ids)[:, None])[:, 0]
        worst = max(worst, float((expected - torch.tensor(response.logprobs)).abs().max()))
    return worst


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    case = trained_case(args) if args.model else random_case(args)
    case.model.eval()
    ours, theirs = rounds(case, args)
    checked = case._replace(prompts=case.prompts[:CHECKED])
    draws = uniforms(SEED, 0, range(len(checked.prompts)), args.new)
    kinds: tuple[EngineKind, ...] = ("cache", "generate")
    responses, same = (our_engine(case, args, kind).generate(checked.prompts, draws) for kind in kinds)
    equal = sum(a.ids == b.ids for a, b in zip(responses, same, strict=True))
    off = furthest(checked, responses)

    table = Table("", "ours", "generate", "ours / generate")
    medians = [Round(*map(statistics.median, zip(*side, strict=True))) for side in (ours, theirs)]
    for name, mine, other in zip(Round._fields, *medians, strict=True):
        table.add_row(name.replace("_", " "), f"{mine:,.1f}", f"{other:,.1f}", f"{mine / other:.2f}")
    console = Console(soft_wrap=True)
    console.print(
        f"{case.model.num_parameters() / 1e6:.1f} M parameters, {len(case.prompts)} prompts, {args.batch} at a time, "
        f"at most {args.new} tokens, threads: {args.threads}, medians of {args.rounds} rounds"
    )
    console.print(table)
    console.print(f"the same responses from generate with the same draws: {equal} of {len(responses)}")
    console.print(f"log-probabilities at most {off:.1e} nats from those of a plain pass")
    if args.json:
        result = {"ours": ours, "generate": theirs, "equal": equal, "furthest": off}
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"args": {key: str(value) for key, value in vars(args).items()}, **result}) + "\n")


if __name__ == "__main__":
    main()
