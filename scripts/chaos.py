"""Breaks runs and compares their ends with those of runs that nobody touched. Prints a table; exits with 1 on a fault.

    kills    kill -9 and -15 at random moments of every stage, one and two processes; the same command goes on
    damage   the newest checkpoint truncated, with a bit flipped, with a file gone
    ranks    one of two ranks killed with -9 or stopped with -19: who is named, and how soon all are gone
    disk     a full disk while a checkpoint is written, and a read-only one (needs root, for a small tmpfs)

A run is compared by its model's bytes, its metrics without timings, and its summary without timings and memory.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from tests.equal_runs import differences

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate")
TRAINING = ("pretrain", "sft", "reward", "ppo")
PARTS = ("kills", "damage", "ranks", "disk")
RECIPE = ROOT / "tests" / "tiny.yaml"
# enough steps for a kill to fall among them, and checkpoints close together
OVERRIDES = (
    "checkpoints.every_steps=3",
    "pretrain.tokens=61440",
    "sft.steps=60",
    "reward.epochs=2",
    "reward.log_every=3",
    "ppo.updates=8",
    "ppo.microbatch_size=4",
    "threads=1",
)
console = Console(highlight=False, soft_wrap=True)


@dataclass
class Row:
    """A line of the table."""

    what: str
    stage: str
    processes: int
    tries: int = 0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def command(stage: str, runs: Path, processes: int) -> list[str]:
    return [
        *(sys.executable, "-m", "rlhf", "run", stage, "--recipe", str(RECIPE), "--runs-dir", str(runs)),
        *("--processes", str(processes), *OVERRIDES),
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def run(stage: str, runs: Path, processes: int) -> tuple[int, str]:
    done = subprocess.run(
        command(stage, runs, processes), env=environment(), capture_output=True, text=True, timeout=900
    )
    return done.returncode, done.stdout + done.stderr


def start(stage: str, runs: Path, processes: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(stage, runs, processes),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stage_folder(runs: Path, stage: str) -> Path:
    return runs / "tiny" / stage


class References:
    """Uninterrupted runs with one and with two processes, made once; what every case begins from."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.seconds: dict[tuple[str, int], float] = {}

    def runs(self, processes: int) -> Path:
        return self._place / f"reference-{processes}"

    def make(self, processes: int, stages: tuple[str, ...]) -> None:
        for stage in STAGES[: 1 + max(STAGES.index(stage) for stage in stages)]:
            began = time.monotonic()
            code, output = run(stage, self.runs(processes), processes)
            if code:
                raise SystemExit(f"the reference run of {stage} failed:\n{output}")
            self.seconds[stage, processes] = time.monotonic() - began
            console.print(f"reference {stage}, {processes} processes: {self.seconds[stage, processes]:.1f} s")

    def begin(self, place: Path, stage: str, processes: int) -> Path:
        """A run's directory in which all stages before this one are done."""
        runs = place / f"{stage}-{processes}-{random.getrandbits(40):x}"
        (runs / "tiny").mkdir(parents=True)
        for before in STAGES[: STAGES.index(stage)]:
            shutil.copytree(stage_folder(self.runs(processes), before), stage_folder(runs, before))
        return runs

    def compare(self, runs: Path, stage: str, processes: int) -> list[str]:
        return differences(stage_folder(self.runs(processes), stage), stage_folder(runs, stage))


# Kills


def moments(references: References, stage: str, processes: int, folder: Path) -> Callable[[float], bool]:
    """When to strike, as a question to be asked again and again: a random time, a random line, a checkpoint."""
    kind = random.choice(("time", "line", "checkpoint")) if stage in TRAINING else "time"
    at = random.uniform(0.5, references.seconds[stage, processes])
    line = random.randint(1, 12)
    metrics = folder / "metrics.jsonl"

    def struck(spent: float) -> bool:
        if kind == "time":
            return spent >= at
        if kind == "line":
            return metrics.exists() and metrics.read_bytes().count(b"\n") >= line
        return any((folder / "checkpoints").glob("*.partial")) and random.random() < 0.05

    return struck


def kill_once(
    references: References, stage: str, runs: Path, processes: int, number: int
) -> tuple[bool, str, list[str]]:
    """(whether the run was killed before its end, what it said, faults)."""
    struck = moments(references, stage, processes, stage_folder(runs, stage))
    process = start(stage, runs, processes)
    began = time.monotonic()
    while process.poll() is None and not struck(time.monotonic() - began):
        time.sleep(0.002)
    if process.poll() is not None:
        output = process.communicate()[0]
        return False, output, [] if process.returncode == 0 else [f"exit code {process.returncode}: {output[-300:]}"]
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    target = random.choice(family)  # the command itself, or one of the stage's processes
    began = time.monotonic()
    try:
        target.send_signal(number)
    except psutil.NoSuchProcess:
        process.send_signal(number)
    output = process.communicate()[0]
    gone = psutil.wait_procs(family, timeout=60)[1] == []
    spent = time.monotonic() - began
    if process.returncode == 0:
        return False, output, []
    expected = (130,) if number == signal.SIGTERM else (1, -9)
    if number == signal.SIGTERM and not output:  # Python itself was still starting
        expected = (130, -signal.SIGTERM)
    faults = [] if process.returncode in expected else [f"exit code {process.returncode} after {number}"]
    faults += [] if gone else ["processes are left"]
    faults += [f"took {spent:.0f} s to end"] if spent > 60 else []
    faults += ["a traceback"] if "Traceback" in output and number == signal.SIGTERM else []
    return True, output, faults


def kills(references: References, place: Path, stages: tuple[str, ...], each: int) -> list[Row]:
    rows = []
    for processes in (1, 2):
        for stage in stages:
            if processes == 2 and stage not in TRAINING:
                continue
            row = Row("kill -9, -15", stage, processes)
            counts = {signal.SIGKILL: 0, signal.SIGTERM: 0}
            finished = resumed = 0
            while sum(counts.values()) < each or not finished:
                runs = references.begin(place, stage, processes)
                for _ in range(3 if sum(counts.values()) < each else 0):
                    number = signal.SIGKILL if random.random() < 0.7 else signal.SIGTERM
                    killed, output, faults = kill_once(references, stage, runs, processes, number)
                    row.faults += faults
                    resumed += "goes on from the checkpoint" in output
                    if not killed:
                        break
                    counts[number] += 1
                code, output = run(stage, runs, processes)
                resumed += "goes on from the checkpoint" in output
                row.faults += [f"exit code {code}: {output[-300:]}"] if code else []
                row.faults += references.compare(runs, stage, processes)
                finished += 1
                shutil.rmtree(runs)
            row.tries = sum(counts.values())
            row.notes = [
                f"{counts[signal.SIGKILL]} x -9, {counts[signal.SIGTERM]} x -15; {finished} runs finished and equal; "
                f"{resumed} times from a checkpoint"
            ]
            say(row)
            rows.append(row)
    return rows


# Damage


def interrupted_with_checkpoints(references: References, place: Path, stage: str, processes: int) -> Path:
    """A run that was killed once it had two checkpoints."""
    while True:
        runs = references.begin(place, stage, processes)
        process = start(stage, runs, processes)
        checkpoints = stage_folder(runs, stage) / "checkpoints"
        while process.poll() is None and len(list(checkpoints.glob("step-*[0-9]"))) < 2:
            time.sleep(0.002)
        if process.poll() is None:
            process.kill()
            process.communicate()
            return runs
        shutil.rmtree(runs)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    file.write_bytes(content)


def missing(file: Path) -> None:
    file.unlink()


def damage(references: References, place: Path, stages: tuple[str, ...], each: int) -> list[Row]:
    rows = []
    for stage in [stage for stage in stages if stage in TRAINING]:
        for spoil in (truncated, flipped, missing):
            row = Row(f"checkpoint {spoil.__name__}", stage, 1)
            for _ in range(each):
                runs = interrupted_with_checkpoints(references, place, stage, 1)
                time.sleep(0.5)
                checkpoints = (stage_folder(runs, stage) / "checkpoints").glob("step-*[0-9]")
                newest = max(checkpoints, key=lambda path: int(path.name.removeprefix("step-")))
                file = random.choice([path for path in newest.rglob("*") if path.is_file() and path.stat().st_size])
                spoil(file)
                code, output = run(stage, runs, 1)
                row.tries += 1
                row.faults += [f"exit code {code}: {output[-300:]}"] if code else []
                row.faults += [] if "is damaged" in output else [f"{file.name}: the damage was not reported"]
                row.faults += references.compare(runs, stage, 1)
                shutil.rmtree(runs)
            say(row)
            rows.append(row)
    return rows


# Ranks


def ranks(references: References, place: Path, stages: tuple[str, ...], each: int) -> list[Row]:
    rows = []
    for stage in [stage for stage in stages if stage in TRAINING]:
        for number, what in ((signal.SIGKILL, "rank killed with -9"), (signal.SIGSTOP, "rank stopped with -19")):
            row = Row(what, stage, 2)
            for rank in range(2):
                runs = references.begin(place, stage, 2)
                folder = stage_folder(runs, stage)
                process = start(stage, runs, 2)
                while process.poll() is None and not any((folder / "checkpoints").glob("step-*[0-9]")):
                    time.sleep(0.002)
                if process.poll() is not None:
                    row.faults.append("it ended before it could be struck")
                    continue
                pid = json.loads((folder / "ranks" / f"rank-{rank}.json").read_text())["pid"]
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                began = time.monotonic()
                os.kill(pid, number)
                output = process.communicate(timeout=120)[0]
                left = psutil.wait_procs(family, timeout=60)[1]
                spent = time.monotonic() - began
                row.tries += 1
                row.notes.append(f"{spent:.0f} s")
                row.faults += [f"{spent:.0f} s until all were gone"] if spent > 60 or left else []
                row.faults += [] if process.returncode == 1 else [f"exit code {process.returncode}"]
                row.faults += [] if f"rank {rank} " in output else [f"rank {rank} not named: {output[-300:]}"]
                code, output = run(stage, runs, 2)
                row.faults += [f"exit code {code}: {output[-300:]}"] if code else []
                row.faults += references.compare(runs, stage, 2)
                shutil.rmtree(runs)
            say(row)
            rows.append(row)
    return rows


# Disk


def disk(references: References, place: Path, stages: tuple[str, ...], each: int) -> list[Row]:
    rows = []
    mount = place / "tmpfs"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(mount)], capture_output=True).returncode:
        console.print("disk: no tmpfs can be mounted here (it needs root); not tried")
        return [Row("full disk", "-", 1, notes=["not tried: needs root"])]
    try:
        what = "full disk before a checkpoint"
        rows += [_full(references, mount, what, stage, 30 * 2**20) for stage in stages if stage in TRAINING]
        if "pretrain" in stages:
            rows.append(_full(references, mount, "full disk while texts are written", "pretrain", 20_000))
        rows.append(_read_only(references, mount))
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=False)
    return rows


def _full(references: References, mount: Path, what: str, stage: str, left: int) -> Row:
    """So many bytes are left: too little for the next checkpoint, or for what comes before the first one."""
    row = Row(what, stage, 1, tries=1)
    runs = interrupted_with_checkpoints(references, mount, stage, 1)
    if "texts" in what:
        shutil.rmtree(stage_folder(runs, stage).with_name("corpus"))
    kept = sorted(path.name for path in (stage_folder(runs, stage) / "checkpoints").glob("step-*[0-9]"))
    filler = mount / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(mount).free - left)
    code, output = run(stage, runs, 1)
    row.faults += [] if code == 1 else [f"exit code {code}"]
    row.faults += [] if "no room on the disk" in output else [f"not said: {output[-300:]}"]
    row.faults += ["a traceback"] if "Traceback" in output else []
    now = sorted(path.name for path in (stage_folder(runs, stage) / "checkpoints").glob("step-*[0-9]"))
    row.faults += [f"checkpoints {kept} became {now}"] if now[-len(kept) :] != kept and kept else []
    filler.unlink()
    code, output = run(stage, runs, 1)
    row.faults += [f"exit code {code}: {output[-300:]}"] if code else []
    row.faults += references.compare(runs, stage, 1)
    shutil.rmtree(runs)
    say(row)
    return row


def _read_only(references: References, mount: Path) -> Row:
    row = Row("read-only directory", "pretrain", 1, tries=1)
    runs = interrupted_with_checkpoints(references, mount, "pretrain", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    code, output = run("pretrain", runs, 1)
    row.faults += [] if code in (1, 2) else [f"exit code {code}"]
    row.faults += ["a traceback"] if "Traceback" in output else []
    row.faults += [] if str(mount) in output else [f"not said: {output[-300:]}"]
    subprocess.run(["mount", "-o", "remount,rw", str(mount)], check=True)
    code, output = run("pretrain", runs, 1)
    row.faults += [f"exit code {code}: {output[-300:]}"] if code else []
    row.faults += references.compare(runs, "pretrain", 1)
    shutil.rmtree(runs)
    say(row)
    return row


def say(row: Row) -> None:
    found = f"FAULTS: {row.faults}" if row.faults else "ok"
    console.print(f"{row.what}, {row.stage}, {row.processes} processes: {found} {'; '.join(row.notes)}", markup=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--kills", type=int, default=7, help="of each stage, with one and with two processes")
    parser.add_argument("--damage", type=int, default=1, help="tries of each kind of damage")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: another one each time")
    chosen = parser.parse_args()
    seed = chosen.seed if chosen.seed is not None else int(time.time())
    random.seed(seed)
    console.print(f"seed {seed}")
    stages = tuple(stage for stage in STAGES if stage in chosen.stages)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        place = Path(folder)
        references = References(place)
        references.make(1, stages)
        if {"kills", "ranks"} & set(chosen.parts) and set(stages) & set(TRAINING):
            references.make(2, tuple(stage for stage in stages if stage in TRAINING))
        parts: dict[str, tuple[Callable[..., list[Row]], int]] = {
            "kills": (kills, chosen.kills),
            "damage": (damage, chosen.damage),
            "ranks": (ranks, 1),
            "disk": (disk, 1),
        }
        for name in chosen.parts:
            part, each = parts[name]
            rows += part(references, place, stages, each)
    table = Table(title="chaos", title_justify="left")
    for heading in ("what", "stage", "processes", "tries", "faults", "notes"):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row.what, row.stage, str(row.processes), str(row.tries), str(len(row.faults)), "; ".join(row.notes)
        )
    console.print(table)
    faults = sum(len(row.faults) for row in rows)
    console.print(f"{sum(row.tries for row in rows)} tries, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
