"""Simulations side by side, and how an interrupt ends them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bench.colocation.pool import side_by_side

_LIMIT_S = 60.0
#: A pool whose jobs never end: each tells its process id, then waits for ever.
_ENDLESS = """
import asyncio, os, signal, sys, threading
# Whatever goes wrong, it ends.
signal.alarm(60)
from bench.colocation.pool import side_by_side
from bench.live.interrupt import run_interruptible

def job(number):
    os.write(1, f"{os.getpid()}\\n".encode())
    threading.Event().wait()

async def work():
    with side_by_side(job, 2) as do:
        await asyncio.to_thread(do, [1, 2, 3, 4])

if __name__ == "__main__":
    try:
        run_interruptible(work())
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)
"""


def test_results_come_in_the_order_of_the_jobs():
    with side_by_side(abs, 2) as do:
        assert do([-3, 2, -1]) == [3, 2, 1]


def test_an_error_of_a_job_is_passed_on():
    with pytest.raises(TypeError), side_by_side(abs, 1) as do:
        do(["a word"])


@pytest.mark.parametrize("is_group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_jobs_that_run_and_leaves_no_process(tmp_path: Path, number: int, is_group: bool):
    script = tmp_path / "endless.py"
    script.write_text(_ENDLESS)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    try:
        assert parent.stdout is not None
        # Bounded: all processes end by their own alarm, and the pipe with them.
        workers = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
        (os.killpg if is_group else os.kill)(parent.pid, number)
        _, errors = parent.communicate(timeout=_LIMIT_S)
        assert parent.returncode == 130
        assert errors == ""
        assert not any(worker.is_running() for worker in workers)
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)
            parent.communicate(timeout=_LIMIT_S)
