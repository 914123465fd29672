"""Processes that simulate, which an interrupt ends at once."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")

#: The parent's to handle: they reach the whole process group.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: How long killed processes may take to be gone.
_KILL_TIMEOUT_S = 5.0


@contextmanager
def side_by_side(
    function: Callable[[_Job], _Result], processes: int
) -> Iterator[Callable[[Sequence[_Job]], list[_Result]]]:
    """What does jobs, `processes` at a time, and brings what they give in the same order; several threads may ask.

    Left by an exception it kills what runs and drops what waits; whoever still asks gets an exception.
    """
    before = set(multiprocessing.active_children())
    # spawn: a forked child would inherit the threads of the parent in an undefined state.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_ignore_signals)

    def do(jobs: Sequence[_Job]) -> list[_Result]:
        with _signals_blocked():
            asked: list[Future[_Result]] = [pool.submit(function, job) for job in jobs]
        return [future.result() for future in asked]

    try:
        yield do
    except BaseException:
        # From here on no process is started, so that none is missed.
        pool.shutdown(wait=False, cancel_futures=True)
        workers = set(multiprocessing.active_children()) - before
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join(_KILL_TIMEOUT_S)
        raise
    pool.shutdown()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process started meanwhile inherits the mask: a signal cannot meet it before it ignores them."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
