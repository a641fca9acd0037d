"""`rlhf status`: what a run has done and where it stands, from its files alone."""

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.chain import state_of
from rlhf.data.prepare.inputs import CORPUS, REPLAYED
from rlhf.errors import MissingInput, RlhfError
from rlhf.recipe import load_recipe
from rlhf.rundir import RunDir, StageDir, read_json
from rlhf.runtime import format_number, format_seconds, visible

KEY_FIGURES = {
    "tokenizer": ("vocab_size", "bytes_per_token"),
    "pretrain": ("tokens", "validation_nats_per_token", "validation_bits_per_byte"),
    "sft": ("steps", "validation_nats_per_token", "responses_ended"),
    "reward": ("pairs_train", "accuracy", "length_baseline_accuracy", "gold_accuracy"),
    "ppo": ("updates", "score_before", "score_after", "kl", "gold_before", "gold_after"),
    "evaluate": (),
}


def print_status(run_dir: Path) -> None:
    """Prints a line for each stage of the run. Raises MissingInput where there is no run."""
    if not (run_dir / "recipe.yaml").is_file():
        raise MissingInput(f"{run_dir} is no run's directory (it has no recipe.yaml)")
    run = RunDir(run_dir)
    recipe = load_recipe(str(run_dir / "recipe.yaml"))
    holder = run.holder()
    print(f"{run_dir}: {recipe.description or recipe.name}" + (f" (in use, pid {holder})" if holder else ""))
    for stage in recipe.stages:
        directory = run.stage(stage)
        try:
            state = state_of(recipe, stage, run)
        except RlhfError as error:  # an input file is gone: say so, and go on with the other stages
            print(f"  {stage:<15} {'unknown':<12} {error}")
            continue
        name = "running" if holder and state.name == "interrupted" else state.name
        line = f"  {stage:<15} {name:<12}"
        summary = directory.summary()
        if summary:
            line += f"{format_seconds(summary.get('seconds') or 0):>8}  {_figures(stage, summary)}"
        elif state.name == "interrupted":
            line += f"{_last_line(directory)}"
            line += f"\n    it ended: {directory.failure()}" if name == "interrupted" and directory.failure() else ""
        print(visible(line) + visible(f"  ({state.why})" if state.name == "stale" else ""))
    for name in (CORPUS, REPLAYED):
        _print_corpus(run.path / name, running=holder is not None)


def _print_corpus(folder: Path, *, running: bool) -> None:
    """A line for the corpus that pretrain learns from, where there is one."""
    card = read_json(folder / "card.json")
    if card:
        out = card.get("out", {})
        seconds = format_seconds(sum(card.get("seconds", {}).values()))
        figures = "  ".join(
            f"{key} {format_number(out[key])}" for key in ("documents", "bytes", "tokens") if key in out
        )
        print(f"  {folder.name:<15} {'done':<12}{seconds:>8}  {figures}")
    elif folder.is_dir():
        parts = len(list(folder.glob("work/part-*[0-9]")))
        print(f"  {folder.name:<15} {'running' if running else 'interrupted':<12}{parts:>8} parts are read")


def _figures(stage: str, summary: dict[str, Any]) -> str:
    return "  ".join(
        f"{key} {format_number(summary[key])}"
        for key in KEY_FIGURES[stage]
        if isinstance(summary.get(key), int | float)
    )


def _last_line(directory: StageDir) -> str:
    """The last figures of a stage that isn't complete: it runs now, or it was stopped there."""
    last = deque(_metric_lines(directory.metrics), maxlen=1)
    shown = {
        key: value
        for key, value in (last[0] if last else {}).items()
        if isinstance(value, int | float) and key != "time"
    }
    return "at " + "  ".join(f"{key} {format_number(value)}" for key, value in list(shown.items())[:5]) if shown else ""


def _metric_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            yield found
