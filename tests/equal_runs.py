"""Whether two runs of a stage came to the same."""

import json
from pathlib import Path
from typing import Any

# what depends on the machine, beside ..._seconds and ..._per_second
MACHINE = {"time", "started", "seconds", "peak_memory_mib", "libraries_memory_mib", "model_flops_utilisation"}


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
    return _equal_part(json.loads(path.read_text())) if path.exists() else {}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [_equal_part(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def _equal_part(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in MACHINE and not k.endswith(("_seconds", "_per_second"))}
