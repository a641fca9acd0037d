"""Is a stage's memory what `rlhf plan` says? Plans a recipe, runs it, and compares, stage by stage.

    scripts/bench_plan --recipe FILE|NAME [key=value ...] [--runs-dir DIR]

Measured is the largest memory of the stage's process above that of the libraries it loads, or, where a GPU computes,
the largest that its allocator gave out. A few steps are enough: `sft.steps=3 ppo.updates=2 ...`. Each stage is planned
once those before it are done, as its own model and tokenizer then are.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs-bench-plan"))
    return parser.parse_args()


def called(command: str, args: argparse.Namespace, *more: str) -> str:
    """What a command of rlhf prints."""
    options = ["--recipe", args.recipe, "--runs-dir", str(args.runs_dir), *args.overrides, *more]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", *command.split(), *options], capture_output=True, text=True, cwd=Path.cwd()
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout


def measured(summary: dict[str, Any]) -> float:
    """MiB."""
    return float(summary.get("peak_gpu_memory_mib") or summary["peak_memory_mib"] - summary["libraries_memory_mib"])


def main() -> None:
    args = parse()
    recipe = load_recipe(args.recipe, args.overrides)
    table = Table("stage", "parameters", "planned, MiB", "measured, MiB", "planned / measured", "largest in")
    for stage in recipe.stages:
        planned = json.loads(called("plan", args, "--stage", stage, "--json", "--processes", "1"))["stages"][stage]
        called(f"run {stage}", args)
        summary = json.loads((args.runs_dir / recipe.name / stage / "summary.json").read_text(encoding="utf-8"))
        if planned["memory_mib"] is None:
            continue
        ratio = planned["memory_mib"] / measured(summary)
        figures = (f"{planned['memory_mib']:,.0f}", f"{measured(summary):,.0f}", f"{ratio:.2f}")
        table.add_row(stage, f"{planned['parameters']:,}", *figures, planned["memory_phase"])
        print(f"{stage}: planned {figures[0]} MiB, measured {figures[1]} MiB, ratio {figures[2]}", flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
