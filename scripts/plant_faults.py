"""Plants faults into PPO and sees whether the doctor names each one, and nothing where there is none.

    scripts/plant_faults RUN_DIR [--recipe quickstart] [--updates 20] [--layouts full,shared] [key=value ...]

RUN_DIR is a finished run of the recipe (sft and reward at least); it is only read. Prints a table: the fault, what has
to be named, in which update it was first named, what else was. Exits with 1 where a fault wasn't named in time, or
where something was named in an untouched run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
JUDGES = """
def length(conversations):
    return [len(each["response"].split()) / 10 for each in conversations]


def constant(conversations):
    return [1.0 for _ in conversations]
"""


class Fault(NamedTuple):
    """What is planted, and what has to be named."""

    name: str
    overrides: tuple[str, ...]
    expected: frozenset[str]


def faults(learning_rate: float, max_tokens: int) -> list[Fault]:
    """All of them, for a recipe with these."""
    return [
        Fault("none", (), frozenset()),
        Fault("learning rate x100", (f"ppo.learning_rate={100 * learning_rate}",), frozenset({"steps_too_large"})),
        Fault("no KL", ("ppo.kl={coefficient: 0}",), frozenset({"kl_costs_nothing"})),
        Fault(
            "a judge that pays for length",
            ("ppo.judge=[{python: 'judges.py:length'}]", "ppo.kl={coefficient: 0.02}"),
            frozenset({"score_follows_length"}),
        ),
        Fault("EOS impossible", (f"ppo.sampling.min_tokens={max_tokens}",), frozenset({"never_ends"})),
        Fault("a constant judge", ("ppo.judge=[{python: 'judges.py:constant'}]",), frozenset({"judge_is_constant"})),
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="with finished sft and reward stages; only read")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, for every fault")
    parser.add_argument("--recipe", default="quickstart", help="that RUN_DIR was made with (default quickstart)")
    parser.add_argument("--updates", type=int, default=20, help="within which each is to be named (default 20)")
    parser.add_argument("--layouts", default="full", help="full, shared, adapters, with commas between (default full)")
    return parser.parse_intermixed_args()


def found(args: argparse.Namespace, layout: str, fault: Fault) -> dict[str, int]:
    """What the doctor named, with the update in which it did so first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "judges.py").write_text(JUDGES, encoding="utf-8")
        run = folder / "runs" / args.run.name
        shutil.copytree(args.run, run, ignore=shutil.ignore_patterns("ppo", "evaluate", "checkpoints", ".lock"))
        more = (f"ppo.updates={args.updates}", f"ppo.layout={layout}", "ppo.best_of=0", f"data.root={folder}")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "rlhf", "run", "ppo", "--recipe", args.recipe),
                *(*more, *args.overrides, *fault.overrides),
            ],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        lines = [json.loads(line) for line in (run / "ppo/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        named: dict[str, int] = {}
        for line in lines:
            for finding in line.get("findings", []):
                named.setdefault(finding, line["update"])
        if done.returncode:
            said = (done.stdout + done.stderr).strip().splitlines()[-1:]
            print(f"{fault.name}, {layout}: ended with {done.returncode}: {' '.join(said)}", flush=True)
        return named


def main() -> None:
    args = parse()
    recipe = yaml.safe_load((args.run / "recipe.yaml").read_text(encoding="utf-8"))["ppo"]
    table = Table("layout", "fault", "to be named", "first named after update", "named besides")
    bad = 0
    for layout in args.layouts.split(","):
        for fault in faults(recipe["learning_rate"], recipe["sampling"]["max_tokens"]):
            named = found(args, layout, fault)
            others = ", ".join(f"{name} ({update})" for name, update in named.items() if name not in fault.expected)
            whens = [str(named.get(name, "never")) for name in sorted(fault.expected)]
            bad += "never" in whens or (not fault.expected and bool(named))
            table.add_row(layout, fault.name, ", ".join(sorted(fault.expected)), ", ".join(whens), others)
            print(f"{layout}, {fault.name}: {named}", flush=True)
    Console(width=160).print(table)
    sys.exit(min(bad, 1))


if __name__ == "__main__":
    main()
