"""A stage's processes started by Accelerate's launcher, as a launch file says (`rlhf run --launch-config`).

Our process stays their parent in all that it does for the processes of `--processes`: it holds the lock of the run's
directory, asks for a checkpoint when it is interrupted, passes on how a rank ended, and leaves none running. Between it
and the ranks stands one process more, which runs `accelerate launch`; each ends with the one above it.
Across several machines each has such a parent; rank 0, on the first one, decides and holds the lock for all.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from rlhf.errors import Interrupted, StageFailed, UserError
from rlhf.launch import (
    PACKAGE_ROOT,
    SHARED,
    START,
    START_WORKER,
    Ended,
    Stop,
    empty_ranks,
    environment_of,
    judge,
    keep_to_this_machine,
    run_processes,
)
from rlhf.launch_file import LaunchFile
from rlhf.recipe import Recipe, StageName
from rlhf.rundir import RunDir
from rlhf.runtime import log

START_LAUNCHER = f"""{START}from rlhf.launcher import launch
sys.exit(launch())"""
START_COMMAND = f"""{START}from rlhf.cli import main
sys.exit(main())"""
ENDED_BY_LAUNCHER = (Interrupted.exit_code, -signal.SIGTERM)  # codes of ranks that it ends because another one failed
GIVING_BACK = {  # for glibc: gathered weights come and go, and kept memory would soon be as much as whole models take
    "MALLOC_MMAP_MAX_": str(2**16),
    "MALLOC_MMAP_THRESHOLD_": str(2**16),
    "MALLOC_TRIM_THRESHOLD_": str(2**27),
}
GONE_SECONDS = 10.0  # what ranks have to vanish in once their launcher has been killed


def run_launched(recipe: Recipe, stage: StageName, run: RunDir, file: LaunchFile) -> None:
    """Runs a stage on this machine in the processes that a launch file asks for; raises as `run_processes` does.

    A stage that one process does alone needs no launcher.
    """
    if stage not in SHARED:
        run_processes(recipe, stage, run, 1)
        return
    folder = empty_ranks(run, stage)
    _run(recipe, stage, folder, file, [START_WORKER, stage, str(run.path)])


def run_on_machines(
    recipe: Recipe, wanted: tuple[StageName, ...], runs_dir: Path, file: LaunchFile, options: list[str]
) -> None:
    """Runs this machine's share of stages across machines; raises as `run_processes` does.

    `options`: what stands behind `rlhf run STAGE` in every process. Rank 0 finds out whether a stage is to be run.
    """
    run = RunDir.of(recipe, runs_dir)
    log(f"launch: {file}")
    for stage in wanted:
        _run(recipe, stage, run.stage(stage).path / "ranks", file, [START_COMMAND, "run", stage, *options])


def _run(recipe: Recipe, stage: StageName, folder: Path, file: LaunchFile, work: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="rlhf-launch-") as place:
        told = Path(place) / "ended.json"
        arguments = [str(os.getpid()), str(PACKAGE_ROOT), str(file.path), str(file.processes), str(told), *work]
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", START_LAUNCHER, *arguments],
            env=_environment(recipe, file),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        ranks = Launched(process)
        stop = Stop(ranks.ask, ranks.end)
        try:
            with stop.on_signals():
                while process.poll() is None and not stop.overdue():
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(0.2)
        finally:
            ranks.end()
            process.wait()
            ranks.wait_until_gone()
        judge(stage, folder, _ended(told, process, file), asked=stop.asked)


def _environment(recipe: Recipe, file: LaunchFile) -> dict[str, str]:
    found = environment_of(recipe, file.here)
    if file.config.num_machines == 1:
        keep_to_this_machine(found)
    if file.config.distributed_type != "MULTI_GPU":
        found |= {name: value for name, value in GIVING_BACK.items() if name not in os.environ}
    if file.config.use_cpu:  # Accelerate's launcher reads the key, and tells its processes nothing of it
        found |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return found


class Launched:
    """The launcher's process, and the ranks below it."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._ranks: list[psutil.Process] = []

    def ask(self) -> None:
        """Asks every rank to stop. The launcher is not asked: it would give them 30 seconds, and then kill them."""
        for rank in self._find():
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Kills the launcher, and with it the ranks."""
        self._find()
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        for rank in self._ranks:
            with suppress(psutil.NoSuchProcess):
                rank.kill()

    def wait_until_gone(self) -> None:
        """Returns once no rank is left."""
        psutil.wait_procs(self._ranks, timeout=GONE_SECONDS)

    def _find(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            self._ranks = psutil.Process(self._process.pid).children() or self._ranks
        return self._ranks


def _ended(told: Path, process: "subprocess.Popen[bytes]", file: LaunchFile) -> dict[int, Ended]:
    """How the ranks have ended, by what the launcher has told: one that it has ended itself has no code.

    How those on other machines did is not known here, and is for their parents to say.
    """
    first = file.config.machine_rank * file.here
    here = range(first, first + file.here)
    failed = process.returncode != 0
    ranks = {rank: Ended(None if failed and rank in here else 0, process.pid) for rank in range(file.processes)}
    if told.exists():
        bad = {int(rank): Ended(*how) for rank, how in json.loads(told.read_text()).items()}
        causes = {rank: one for rank, one in bad.items() if one.code not in ENDED_BY_LAUNCHER}
        return ranks | (causes or bad)
    if process.returncode > 0:
        raise StageFailed("Accelerate's launcher could not start the processes; what it said stands above")
    return ranks


# In the launcher's process


def launch() -> int:
    """Runs `accelerate launch` in this process, and tells how the ranks ended that failed; the exit code.

    Arguments: the launch file, the number of processes, where to tell, Python code and its arguments. Each rank runs
    the code. `accelerate launch` by itself would turn every exit code into 1, with a traceback.
    """
    file, processes, told, code, *arguments = sys.argv[1:]
    from accelerate.commands.launch import main
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the parent says what has failed
    rank = [sys.executable, "-P", "-c", code, str(os.getpid()), str(PACKAGE_ROOT), *arguments]
    sys.argv = ["accelerate-launch", "--config_file", file, "--num_processes", processes, "--no_python", *rank]
    try:
        main()
    except ChildFailedError as error:
        how = {str(rank): (failure.exitcode, failure.pid) for rank, failure in error.failures.items()}
        Path(told).write_text(json.dumps(how))
        return 1
    except Exception as error:  # Accelerate's own checks, or a meeting place that can't be reached
        print(f"error: {file}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def check_no_launcher() -> None:
    """Raises UserError within a process that a launcher has started."""
    if "LOCAL_RANK" in os.environ:
        raise UserError("--launch-config starts processes, and this one was started by a launcher already")
