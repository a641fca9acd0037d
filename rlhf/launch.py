"""The processes of a stage, from outside: started, watched, ended together. Imports nothing heavy."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from rlhf.errors import Interrupted, StageFailed, UserError
from rlhf.recipe import Recipe, StageName
from rlhf.rundir import RunDir, no_room
from rlhf.runtime import visible
from rlhf.team import DISK_FULL, LOST_CONTACT, Watch, rank_log

TRAINING: tuple[StageName, ...] = ("pretrain", "sft", "reward", "ppo")
SHARED: tuple[StageName, ...] = (*TRAINING, "evaluate")  # the stages that more than one process can do
GRACE_SECONDS = 8.0  # what the other ranks have to end by themselves once one is lost
STOP_SECONDS = 300.0  # what all ranks have to write a checkpoint once they are asked to stop
LAST_LINES = 15  # of a lost rank's log that are shown


def run_processes(recipe: Recipe, stage: StageName, run: RunDir, processes: int) -> None:
    """Runs a stage in so many processes and returns once all have ended well.

    Raises StageFailed, naming the rank that was lost; SystemExit(2) where the stage has told the user what to mend;
    Interrupted where it was asked to stop. No process is left in any case.
    """
    processes = processes if stage in SHARED else 1
    folder = empty_ranks(run, stage)
    with Ranks(stage, folder) as ranks:
        for rank in range(processes):
            ranks.start(run, rank, _rank_environment(recipe, rank, processes, folder / "meeting"))
        ranks.wait()


def empty_ranks(run: RunDir, stage: StageName) -> Path:
    """The folder of a stage's ranks, with nothing of earlier ones in it."""
    folder = run.stage(stage).path / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


class Ranks:
    """The processes of one stage."""

    def __init__(self, stage: StageName, folder: Path) -> None:
        self._stage, self._folder = stage, folder
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stop = Stop(self._ask, self._end)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def start(self, run: RunDir, rank: int, environment: dict[str, str]) -> None:
        """Starts one rank, in a session of its own: a Ctrl-C on the terminal comes to this process alone."""
        places = [str(os.getpid()), str(PACKAGE_ROOT)]
        command = [sys.executable, "-P", "-c", START_WORKER, *places, self._stage, str(run.path)]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        self._processes.append(process)

    def wait(self) -> None:
        """Returns once all have ended well; see `run_processes` for what it raises."""
        watch = Watch({rank: process.pid for rank, process in enumerate(self._processes)}, ended=False)
        with self._stop.on_signals():
            first_at, failure = None, None
            while any(process.poll() is None for process in self._processes):
                self._pause()
                failure = failure or watch.lost()
                bad = failure or any(process.poll() not in (None, 0) for process in self._processes)
                first_at = first_at or (time.monotonic() if bad else None)
                if failure or (first_at and time.monotonic() - first_at > GRACE_SECONDS):
                    break
                if self._stop.overdue():
                    break
        ended = {rank: Ended(process.poll(), process.pid) for rank, process in enumerate(self._processes)}
        self._kill()
        if failure:
            raise StageFailed(f"the stage {self._stage}: {failure}; all its processes are ended. {GO_ON}")
        judge(self._stage, self._folder, ended, asked=self._stop.asked)

    def _pause(self) -> None:
        running = next((process for process in self._processes if process.poll() is None), None)
        if running is not None:
            try:
                running.wait(0.2)
            except subprocess.TimeoutExpired:
                return

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        for process in self._processes:
            process.wait()

    def _ask(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def _end(self) -> None:
        for process in self._processes:  # not more: the main thread may be about to wait for one of them
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


class Stop:
    """The first SIGINT or SIGTERM asks all ranks to write a checkpoint and to leave; a second one kills them."""

    def __init__(self, ask: Callable[[], None], end: Callable[[], None]) -> None:
        self._ask, self._end = ask, end
        self._asked_at: float | None = None

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self._asked_at is not None

    def overdue(self) -> bool:
        """Whether the ranks have had all the time that they get."""
        return self._asked_at is not None and time.monotonic() - self._asked_at > STOP_SECONDS

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Within, both signals are taken over."""
        previous = {number: signal.signal(number, self._received) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _received(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            self._end()
            os._exit(Interrupted.exit_code)
        self._asked_at = time.monotonic()
        os.write(2, b"\ninterrupted: what trains finishes its step and writes a checkpoint; a second time ends all\n")
        self._ask()


class Ended(NamedTuple):
    """How a rank has ended. A code of None stands for one that had to be killed."""

    code: int | None
    pid: int


def judge(stage: StageName, folder: Path, ranks: dict[int, Ended], *, asked: bool) -> None:
    """Raises what the exit codes of a stage's ranks mean; see `run_processes`.

    `asked`: they were asked to stop. `folder` has their logs.
    """
    ended = {rank: one.code for rank, one in ranks.items() if one.code not in (None, 0, LOST_CONTACT)}
    if asked or {130, -signal.SIGINT, -signal.SIGTERM} & set(ended.values()):
        raise Interrupted("interrupted")
    if not ended and all(one.code == 0 for one in ranks.values()):
        return
    rank, code = next(iter(ended.items()), next((r, one.code) for r, one in ranks.items() if one.code != 0))
    if rank > 0 and rank_log(folder, rank).is_file():
        lines = rank_log(folder, rank).read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n  ".join([f"the end of {rank_log(folder, rank)}:", *lines[-LAST_LINES:]])
        print(visible(tail), file=sys.stderr)
    if code == DISK_FULL:
        raise StageFailed(no_room(folder.parent))
    if code == UserError.exit_code:
        raise SystemExit(code)  # the stage has said what is wrong
    who = f"the stage {stage}" if len(ranks) == 1 else f"the stage {stage}: rank {rank} of {len(ranks)}"
    who += f" (pid {ranks[rank].pid})"
    if code is not None and code < 0:
        raise StageFailed(f"{who} was killed by signal {-code} ({signal.Signals(-code).name}). {GO_ON}")
    if code is None or code == LOST_CONTACT:
        raise StageFailed(f"{who} lost contact with the others. {GO_ON}")
    raise StageFailed(f"{who} failed with exit code {code}")


PACKAGE_ROOT = Path(__file__).resolve().parent.parent
# First of all, it is to end with its parent (PR_SET_PDEATHSIG), which may have ended already.
# -P: a file in the user's folder that is called like a library is not imported; an uninstalled checkout must be found.
START = """import os, sys
parent, root = int(sys.argv.pop(1)), sys.argv.pop(1)
if sys.platform == 'linux':
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
if os.getppid() != parent:
    sys.exit(1)
if root not in sys.path:
    sys.path.insert(0, root)
"""
START_WORKER = f"""{START}from rlhf.worker import leave, main
leave(main())"""
GO_ON = "The same command, without --fresh, goes on from the last checkpoint."


def threads_of(recipe: Recipe, processes: int) -> int:
    """The CPU threads of each of so many processes on this machine."""
    return recipe.threads or max(1, len(os.sched_getaffinity(0)) // processes)


def environment_of(recipe: Recipe, processes: int) -> dict[str, str]:
    """What each of so many processes on this machine must find in its environment before torch is imported.

    Threads: an idle OpenMP thread spins for some microseconds and then sleeps. Spinning without end stalls two threads
    on two shared cores; sleeping at once halves the speed of a small model.
    Memory: glibc keeps what is freed for the next step; giving it back costs a third of a small model's time.
    """
    threads = str(threads_of(recipe, processes))
    found = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**36),
        "MALLOC_TOP_PAD_": str(2**27),
        "GOMP_SPINCOUNT": "3000",
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONUNBUFFERED": "1",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RLHF_RENDEZVOUS"):
        found.pop(name, None)
    return found


def keep_to_this_machine(environment: dict[str, str]) -> None:
    """Ranks that are all on this machine talk over its loopback interface: nobody else is to reach them."""
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _rank_environment(recipe: Recipe, rank: int, processes: int, meeting: Path) -> dict[str, str]:
    found = environment_of(recipe, processes)
    if processes > 1:
        found |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "RLHF_RENDEZVOUS": str(meeting),
        }
        keep_to_this_machine(found)
    return found
