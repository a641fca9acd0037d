"""Measures this machine with the whole chain, and prints a table that can be compared between machines.

    scripts/bench [--recipe quickstart] [--json FILE] [--against FILE] [key=value ...]

Runs every stage of the recipe in a folder that is thrown away (the quickstart takes some minutes on two cores), and on
a GPU trains a 124 M model as `scripts/bench_pretrain gpu` does. --json appends the figures with the machine's facts to
FILE, a JSON line a run; --against FILE sets the last line of such a file of another machine beside them.

Speeds are the stages' own figures: tokens, pairs and episodes a second of training, without validation; tokens a second
that PPO's policy writes, the median of its updates; floating-point operations of the largest matrix product. The recipe
and its overrides are part of the result: other ones are not compared.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

import rlhf
from rlhf.api import load_recipe, run

ROOT = Path(__file__).resolve().parent.parent
console = Console(width=None if sys.stdout.isatty() else 110)


class Figure(NamedTuple):
    """Where a figure stands in the run's summary, and what it is called."""

    stage: str
    key: str
    title: str
    scale: float = 1.0


FIGURES = (
    Figure("pretrain", "peak_flops_per_second", "matrix product, GFLOP/s", 1e-9),
    Figure("pretrain", "tokens_per_second", "pretrain, tokens/s"),
    Figure("pretrain", "model_flops_utilisation", "pretrain, share of the product's speed"),
    Figure("sft", "tokens_per_second", "sft, tokens/s"),
    Figure("reward", "pairs_per_second", "reward, pairs/s"),
    Figure("ppo", "episodes_per_second", "ppo, episodes/s"),
    Figure("ppo", "rollout_tokens_per_second", "ppo, tokens/s written"),
)
SPENT = (("seconds", "seconds"), ("cpu_seconds", "CPU-seconds"), ("peak_memory_mib", "peak MiB"))


def main() -> int:
    args = parse()
    recipe = load_recipe(args.recipe, args.overrides)
    asked = [args.recipe, *args.overrides]
    against = other(args.against, asked) if args.against else None
    with tempfile.TemporaryDirectory() as name:
        summary = run(recipe, runs_dir=name)
        lines = Path(name) / recipe.name / "ppo" / "metrics.jsonl"
        if "ppo" in summary:
            written = [json.loads(line).get("rollout_tokens_per_second") for line in lines.read_text().splitlines()]
            summary["ppo"]["rollout_tokens_per_second"] = statistics.median(value for value in written if value)
    result: dict[str, Any] = {
        "recipe": asked,
        "machine": machine(),
        "figures": figures(summary),
        **({"gpu": on_gpu()} if torch.cuda.is_available() else {}),
    }
    show(result, against)
    if args.json:
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--recipe", default="quickstart", help="a shipped recipe's name, or a file")
    parser.add_argument("--json", type=Path, help="append the result to this file")
    parser.add_argument("--against", type=Path, help="a file that --json wrote, on another machine")
    return parser.parse_args()


def machine() -> dict[str, Any]:
    facts = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in facts.read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "rlhf": rlhf.__version__,
    }


def figures(summary: dict[str, Any]) -> dict[str, float]:
    """What is compared, by title: speeds, then what each stage took."""
    found = {
        each.title: summary[each.stage][each.key] * each.scale
        for each in FIGURES
        if each.key in summary.get(each.stage, {})
    }
    for stage, values in summary.items():
        found |= {f"{stage}, {title}": float(values[key]) for key, title in SPENT if key in values}
    return found


def on_gpu() -> dict[str, Any]:
    """What `scripts/bench_pretrain gpu` finds."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "gpu.json"
        command = [sys.executable, ROOT / "scripts" / "bench_pretrain.py", "gpu", "--json", file]
        subprocess.run(list(map(str, command)), check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def other(file: Path, recipe: list[str]) -> dict[str, Any]:
    """The last result in a file. Leaves with what is wrong with it."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
        theirs = found["recipe"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f"--against {file}: not a file that --json wrote ({type(error).__name__}: {error})")
    if theirs != recipe:
        sys.exit(f"--against {file}: it ran {' '.join(theirs)}, not {' '.join(recipe)}: that can't be compared")
    return found


def show(result: dict[str, Any], against: dict[str, Any] | None) -> None:
    for each in (result, against):
        if each:
            told = "  ".join(f"{key} {value}" for key, value in each["machine"].items())
            console.print(f"{'against' if each is against else 'this machine'}: {told}", highlight=False)
    table = Table(" ".join(result["recipe"]), "this machine", *(["against", "this / against"] if against else []))
    for title, mine in result["figures"].items():
        row = [title, f"{mine:,.4g}" if mine < 1000 else f"{mine:,.0f}"]
        if against:
            theirs = against["figures"].get(title)
            row += ["-", "-"] if theirs is None else [f"{theirs:,.4g}", f"{mine / theirs:.2f}" if theirs else "-"]
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
