"""A run's directory made by hand: every file that a report reads, with numbers that are known and texts that attack."""

import json
from pathlib import Path
from typing import Any

ATTACK = (
    '<script>window.hacked=1</script><img src=x onerror="window.hacked=1"> $\\frac{a}{b}$ 你好 \u202egnp.exe \x1b[31m'
)
TASK = 'rules_<b>bold</b>_$x^2$ & "more"'
MODELS = ("base", "sft", "ppo")


def ci(name: str, value: float, half: float) -> dict[str, Any]:
    return {name: value, f"{name}_ci95": [round(value - half, 4), round(value + half, 4)]}


def spent(stage: str, seconds: float) -> dict[str, Any]:
    return {
        "stage": stage, "seconds": seconds, "cpu_seconds": seconds * 1.5, "started": "2026-01-02T03:04:05+00:00",
        "device": "cpu", "processes": 1, "threads": 2, "peak_memory_mib": 500.5, "parameters": 787840,
    }  # fmt: skip


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=True), encoding="utf-8")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write(path, "".join(json.dumps(line) + "\n" for line in lines))


def accuracy(model: int, count: int) -> dict[str, Any]:
    value = min(1.0, 0.2 + 0.09 * count + 0.013 * model)
    return {**ci("accuracy", round(value, 4), 0.05), "chance": 0.2, "metric": "acc", "version": 1, "items": 200,
            "too_long": 0,
            **({"copy_baseline": 0.0625, "overlap": 0.25, "accuracy_clean": 0.7654} if count else {})}  # fmt: skip


def verbatim(share: float, documents: int = 100) -> dict[str, Any]:
    return {"documents": documents, **ci("verbatim", share, 0.04), "matched": 12.5}


def model(place: int, tasks: list[str]) -> dict[str, Any]:
    return {
        **ci("nats_per_token", 0.6552 + 0.3 * place, 0.02),
        "perplexity": 1.9255 + place,
        **ci("bits_per_byte", 0.2975 + 0.1 * place, 0.01),
        "fewshot": {
            task: {
                **{str(count): accuracy(place, count) for count in (0, 1, 8)},
                "16": {"not_available": "8 demonstrations"},
            }
            for task in tasks
        },
        "behaviour": {
            "responses": 64, **ci("ended", 0.984, 0.02), **ci("tokens", 16.75, 1.5), "tokens_median": 16.0,
            **ci("repetition", 0.021, 0.01), "distinct_1": 0.51, "distinct_2": 0.82, "distinct_3": 0.91,
            **ci("score", 0.25 * place, 0.1), **ci("gold", 0.31 + 0.2 * place, 0.05),
        },
        "memorisation": {
            "training": verbatim(0.12), "held_out": verbatim(0.01),
            "by_copies": {"1": verbatim(0.02), "50+": verbatim(0.9512, 20)},
            "memorised": [{"text": f"The secret is 4711. {ATTACK}", "copies": 50, "tokens": 32}],
        },
        "harness": {"arc_easy": {"acc": 0.2625, "acc_stderr": 0.0125}},
    }  # fmt: skip


def differences(tasks: list[str]) -> dict[str, Any]:
    return {
        "sft - base": {
            task: {"0": ci("difference", 0.0, 0.045), "8": ci("difference", -0.0731, 0.03)} for task in tasks
        },
        "ppo - sft": {task: {"0": ci("difference", 0.0, 0.035), "8": ci("difference", 0.0525, 0.02)} for task in tasks},
    }


def evaluation(tasks: list[str]) -> dict[str, Any]:
    overlap = {"items": 200, "too_short": 3, **ci("overlap", 0.4321, 0.05), "contaminated": True, "example": ATTACK}
    clean = {"items": 200, "too_short": 0, **ci("overlap", 0.0, 0.0), "contaminated": False}
    return {
        **spent("evaluate", 13.2),
        "models": {name: model(place, tasks) for place, name in enumerate(MODELS)},
        "differences": differences(tasks),
        "changes": {"ppo - sft": {**ci("bits_per_byte", 0.0107, 0.004), **ci("ended", 0.0, 0.02)}},
        "win_rates": {
            "ppo over sft": {
                "prompts": 64, **ci("win_rate", 0.8125, 0.06), **ci("length_controlled_win_rate", 0.5234, 0.07),
                **ci("longer_preferred", 0.7891, 0.05), "characters": [31.5, 16.75], "verdict": "it is the length",
            }
        },
        "judges": {"reward": {"pairs_test": 5376, **ci("accuracy", 0.7686, 0.01), "length_baseline_accuracy": 0.561}},
        "contamination": {
            "documents": 30000, "words": 1204878, "contaminated": tasks[:1],
            "tasks": {task: overlap if task == tasks[0] else clean for task in tasks},
        },
    }  # fmt: skip


PPO = {
    **spent("ppo", 60.39), "updates": 20, "episodes": 2560, "kept_update": 12, "kept_by": "score",
    **ci("score_before", -0.0369, 0.139), **ci("score_after", 1.1451, 0.09), **ci("score_gain", 1.182, 0.138),
    **ci("gold_before", 0.4137, 0.0566), **ci("gold_after", 0.8708, 0.0394), **ci("gold_gain", 0.4571, 0.0613),
    **ci("kl", 1.959, 0.17), **ci("response_tokens", 16.7, 0.6), **ci("responses_ended", 1.0, 0.0), "gold_best": 1.0,
    "findings": {"score_follows_length": [7, 9]},
    "back_offs": [{"update": 7, "finding": "kl_runs_away", "evidence": "", "back_to": 4}],
    "course": {
        "ppo": [{"update": u, "kl": 0.1 * u, "score": u / 10, "second": None, "gold": 0.4 + 0.03 * u - 0.0008 * u * u}
                for u in range(0, 21, 2)],
        "best_of_n": [{"n": n, "kl": kl, "score": 0.3 + kl, "second": None, "gold": 0.45 + kl / 5}
                      for n, kl in ((1, 0.0), (2, 0.1931), (4, 0.6363), (8, 1.2044))],
    },
}  # fmt: skip
REWARD = {
    **spent("reward", 100.38), "steps": 300, "pairs_train": 47990, "pairs_test": 5376, **ci("accuracy", 0.7686, 0.014),
    **ci("length_baseline_accuracy", 0.561, 0.016), **ci("gold_accuracy", 0.9229, 0.014),
    **ci("labellers_agree_with_gold", 0.8615, 0.01), "calibration_error": 0.03, "calibration_error_before": 0.0224,
    "temperature": 0.7286, "score_length_pearson": 0.1801, "score_length_spearman": 0.2007,
    "accuracy_by_source": {
        "tinyworld": {"pairs": 5000, **ci("accuracy", 0.77, 0.01)},
        "<img src=x onerror=window.hacked=1>": {"pairs": 376, **ci("accuracy", 0.7, 0.05)},
    },
    "surface_features": {"tokens": {"preferred": "more", **ci("accuracy", 0.561, 0.016)}},
}  # fmt: skip
CALIBRATION = {
    "bins_before": [{"low": low, "high": low + 0.05, "pairs": 10, "confidence": low + 0.025, "accuracy": low}
                    for low in (0.5, 0.6, 0.7, 0.8, 0.9)],
    "bins_after": [{"low": low, "high": low + 0.05, "pairs": 10, "confidence": low + 0.025, "accuracy": low + 0.02}
                   for low in (0.5, 0.6, 0.7, 0.8, 0.9)],
    "points": [[5 + place % 30, (place * 37 % 100) / 25 - 2] for place in range(200)],
    "responses": 2000,
}  # fmt: skip
CORPUS = {
    "prepared": True, "bad_rows": 0,
    "in": {"documents": 1000, "bytes": 5_000_000, "tokens_estimated": 1_250_000},
    "out": {"documents": 1250, "bytes": 4_500_000, "tokens": 1_125_000, "bytes_per_token": 4.0},
    "sources": {
        "<img src=x onerror=window.hacked=1>": {
            "weight": 1.0, "in": {"documents": 700, "bytes": 3_000_000, "tokens_estimated": 750_000},
            "out": {"documents": 650, "bytes": 2_700_000, "tokens": 675_000, "bytes_per_token": 4.0},
            "removed": {"hashes": 10, "near_duplicates": 40},
        },
        "books": {
            "weight": 2.0, "in": {"documents": 300, "bytes": 2_000_000, "tokens_estimated": 500_000},
            "out": {"documents": 600, "bytes": 1_800_000, "tokens": 450_000, "bytes_per_token": 4.0}, "removed": {},
        },
    },
    "removed": {
        "hashes": {"documents": 10, "bytes": 40_000, "tokens_estimated": 10_000,
                   "examples": [{"text": f"### {ATTACK}", "value": 0.25}]},
        "near_duplicates": {"documents": 40, "bytes": 260_000, "tokens_estimated": 65_000,
                            "examples": [{"text": "one copy", "of": f"another {ATTACK}", "value": 0.75}]},
    },
    "cleaned": {"unicode": 17}, "masked": {"email": 3}, "masked_documents": {"email": 2},
    "settings": {"prepare.filters.hashes": 0.1}, "seconds": {"reading": 40.0, "packing": 25.5}, "files": ["a.jsonl"],
}  # fmt: skip
RECIPE = """\
name: made
description: {description}
seed: 1
stages: [tokenizer, pretrain, sft, reward, ppo, evaluate]
tokenizer: {{train: [{{builtin: tinyworld, rows: 8000}}], vocab_size: 1024}}
pretrain: {{train: [{{path: "texts/<i>.jsonl"}}], tokens: 1200000, learning_rate: 0.003}}
sft: {{train: [{{hub: someone/chats, rows: 10000}}], steps: 400}}
reward: {{train: [{{path: pairs.jsonl}}]}}
ppo: {{prompts: [{{builtin: tinyworld}}], kl: {{coefficient: 0.1}}, keep: {{kl_budget: 2.0}}}}
evaluate: {{texts: [{{builtin: tinyworld, rows: 300}}], fewshot: {{tasks: [tinyworld]}}}}
"""


def make_run(
    folder: Path, *, tasks: tuple[str, ...] = (TASK, "recall_things"), description: str = "a run made by hand"
) -> Path:
    """A finished run; `description` and a task's name may hold anything."""
    write(folder / "recipe.yaml", RECIPE.format(description=json.dumps(description)))
    summaries = {
        "tokenizer": {**spent("tokenizer", 5.92), "vocab_size": 1024, "bytes_per_token": 3.2334, "texts": 8000},
        "pretrain": {**spent("pretrain", 161.0), "steps": 1172, "tokens": 1200128,
                     **ci("validation_nats_per_token", 0.6643, 0.02), **ci("validation_bits_per_byte", 0.2992, 0.01),
                     "rollbacks": [{"step": 278, "cause": f"the loss is 9.1 {ATTACK}", "back_to_step": 200,
                                    "skipped_rows": [1600, 2632], "in_a_row": 1}]},
        "sft": {**spent("sft", 27.04), "steps": 400, "tokens": 354867, **ci("validation_nats_per_token", 0.3405, 0.02)},
        "reward": REWARD, "ppo": PPO, "evaluate": evaluation(list(tasks)),
    }  # fmt: skip
    stands_on = {"pretrain": "tokenizer", "sft": "pretrain", "reward": "sft", "ppo": "reward", "evaluate": "ppo"}
    for stage, summary in summaries.items():
        write(folder / stage / "summary.json", summary)
        before = stands_on.get(stage)
        inputs = {"seed": 1, **({f"stage {before}": digest_of(before)} if before else {})}
        write(
            folder / stage / "manifest.json",
            {
                "stage": stage, "inputs": inputs, "versions": {"python": "3.11.7", "torch": "2.13.0"},
                "git_commit": "c" * 40, "command": "rlhf run all --recipe made.yaml", "output": digest_of(stage),
            },
        )  # fmt: skip
    _metrics(folder)
    write(folder / "corpus" / "card.json", CORPUS)
    write(folder / "reward" / "calibration.json", CALIBRATION)
    write_lines(folder / "evaluate" / "responses.jsonl", [_answer(number) for number in range(3)])
    return folder


def digest_of(stage: str) -> str:
    return (stage[:1].encode().hex() * 32)[:64]


def _metrics(folder: Path) -> None:
    steps = range(10, 6010, 10)
    for stage in ("pretrain", "sft", "reward"):
        lines = [{"step": s, "loss": 1 + 60 / s, "learning_rate": 1e-3, "accuracy": 0.7, "time": s} for s in steps]
        lines += [{"step": 6000, "validation_nats_per_token": 1.2, "validation_loss": 0.5, "validation_accuracy": 0.8}]
        if stage == "pretrain":
            sources = {"books": 1.1357, ATTACK: 2.5}
            lines += [{"step": 6000, **{f"validation_nats_per_token/{name}": nats for name, nats in sources.items()}}]
        write_lines(folder / stage / "metrics.jsonl", lines)
    shared = {"entropy": 0.3, "ended": 1.0, "clip_fraction": 0.1, "explained_variance": 0.5, "learning_rate": 1e-4}
    write_lines(
        folder / "ppo" / "metrics.jsonl",
        [
            {"update": u, "score": u / 20, "gold": 0.4 + u / 50, "kl": u / 10, "response_tokens": 15 + u / 10, **shared,
             **({"validation_score": u / 20} if u % 5 == 0 else {})}
            for u in range(1, 21)
        ],
    )  # fmt: skip


def _answer(number: int) -> dict[str, Any]:
    said = ATTACK if number == 0 else "The capital of Peru is Lima. " * (1 + 100 * (number == 2))
    return {
        "prompt": [{"role": "user", "content": ATTACK if number == 1 else "Tell me the capital of Peru."}],
        "responses": {
            name: {"text": said, "ended": name != "base", "tokens": 12, "score": 0.5, "gold": 0.75} for name in MODELS
        },
    }
