"""Processes that share the work on texts: as many as there are cores, results in order, ended with their parent.

They are started anew (not forked: the parent may have threads of torch and tokenizers), know the steps from the
beginning, and import nothing heavy. With one process the work is done in the parent itself. The results don't depend
on how many there are.
"""

import multiprocessing
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from rlhf.errors import StageFailed

K = TypeVar("K")
T = TypeVar("T")
R = TypeVar("R")
Work = Callable[[Any, Any], Any]  # of what is known from the beginning and one item

AHEAD = 2  # items for each process that wait or are being worked on

_known: Any = None  # in a worker: what it was given at its start


class Workers:
    """So many processes, started when they are needed."""

    def __init__(self, processes: int, known: Any = None) -> None:
        """`known` is given to each at its start; it must be possible to pickle it."""
        self._processes, self._known = processes, known
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is None:
            return
        if error is not None:
            for process in list((self._pool._processes or {}).values()):  # don't wait for what nobody wants any more
                process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def in_order(self, work: Callable[[Any, T], R], items: Iterable[tuple[K, T]]) -> Iterator[tuple[K, R]]:
        """What `work`, a function of a module, makes of the second of each two, with the first, which stays here; in
        the order of the items. Raises StageFailed where a process has died.
        """
        if self._processes == 1:
            for kept, item in items:
                yield kept, work(self._known, item)
            return
        pool = self._started()
        waiting: deque[tuple[K, Future[R]]] = deque()
        try:
            for kept, item in items:
                waiting.append((kept, pool.submit(_do, work, item)))
                if len(waiting) > AHEAD * self._processes:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BrokenProcessPool:
            raise StageFailed(
                "one of the processes that prepare the texts was killed (was there too little memory?); the same "
                "command goes on with what is done, and with fewer processes where the recipe says threads: N"
            ) from None

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            known = pickle.dumps(self._known)
            self._pool = ProcessPoolExecutor(
                self._processes, multiprocessing.get_context("spawn"), _begin, (os.getpid(), known)
            )
        return self._pool


def _begin(parent: int, known: bytes) -> None:
    """The first thing that a worker does: it is to end with its parent, which may have ended already."""
    global _known
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    _known = pickle.loads(known)


def _do(work: Work, item: Any) -> Any:
    return work(_known, item)
