"""The processes of one stage: who they are, what they agree on, and how they notice that one of them is lost.

A process is a *rank*. `rlhf run --processes N` starts N of them on this machine; a launcher such as `accelerate launch`
may start them as well, on several machines too. Each writes its pid beside its log in STAGE/ranks/, and watches the
others: one that has died or was stopped is named, and all end within seconds instead of waiting for it for ever.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import psutil

from rlhf.errors import StageFailed, UserError
from rlhf.rundir import read_json, write_json

T = TypeVar("T")
R = TypeVar("R")

DISK_FULL = 74  # exit code of a rank, not the first one, that had no room to write, and so can't say so
LOST_CONTACT = 75  # exit code of a rank that ended because another one did
MEET_SECONDS = 120.0  # all ranks must have come together within this time
STOPPED_SECONDS = 10.0  # a rank that has been stopped for so long is lost
BEHIND_SECONDS = 600.0  # a rank that hasn't reached the step at which another one waits for so long is lost
POLL_SECONDS = 1.0


class Team:
    """The ranks of a stage. With a single one, every method is trivial and nothing distributed is started."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns once every rank has come here."""
        if self.size > 1:
            from torch import distributed

            distributed.barrier()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on every rank."""
        if self.size == 1:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value)
        return found

    def from_main(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank."""
        if self.size == 1:
            return make()
        from torch import distributed

        box = [make() if self.is_main else None]
        distributed.broadcast_object_list(box, src=0)
        return cast(T, box[0])

    def share(self, items: Sequence[T], compute: Callable[[list[T]], list[R]]) -> list[R]:
        """`compute` over the items, one result each: every rank computes its part, all get all results in order."""
        if self.size == 1:
            return compute(list(items))
        mine = list(items[self.rank :: self.size])
        parts = self.gather(compute(mine) if mine else [])
        results: list[Any] = [None] * len(items)
        for rank, part in enumerate(parts):
            results[rank :: self.size] = part
        return results

    def largest(self, *values: int) -> list[int]:
        """The largest of each value over the ranks."""
        if self.size == 1:
            return list(values)
        import torch
        from torch import distributed

        found = torch.tensor(values, dtype=torch.int64)
        distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
        return [int(value) for value in found]

    def add(self, values: Sequence[float]) -> list[float]:
        """The sum of each value over the ranks, in float64."""
        if self.size == 1:
            return list(values)
        import torch
        from torch import distributed

        found = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(found)
        return [float(value) for value in found]

    def check_same(self, what: str, value: Any) -> None:
        """Raises StageFailed, naming the rank, where a value that must be the same on every rank is not."""
        found = self.gather(value)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise StageFailed(f"rank {rank} of {self.size} disagrees with rank 0 on {what}: {other} and {found[0]}")

    def leave(self) -> None:
        """Ends the connection to the others."""
        if self.size > 1:
            from torch import distributed

            distributed.destroy_process_group()


def rank_in_environment() -> tuple[int, int]:
    """(rank, ranks in all) as a launcher or our own parent says in the environment; (0, 1) where nobody does."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise UserError(f"the environment says RANK={rank} and WORLD_SIZE={size}, which no launcher does")
    return int(rank), int(size)


def join_team() -> Team:
    """Meets the other ranks. Raises StageFailed where they don't all come."""
    rank, size = rank_in_environment()
    if size == 1:
        return Team()
    import torch
    from torch import distributed

    cuda = torch.cuda.is_available()
    rendezvous = os.environ.get("RLHF_RENDEZVOUS")  # a file, with our own parent; a launcher gives address and port
    try:
        store = distributed.FileStore(rendezvous, size) if rendezvous else None
        waiting = timedelta(seconds=MEET_SECONDS)
        if store is not None:
            store.set_timeout(waiting)
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            rank=rank,
            world_size=size,
            store=store,
            # what ranks wait for may take hours (one packs the texts for all): lost ones are noticed by the watch
            timeout=timedelta(days=2),
        )
        team = Team(rank, size)
        ranks = team.gather(rank)
    except (RuntimeError, ValueError) as error:
        raise StageFailed(f"rank {rank} of {size} could not meet the others: {str(error).splitlines()[0]}") from None
    if sorted(ranks) != list(range(size)):
        raise StageFailed(f"{size} processes were to come together, but these came: {ranks}")
    return team


def lost_contact(error: BaseException) -> bool:
    """Whether an error says no more than that another rank has gone."""
    from torch import distributed

    if isinstance(error, distributed.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("connection closed by peer", "connection reset by peer", "gloo", "nccl")
    )


# Watching


class Loss(NamedTuple):
    """A rank that is lost, and how."""

    rank: int
    pid: int
    how: str

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid}) {self.how}"


def rank_file(folder: Path, rank: int) -> Path:
    """Where a rank says which process it is."""
    return folder / f"rank-{rank}.json"


def rank_log(folder: Path, rank: int) -> Path:
    """Where the output of a rank other than 0 goes."""
    return folder / f"rank-{rank}.log"


def announce(folder: Path, rank: int) -> None:
    """Says which process a rank is, and forgets the step that one before it had reached."""
    (folder / f"rank-{rank}.step").unlink(missing_ok=True)
    write_json(rank_file(folder, rank), {"rank": rank, "pid": os.getpid(), "host": socket.gethostname()})


class Watch:
    """Finds the ranks on this machine that have died or were stopped, from their processes' states."""

    def __init__(self, pids: dict[int, int], *, ended: bool = True) -> None:
        """`pids` maps ranks to processes. Without `ended`, one that has died is not counted: its parent sees it."""
        self._processes: dict[int, psutil.Process | None] = {}
        self._ended = ended
        self._pids, self._stopped_since = pids, dict.fromkeys(pids, 0.0)
        for rank, pid in pids.items():
            try:
                self._processes[rank] = psutil.Process(pid)
            except psutil.NoSuchProcess:
                self._processes[rank] = None

    def lost(self) -> Loss | None:
        """The first rank that is lost, if one is."""
        for rank, process in self._processes.items():
            how = self._how(rank, process)
            if how:
                return Loss(rank, self._pids[rank], how)
        return None

    def _how(self, rank: int, process: psutil.Process | None) -> str:
        try:
            status = process.status() if process is not None and process.is_running() else psutil.STATUS_DEAD
        except psutil.NoSuchProcess:
            status = psutil.STATUS_DEAD
        if status in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE):
            return "has ended" if self._ended else ""
        if status != psutil.STATUS_STOPPED:
            self._stopped_since[rank] = 0.0
            return ""
        now = time.monotonic()
        self._stopped_since[rank] = self._stopped_since[rank] or now
        spent = now - self._stopped_since[rank]
        return f"has been stopped for {spent:.0f} s" if spent >= STOPPED_SECONDS else ""


class PeerWatch(threading.Thread):
    """A rank's own watch over the others, and over how long it waits for them; ends the process when one is lost."""

    def __init__(self, folder: Path, team: Team) -> None:
        super().__init__(name="peer-watch", daemon=True)
        host = socket.gethostname()
        self._folder, self._team = folder, team
        found = [read_json(rank_file(folder, rank)) or {} for rank in range(team.size)]
        self._watch = Watch(
            {
                rank: int(facts["pid"])
                for rank, facts in enumerate(found)
                if rank != team.rank and facts.get("host") == host
            }
        )
        self._waits_since, self._step, self._ending = 0.0, -1, threading.Event()

    def reached(self, step: int) -> None:
        """Tells that this rank is at a step and now waits for the others there."""
        self._step, self._waits_since = step, time.monotonic()
        (self._folder / f"rank-{self._team.rank}.step").write_text(f"{step}\n")

    def met(self) -> None:
        """Tells that the others have come."""
        self._waits_since = 0.0

    def end(self) -> None:
        """Stops watching: this rank has done its work."""
        self._ending.set()

    def run(self) -> None:
        """Looks once a second."""
        while not self._ending.wait(POLL_SECONDS):
            lost = self._watch.lost() or self._behind()
            if lost and not self._ending.wait(2 * POLL_SECONDS):
                print(f"error: {lost}; rank {self._team.rank} ends too", file=sys.stderr, flush=True)
                if "stopped" in lost.how:
                    os.kill(lost.pid, signal.SIGKILL)
                os._exit(LOST_CONTACT)

    def lost(self) -> Loss | None:
        """The rank that is lost, once more than an error says so."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            found = self._watch.lost()
            if found:
                return found
            time.sleep(0.1)
        return None

    def _behind(self) -> Loss | None:
        """A rank that has not come to the step at which this one waits."""
        since = self._waits_since
        if not since or time.monotonic() - since < BEHIND_SECONDS:
            return None
        for rank in range(self._team.size):
            if rank == self._team.rank:
                continue
            try:
                step = int((self._folder / f"rank-{rank}.step").read_text())
            except (OSError, ValueError):
                step = -1
            if step < self._step:
                facts = read_json(rank_file(self._folder, rank)) or {}
                how = f"is at step {step} and has not come to step {self._step} within {BEHIND_SECONDS:.0f} s"
                return Loss(rank, int(facts.get("pid", -1)), how)
        return None
