"""Ranks: what they share, agree on and notice. Two real processes that meet in a file, no Accelerate."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlhf.errors import StageFailed
from rlhf.runtime import Interrupts
from rlhf.team import STOPPED_SECONDS, PeerWatch, Team, Watch, announce, lost_contact
from rlhf.worker import disk_full
from tests.conftest import ROOT

SCRIPT = """
import sys
from rlhf.team import join_team
team = join_team()
"""


def in_two_processes(tmp_path: Path, body: str) -> list[tuple[int, str]]:
    """Exit code and output of both ranks."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT + body],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "RLHF_RENDEZVOUS": str(tmp_path / "meeting"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    return [(process.wait(120), process.communicate()[0]) for process in processes]


def test_two_ranks_share_gather_and_add(tmp_path: Path) -> None:
    body = """
assert team.size == 2 and team.is_main == (team.rank == 0)
for n in (0, 1, 2, 7):
    seen = []
    found = team.share(range(n), lambda mine: [seen.append(i) or (i, i * i) for i in mine])
    assert found == [(i, i * i) for i in range(n)], found
    assert seen == list(range(team.rank, n, 2))
assert team.gather(team.rank * 10) == [0, 10]
assert team.from_main(lambda: f"from {team.rank}") == "from 0"
assert team.add([1.5, team.rank]) == [3.0, 1.0]
assert team.largest(team.rank, -team.rank, 5) == [1, 0, 5]
team.check_same("nothing", 4)
try:
    team.check_same("the rank", team.rank)
except Exception as error:
    print(error)
team.wait()
team.leave()
"""
    for code, said in in_two_processes(tmp_path, body):
        assert code == 0, said
        assert "rank 1 of 2 disagrees with rank 0 on the rank: 1 and 0" in said


def test_a_rank_that_dies_is_an_error_on_the_other_that_says_no_more(tmp_path: Path) -> None:
    body = """
import os
from rlhf.team import lost_contact
if team.rank == 1:
    os._exit(9)
try:
    team.wait()
except Exception as error:
    sys.exit(0 if lost_contact(error) else 3)
"""
    (mine, said), (other, _) = in_two_processes(tmp_path, body)
    assert (mine, other) == (0, 9), said


def test_one_rank_is_trivial() -> None:
    team = Team()
    assert team.is_main
    assert team.share([3, 1, 2], lambda items: [item + 1 for item in items]) == [4, 2, 3]
    assert team.gather("a") == ["a"]
    assert team.largest(True, False, 7) == [1, 0, 7]
    team.check_same("itself", 1.0)
    team.wait()


def test_a_difference_between_ranks_is_named() -> None:
    class Two(Team):
        def gather(self, value: object) -> list[object]:  # type: ignore[override]
            return [1, 1, 2]

    with pytest.raises(StageFailed, match="rank 2 of 3 disagrees with rank 0 on the weights: 2 and 1"):
        Two(0, 3).check_same("the weights", 1)


def test_the_watch_finds_the_dead_and_the_stopped_only(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    try:
        watch = Watch({rank: process.pid for rank, process in enumerate(processes)})
        assert watch.lost() is None
        processes[1].send_signal(signal.SIGSTOP)
        while psutil.Process(processes[1].pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        assert watch.lost() is None  # it may be continued in a moment
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + STOPPED_SECONDS + 1)
        lost = watch.lost()
        assert lost is not None
        assert (lost.rank, lost.pid) == (1, processes[1].pid)
        assert "stopped" in lost.how
        processes[1].send_signal(signal.SIGCONT)
        while psutil.Process(processes[1].pid).status() == psutil.STATUS_STOPPED:
            time.sleep(0.01)
        assert watch.lost() is None
        processes[0].kill()
        processes[0].wait()
        lost = watch.lost()
        assert lost is not None
        assert (lost.rank, lost.how) == (0, "has ended")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_rank_that_does_not_come_to_a_step_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rank-2.step").write_text("99\n")  # of a run before
    for rank in range(3):
        announce(tmp_path, rank)
    assert not (tmp_path / "rank-2.step").exists()
    (tmp_path / "rank-1.step").write_text("5\n")
    (tmp_path / "rank-2.step").write_text("4\n")
    watch = PeerWatch(tmp_path, Team(0, 3))
    watch.reached(5)
    assert watch._behind() is None  # it may need some time
    monkeypatch.setattr("rlhf.team.BEHIND_SECONDS", -1.0)
    lost = watch._behind()
    assert lost is not None
    assert lost.rank == 2
    assert "is at step 4 and has not come to step 5" in lost.how
    watch.met()
    assert watch._behind() is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("connection reset by peer"), False),
    ],
)
def test_only_the_networks_errors_are_lost_contact(error: Exception, expected: bool) -> None:
    assert lost_contact(error) == expected


def test_a_full_disk_is_known_from_the_error_or_what_led_to_it() -> None:
    assert disk_full(OSError(28, "No space left on device"))
    assert not disk_full(OSError(2, "No such file"))
    assert disk_full(RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/4: file write failed"))
    wrapped = ValueError("could not save")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert disk_full(wrapped)


def test_a_signal_waits_for_the_end_of_a_step_only_where_it_is_deferred() -> None:
    seen = []

    def step(interrupts: Interrupts) -> None:
        with interrupts.deferred():
            signal.raise_signal(signal.SIGTERM)
            seen.append(interrupts.asked)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        interrupts = Interrupts()
        interrupts.install()
        with pytest.raises(KeyboardInterrupt):  # nobody has answered it by the end of the block
            step(interrupts)
        assert seen == [True]
        Interrupts().install()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
