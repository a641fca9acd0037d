"""Our ppo stage beside TRL's last PPOTrainer (1.12.0): same models, prompts, batch, epochs, minibatches, threads.

    scripts/bench_ppo --peer-python PYTHON --peer trl_ppo_peer.py --policy DIR --reward DIR
    scripts/bench_ppo --peer-python PYTHON --peer trl_ppo_peer.py --random 60 --response 256 --updates 3 --rounds 1
    scripts/bench_ppo --random 500 --shape qwen3 --response 512 --layouts full,shared,adapters --updates 3 --rounds 1

PYTHON has trl 1.12.0 installed. The peer script runs its PPOTrainer: it takes the options that `theirs` gives it,
writes the prompts with the last policy's responses to --samples, and ends with a line of JSON (samples_per_s,
peak_rss_mib, kl_last, score_after). Without them ours is run alone. DIR are a chat model and a reward model with one
tokenizer (a run's sft/model and reward/model). The prompts are those of --prompts (JSON Lines of `prompt`) or the
built-in world's. --random makes models of about so many million parameters with random weights, as both: of Llama's
shape, or of Qwen3's with its vocabulary (the third line above is 0.5 B parameters, for a GPU, which is used in bf16
where there is one).

Prints episodes a second (medians, the first update left out), how the time is divided between drawing, observing
(judge, reference, critic) and learning, peak memory above what the libraries take, on a GPU the allocator's peak, and
where the built-in world knows it, gold reward and KL; seed by seed, ours at TRL's KL, from the course of our
run ("-": it never was so far away).
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = {
    "ours": "import stages.ppo",
    "TRL": "import trl.experimental.ppo.ppo_trainer",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of our recipe")
    parser.add_argument("--peer-python", type=Path, help="of an environment with trl 1.12.0; not given: ours alone")
    parser.add_argument("--peer", type=Path, help="the script that runs its PPOTrainer")
    parser.add_argument("--policy", type=Path, help="a chat model's directory, such as runs/quickstart/sft/model")
    parser.add_argument("--reward", type=Path, help="a reward model's, such as runs/quickstart/reward/model")
    parser.add_argument("--prompts", type=Path, help="JSON Lines of `prompt`; default: the built-in world's")
    parser.add_argument("--eval-prompts", type=Path, help="what both are measured on; default: the last of --prompts")
    parser.add_argument("--evaluated", type=int, default=128, help="of --prompts, so many last ones (default 128)")
    parser.add_argument("--random", type=int, metavar="MILLIONS")
    parser.add_argument("--shape", choices=["llama", "qwen3"], default="llama", help="of --random")
    parser.add_argument("--layouts", default="full,shared", help="of ours (default full,shared)")
    parser.add_argument("--batch", type=int, default=64, help="episodes of an update (default 64)")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--response", type=int, default=48, help="tokens at most (default 48)")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--kl", type=float, default=0.05, help="its coefficient (default 0.05)")
    parser.add_argument("--seed", type=int, default=1, help="of the first round; the next one has the next (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="each with a seed of its own (default 3)")
    return parser.parse_intermixed_args()


def environment(args: argparse.Namespace) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }


def libraries_mib(python: str, statement: str, args: argparse.Namespace) -> float:
    """What a process takes that has only imported the libraries."""
    code = f"{statement}\nprint([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1])"
    command = [python, "-W", "ignore", "-c", code]
    said = subprocess.run(command, check=True, capture_output=True, env=environment(args), text=True).stdout
    return int(said.split()[-1]) / 1024


def theirs(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run of TRL's trainer."""
    samples = folder / "samples.jsonl"
    options = {
        "policy": args.policy,
        "reward": args.reward,
        "prompts": args.prompts,
        "eval-prompts": args.eval_prompts,
        "batch": args.batch,
        "epochs": args.epochs,
        "minibatches": args.minibatches,
        "response": args.response,
        "updates": args.updates,
        "threads": args.threads,
        "lr": args.learning_rate,
        "kl": args.kl,
        "seed": args.seed,
        "eos-penalty": 1,
        "samples": samples,
    }
    words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
    done = subprocess.run(
        [str(args.peer_python), str(args.peer), *words], env=environment(args), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    rows = [json.loads(line) for line in samples.open(encoding="utf-8")]
    return {
        "episodes/s": found["samples_per_s"],
        "peak_mib": found["peak_rss_mib"],
        "kl": found["kl_last"],
        "score": found["score_after"],
        "gold": gold_of([(row["prompt"], row["response"]) for row in rows]),
    }


def gold_of(pairs: list[tuple[str, str]]) -> float | None:
    """The mean gold reward of rendered prompts with their responses, None where one is none of the built-in world's."""
    from rlhf.tinyworld.dialogues import questions
    from rlhf.tinyworld.oracle import gold_reward

    found = []
    for prompt, response in pairs:
        asked = [question for question in questions() if question in prompt]
        if not asked:
            return None
        found.append(gold_reward(max(asked, key=len), response))
    return statistics.fmean(found)


def ours(args: argparse.Namespace, folder: Path, layout: str) -> dict[str, Any]:
    """One run of our stage in a layout."""
    prompts, test = ([{"path": str(path.resolve())}] for path in (args.prompts, args.eval_prompts))
    recipe = {
        "name": "bench",
        "seed": args.seed,
        "threads": args.threads,
        "base": str(args.policy.resolve()),
        "stages": ["reward", "ppo"],
        "checkpoints": {"every_minutes": 1000},
        "reward": {"from": str(args.reward.resolve()), "normalisation_prompts": 32, "sampling": {"max_tokens": 8}},
        "ppo": {
            "prompts": prompts,
            "test_prompts": test,
            "validation_prompts": test,
            "layout": layout,
            "updates": args.updates,
            "episodes_per_update": args.batch,
            "epochs": args.epochs,
            "minibatches": args.minibatches,
            "sampling": {"max_tokens": args.response},
            "learning_rate": args.learning_rate,
            "kl": {"coefficient": args.kl},
            "no_end_penalty": 1.0,
            "validate_every": max(1, args.updates // 8),
            "keep": {"rule": "last"},
            "best_of": 0,
        },
    }
    file = folder / "bench.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "rlhf", "run", "all", "--recipe", str(file), "--runs-dir", str(folder), "--fresh"]
    command += args.overrides
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=environment(args), text=True)
    if done.returncode:
        sys.exit((done.stdout + done.stderr)[-3000:])
    stage = folder / "bench/ppo"
    summary = json.loads((stage / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").open(encoding="utf-8")]
    settled = [line for line in lines if line["update"] > 1]
    seconds = sum(args.batch / line["episodes_per_second"] for line in settled)
    parts = ("drawing", "observing", "learning")
    return {
        "episodes/s": args.batch * len(settled) / seconds,
        "time": " / ".join(f"{sum(line[f'{part}_seconds'] for line in settled) / seconds:.0%}" for part in parts),
        "peak_mib": summary["peak_memory_mib"],
        "peak_gpu_mib": summary.get("peak_gpu_memory_mib"),
        "kl": summary["kl"],
        "score": summary["score_after"],
        "gold": summary.get("gold_after"),
        "course": [(point["kl"], point["gold"]) for point in summary["course"]["ppo"] if point["gold"] is not None],
    }


def gold_at(course: list[tuple[float, float]], kl: float) -> float | None:
    """The gold of our course where its KL first is this one, None where it never is."""
    for (low, before), (high, after) in itertools.pairwise(course):
        if low <= kl <= high and high > low:
            return before + (after - before) * (kl - low) / (high - low)
    return None


def make_models(args: argparse.Namespace, folder: Path) -> None:
    """A policy and a reward model with random weights, and prompts of random tokens' text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf.tinyworld.documents import documents
    from rlhf.tokenizer import prepare_for_chat, token_info, train_bpe

    torch.manual_seed(args.seed)
    tokenizer = train_bpe(itertools.islice(documents("train", 1), 3000), 1024)
    prepare_for_chat(tokenizer, "rlhf")
    config = config_of(args, token_info(tokenizer))
    args.policy, args.reward = folder / "policy", folder / "reward"
    for path, kind, more in (
        (args.policy, AutoModelForCausalLM, {}),
        (args.reward, AutoModelForSequenceClassification, {"num_labels": 1}),
    ):
        for key, value in more.items():
            setattr(config, key, value)
        kind.from_config(config).save_pretrained(path)
        tokenizer.save_pretrained(path)


def config_of(args: argparse.Namespace, tokens: dict[str, Any]) -> Any:
    """A configuration of about --random million parameters."""
    from transformers import LlamaConfig, Qwen3Config

    if args.shape == "llama":
        width, vocabulary = 512, 8192
        a_layer, tables = 16 * width**2, 2 * vocabulary * width
        make, more = LlamaConfig, {"intermediate_size": 4 * width, "num_attention_heads": 8, "num_key_value_heads": 8}
    else:  # Qwen3-0.6B but for its depth
        width, vocabulary, heads, kept, size = 1024, 151936, 16, 8, 128
        a_layer = 2 * width * size * (heads + kept) + 3 * width * 3072
        tables = vocabulary * width
        make, more = Qwen3Config, {"intermediate_size": 3072, "num_attention_heads": heads, "head_dim": size}
        more |= {"num_key_value_heads": kept, "tie_word_embeddings": True}
    return make(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=max(1, round((args.random * 1e6 - tables) / a_layer)),
        max_position_embeddings=1024,
        initializer_range=0.02,
        **more,
        **tokens,
    )


def share_prompts(args: argparse.Namespace, folder: Path) -> None:
    """Gives both sides the same files of prompts, the last `evaluated` of which are only measured on."""
    from rlhf.tinyworld.dialogues import shuffled_prompts

    if args.prompts is None:
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in shuffled_prompts("train", args.seed)]
        lines = [json.dumps(row) for row in rows]
    else:
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
    if args.eval_prompts is None:
        lines, held = lines[: -args.evaluated], lines[-args.evaluated :]
        args.eval_prompts = folder / "eval.jsonl"
        args.eval_prompts.write_text("\n".join(held) + "\n", encoding="utf-8")
    args.prompts = folder / "prompts.jsonl"
    args.prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.random:
            make_models(args, folder)
        share_prompts(args, folder)
        layouts = args.layouts.split(",")
        peer = ["TRL"] if args.peer else []
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in (*peer, *layouts)}
        for _ in range(args.rounds):
            if peer:
                found["TRL"].append(theirs(args, folder))
            for layout in layouts:
                found[layout].append(ours(args, folder, layout))
            told = [told_of(side, rounds[-1]) for side, rounds in found.items()]
            print(f"seed {args.seed}: {'; '.join(told)}", flush=True)
            args.seed += 1
        pythons = {"ours": sys.executable, **({"TRL": str(args.peer_python)} if peer else {})}
        baseline = {side: libraries_mib(python, LIBRARIES[side], args) for side, python in pythons.items()}
    show(found, baseline)


def told_of(side: str, ran: dict[str, Any]) -> str:
    """A round's figures, on one line."""
    gold = "" if ran["gold"] is None else f", gold {ran['gold']:.3f} at KL {ran['kl']:.2f}"
    return f"{side} {ran['episodes/s']:.1f} episodes/s{gold}"


def show(found: dict[str, list[dict[str, Any]]], baseline: dict[str, float]) -> None:
    """Prints the table."""
    first = next(iter(found))
    table = Table(
        "",
        "episodes/s",
        f"of {first}'s",
        "draw / observe / learn",
        "peak MiB above libraries",
        f"of {first}'s",
        "peak MiB of the GPU",
        "score",
        "KL",
        "gold",
        "gold at TRL's KL",
    )

    def middle(side: str, key: str) -> float | None:
        values = [each.get(key) for each in found.get(side, [])]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None

    def shown(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    reference: dict[str, float] = {}
    for side in found:
        rate = middle(side, "episodes/s") or 0.0
        memory = (middle(side, "peak_mib") or 0.0) - baseline["TRL" if side == "TRL" else "ours"]
        reference.setdefault("rate", rate), reference.setdefault("memory", memory)
        at = "-"
        if "TRL" in found and side != "TRL":
            both = zip(found[side], found["TRL"], strict=True)
            at = ", ".join(shown(gold_at(mine["course"], their["kl"])) for mine, their in both)
        table.add_row(
            side,
            shown(rate, 1),
            shown(rate / reference["rate"], 2),
            found[side][0].get("time", "-"),
            shown(memory, 0),
            shown(memory / reference["memory"], 2),
            shown(middle(side, "peak_gpu_mib"), 0),
            shown(middle(side, "score")),
            shown(middle(side, "kl")),
            shown(middle(side, "gold")),
            at,
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
