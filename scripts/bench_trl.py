"""Our sft and reward stages beside TRL's plain trainers: same model, data, steps, batch, threads; one after the other.

    scripts/bench_trl sft    --model DIR --train FILE --test FILE [--steps 60] [--batch 8] [--rounds 3]
    scripts/bench_trl reward --model DIR --train FILE --test FILE ...

DIR is a causal LM with a chat template that has generation markers (a run's sft/model), the files are JSON Lines of
`messages` or of `prompt`, `chosen`, `rejected`. Prints the medians of tokens/s or pairs/s (real tokens, all steps), of
the validation loss or accuracy afterwards, and the ratio of ours to theirs.
"""

import argparse
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
LEFT_OUT = 2  # the first steps, in which things are made that later ones use again


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("sft", "reward"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="dialogues or pairs of a step")
    parser.add_argument("--max-tokens", type=int, default=384)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)  # one round of TRL, in this process
    return parser.parse_args()


# Theirs


def trl_round(args: argparse.Namespace) -> dict[str, float]:
    """One plain TRL run: its rate, and the loss or accuracy on the test rows that fit."""
    import time

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    keys = ("messages",) if args.stage == "sft" else ("prompt", "chosen", "rejected")
    train, test = (
        Dataset.from_list([{key: row[key] for key in keys} for row in map(json.loads, path.open(encoding="utf-8"))])
        for path in (args.train, args.test)
    )
    marks: list[tuple[float, int]] = []
    done = 0

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append((time.perf_counter(), done))

    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "per_device_eval_batch_size": args.batch,
        "max_length": args.max_tokens,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 0.05,
        "adam_beta2": 0.95,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 10,
        "report_to": [],
        "disable_tqdm": True,
    }
    trainer: Any
    if args.stage == "sft":
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        config = SFTConfig(**common, packing=False, assistant_only_loss=True, train_sampling_strategy="group_by_length")
        trainer = SFTTrainer(
            model=model, args=config, train_dataset=train, eval_dataset=test, processing_class=tokenizer
        )
    else:
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=torch.float32)
        model.config.pad_token_id = tokenizer.pad_token_id
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(**common),
            train_dataset=train,
            eval_dataset=test,
            processing_class=tokenizer,
        )
    step = trainer.training_step

    def counted(model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        nonlocal done
        done += int(inputs["attention_mask"].sum()) if args.stage == "sft" else len(inputs["input_ids"]) // 2
        return step(model, inputs, *rest, **more)

    trainer.training_step = counted
    trainer.add_callback(Clock())
    trainer.train()
    (start, before), (end, after) = marks[LEFT_OUT - 1], marks[-1]
    figure = _sft_loss(trainer) if args.stage == "sft" else trainer.evaluate()["eval_accuracy"]
    return {"rate": (after - before) / (end - start), "figure": figure}


def _sft_loss(trainer: Any) -> float:
    """Nats per trained token over all rows: TRL's own figure is a mean of batch means."""
    import torch

    total = count = 0.0
    trainer.model.eval()
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            labels = batch["labels"][:, 1:]
            total += float(
                torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
            )
            count += int((labels != -100).sum())
    return total / count


# Ours


def our_round(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One `rlhf run`: its rate, and the loss or accuracy that its summary tells."""
    rows = {"train": [{"path": str(args.train.resolve())}]}
    common = {
        "max_tokens": args.max_tokens,
        "learning_rate": args.learning_rate,
        "log_every": 1,
        "validate_every": 10**6,
    }
    sampling = {"max_tokens": 8}
    recipe: dict[str, Any] = {
        "name": "bench",
        "threads": args.threads,
        "base": str(args.model.resolve()),
        "stages": [args.stage],
        "checkpoints": {"every_minutes": 1000},
    }
    if args.stage == "sft":
        recipe["sft"] = {
            **rows,
            **common,
            "validation": [{"path": str(args.test.resolve())}],
            "steps": args.steps,
            "dialogues_per_step": args.batch,
            "too_long": "truncate",
            "sampling": sampling,
            "sampled_prompts": 2,
        }
    else:
        pairs = sum(1 for _ in args.train.open("rb"))
        recipe["reward"] = {
            **rows,
            **common,
            "test": [{"path": str(args.test.resolve())}],
            "pairs_per_step": args.batch,
            "epochs": args.steps * args.batch / pairs,
            "normalisation_prompts": 2,
            "sampling": sampling,
        }
    file = folder / "bench.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "rlhf", "run", args.stage, "--recipe", str(file), "--runs-dir", str(folder)]
    subprocess.run([*command, "--fresh"], check=True, capture_output=True, cwd=ROOT)
    stage = folder / "bench" / args.stage
    summary = json.loads((stage / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").open(encoding="utf-8")]
    steps = [line for line in lines if "loss" in line]
    seconds = steps[-1]["time"] - steps[LEFT_OUT - 1]["time"]
    work = summary["tokens"] / summary["steps"] if args.stage == "sft" else args.batch
    figure = summary["validation_nats_per_token" if args.stage == "sft" else "accuracy"]
    return {"rate": work * (len(steps) - LEFT_OUT) / seconds, "figure": figure}


def main() -> None:
    args = parse()
    if args.theirs:
        print(json.dumps(trl_round(args)))
        return
    ours, theirs = [], []
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            said = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--theirs"],
                check=True,
                stdout=subprocess.PIPE,
                env=environment,
                cwd=ROOT,
            ).stdout.decode()
            theirs.append(json.loads(said.splitlines()[-1]))
            ours.append(our_round(args, Path(folder)))
            print(f"round {number + 1}: ours {ours[-1]}, theirs {theirs[-1]}", flush=True)
    table = Table("", "ours", "TRL", "ours / TRL")
    rate = [statistics.median(found["rate"] for found in side) for side in (ours, theirs)]
    figure = [statistics.median(found["figure"] for found in side) for side in (ours, theirs)]
    table.add_row(
        "tokens/s" if args.stage == "sft" else "pairs/s", *(f"{x:,.1f}" for x in rate), f"{rate[0] / rate[1]:.3f}"
    )
    what = "validation nats a token" if args.stage == "sft" else "test accuracy"
    table.add_row(what, *(f"{x:.4f}" for x in figure), f"{figure[0] / figure[1]:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
