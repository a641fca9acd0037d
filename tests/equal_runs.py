"""Whether two runs of a stage came to the same."""

import json
from pathlib import Path
from typing import Any

TIMINGS = {
    "time",
    "tokens_per_second",
    "pairs_per_second",
    "episodes_per_second",
    "rollout_seconds",
    "rollout_tokens_per_second",
}
VOLATILE = TIMINGS | {"seconds", "cpu_seconds", "started", "peak_memory_mib"}


def differences(reference: Path, other: Path) -> list[str]:
    """In which files two directories of a finished stage differ, timings apart."""
    found = []
    names = {path.name for folder in (reference, other) for path in (folder / "model").glob("*")}
    for name in sorted(names - {"README.md"}):
        a, b = reference / "model" / name, other / "model" / name
        if not (a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()):
            found.append(f"model/{name} differs")
    if _summary(reference) != _summary(other):
        found.append("summary.json differs")
    if _metrics(reference) != _metrics(other):
        found.append("metrics.jsonl differs")
    return found


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    return _without(json.loads(path.read_text()), VOLATILE) if path.exists() else {}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [_without(json.loads(line), TIMINGS) for line in path.read_text().splitlines()] if path.exists() else []


def _without(values: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}
