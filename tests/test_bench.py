"""scripts/bench: its table, and two machines beside each other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.bench import show

from .conftest import ROOT, TINY_RECIPE


def bench(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "bench.py"), "--recipe", str(TINY_RECIPE), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_figures_are_the_run_s_and_another_machine_stands_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, stages = tmp_path / "bench.json", "stages=[tokenizer, pretrain]"
    said = bench(stages, "--json", str(file))
    (result,) = map(json.loads, file.read_text().splitlines())
    assert result["recipe"] == [str(TINY_RECIPE), stages]
    assert result["machine"]["cores"] == len(os.sched_getaffinity(0))
    speed = result["figures"]["pretrain, tokens/s"]
    assert f"{speed:,.0f}" in said and speed > 0
    share = result["figures"]["pretrain, share of the product's speed"]
    assert 0 < share < 1
    slower = {key: value / 2 for key, value in result["figures"].items()}
    other = {**result, "machine": {"processor": "an abacus"}, "figures": slower}
    show(result, other)
    said = capsys.readouterr().out
    assert "against: processor an abacus" in said
    row = next(line for line in said.splitlines() if "pretrain, tokens/s" in line)
    mine, _, ratio = (cell.strip().replace(",", "") for cell in row.split("│")[2:5])
    assert abs(float(ratio) - float(mine) / slower["pretrain, tokens/s"]) < 0.01
    file.write_text(json.dumps(other) + "\n")
    assert "that can't be compared" in bench("stages=[tokenizer]", "--against", str(file), code=1)
    file.write_text("nothing")
    assert "not a file that --json wrote" in bench("stages=[tokenizer]", "--against", str(file), code=1)
