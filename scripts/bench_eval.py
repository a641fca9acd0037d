"""Our evaluation beside lm-evaluation-harness: the same models, texts and tasks. Are the numbers equal, who is faster?

    scripts/bench_eval --peer-python PYTHON --peer lm_eval_peer.py --tasks FOLDER [--texts FILE] MODEL_DIR ...

PYTHON has lm-eval 0.4.13 installed; the peer script runs it on a folder of tasks (`fewshot`) or a file of texts
(`perplexity`) and writes a line for every question or document to --items. Both sides read a model once, with as many
threads; the seconds are those of writing prompts, encoding and scoring.

Prints for every model and number of demonstrations the largest difference of a choice's log-likelihood (nats), how many
answers differ (acc, acc_norm, acc_bytes), items a second of both; for texts the largest relative difference of a
document's log-likelihood.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--peer-python", type=Path, required=True, help="of an environment with lm-eval")
    parser.add_argument("--peer", type=Path, required=True, help="the script that runs it")
    parser.add_argument("--tasks", type=Path, help="a folder of TASK.test.jsonl and TASK.train.jsonl")
    parser.add_argument("--only", default="", help="names of some of them, with commas between")
    parser.add_argument("--texts", type=Path, help="JSON Lines of `text`")
    parser.add_argument("--shots", default="0,8", help="numbers of demonstrations (default 0,8)")
    parser.add_argument("--limit", type=int, default=100, help="items of a task, documents of a file (default 100)")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def environment(threads: int) -> dict[str, str]:
    more = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **more, "PYTHONPATH": str(ROOT)}


def theirs(args: argparse.Namespace, kind: str, model: Path, data: Path, more: list[str]) -> tuple[list[Any], float]:
    """The peer's lines, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as name:
        items = Path(name) / "items.jsonl"
        options = ["--model", model, "--data", data, "--limit", args.limit, "--threads", args.threads, "--items", items]
        done = subprocess.run(
            [str(args.peer_python), str(args.peer), kind, *map(str, options), *more],
            env=environment(args.threads),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        seconds = json.loads(done.stdout.splitlines()[-1])["wall_s"]
        return [json.loads(line) for line in items.open(encoding="utf-8")], seconds


def ours(args: argparse.Namespace, kind: str, model: Path, data: Path, more: list[str]) -> tuple[list[Any], float]:
    """Our lines, from a process of its own, and the seconds that it took."""
    options = [kind, str(model), str(data), str(args.limit), *more]
    code = "import sys; from scripts.bench_eval import measure; measure(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *options], env=environment(args.threads), capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    return found["items"], found["seconds"]


def measure(kind: str, model_dir: str, data: str, limit: str, shots: str = "0", names: str = "") -> None:
    """Our side of one measurement: prints lines like the peer's."""
    import time

    from evaluation import fewshot, tasks
    from evaluation.perplexity import score_documents
    from evaluation.scoring import Scorer
    from rlhf.data.reader import Faults, read_rows
    from rlhf.model import load_causal_lm
    from rlhf.runtime import quiet_libraries
    from rlhf.tokenizer import load_tokenizer

    with quiet_libraries():
        model, tokenizer = load_causal_lm(model_dir).eval(), load_tokenizer(Path(model_dir))
    context = int(model.config.max_position_embeddings)
    found: list[dict[str, Any]] = []
    if kind == "perplexity":
        texts = [row.value["text"] for row in read_rows(Path(data), Faults())][: int(limit)]
        began = time.monotonic()
        scores = score_documents(Scorer(model), tokenizer, texts, context=context, control=True)
        found = [{"index": place, "loglikelihood": -score.nats} for place, score in enumerate(scores)]
    else:
        known = [task for task in tasks.file_tasks(Path(data), Faults()) if task.name in names.split(",")]
        began = time.monotonic()
        reader = fewshot.Reader(Scorer(model), tokenizer, context, [], control=True)
        for task in known:
            outcomes = fewshot.answer_by_likelihood(reader, task.format, task.questions(int(shots), int(limit), 0))
            found += [
                {
                    "task": task.name,
                    "index": outcome.question.item,
                    "loglikelihoods": outcome.logprobs,
                    "right": dict(outcome.right),
                }
                for outcome in outcomes
                if outcome
            ]
    print(json.dumps({"seconds": time.monotonic() - began, "items": found}))


def name_of(model: Path) -> str:
    """A directory's name; that of the stage for a run's model."""
    return model.parent.name if model.name == "model" else model.name


def names_of(args: argparse.Namespace, shots: int) -> list[str]:
    """The multiple-choice tasks with so many demonstrations."""
    from evaluation.tasks import file_tasks
    from rlhf.data.reader import Faults

    wanted = args.only.split(",") if args.only else None
    return [
        task.name
        for task in file_tasks(args.tasks, Faults())
        if not task.free and task.most_shots >= shots and (wanted is None or task.name in wanted)
    ]


def main() -> None:
    args = parse()
    table = Table(
        "model", "shots", "questions", "left out", "largest difference", "answers differ", "ours/s", "peer/s", ""
    )
    for model in args.models:
        for shots in map(int, args.shots.split(",")) if args.tasks else ():
            names = ",".join(names_of(args, shots))
            peer, their_seconds = theirs(args, "fewshot", model, args.tasks, ["--tasks", names, "--shots", str(shots)])
            mine, our_seconds = ours(args, "fewshot", model, args.tasks, [str(shots), names])
            by_place = {(item["task"], item["index"]): item for item in mine}
            whole = [item for item in peer if not item["truncated"]]
            both = [(item, by_place[item["task"], item["index"]]) for item in whole]
            if not both:
                table.add_row(name_of(model), str(shots), "0", str(len(peer)), "none fits the context")
                continue
            off = max(
                abs(a - b) for t, o in both for a, b in zip(t["loglikelihoods"], o["loglikelihoods"], strict=True)
            )
            keys = (("pred", "acc"), ("pred_norm", "acc_norm"), ("pred_bytes", "acc_bytes"))
            differ = sum((t[key] == t["answer"]) != o["right"][metric] for t, o in both for key, metric in keys)
            rates = len(mine) / our_seconds, len(peer) / their_seconds
            row = [str(shots), str(len(both)), str(len(peer) - len(whole)), f"{off:.2g} nats", str(differ)]
            table.add_row(name_of(model), *row, *(f"{rate:.1f}" for rate in rates), f"{rates[0] / rates[1]:.1f} x")
        if args.texts:
            peer, their_seconds = theirs(args, "perplexity", model, args.texts, [])
            mine, our_seconds = ours(args, "perplexity", model, args.texts, [])
            pairs = [(t["loglikelihood"], o["loglikelihood"]) for t, o in zip(peer, mine, strict=True)]
            off = max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)
            rates = len(mine) / our_seconds, len(peer) / their_seconds
            row = ["texts", str(len(pairs)), "0", f"{off:.2g} of it", "-"]
            table.add_row(name_of(model), *row, *(f"{rate:.1f}" for rate in rates), f"{rates[0] / rates[1]:.1f} x")
        Console(width=160).print(table)


if __name__ == "__main__":
    main()
