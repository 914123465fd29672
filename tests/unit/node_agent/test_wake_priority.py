"""Which processes the kernel wakes first. In processes of their own: the priority of this one stays."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux grants wake priorities")

_ASK = """
import json, os, subprocess, sys, threading
from services.node_agent.engine.emulated import wake_priority
{deny}
granted = wake_priority.wake_first()
inherited = []
thread = threading.Thread(target=lambda: inherited.append(os.sched_getscheduler(0)))
thread.start()
thread.join()
child = "import os; print(os.sched_getscheduler(0))"
inherited.append(int(subprocess.run([sys.executable, "-c", child], capture_output=True, check=True).stdout))
policy = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK
print(json.dumps([granted, policy == os.SCHED_FIFO, inherited, os.nice(0)]))
"""
_DENY = """
def denied(*arguments):
    raise PermissionError(1, "Operation not permitted")
os.sched_setscheduler = denied
os.nice(3)
"""


def _ask(deny: str = ""):
    done = subprocess.run([sys.executable, "-c", _ASK.format(deny=deny)], capture_output=True, check=True, text=True)
    return json.loads(done.stdout)


def test_the_best_that_is_granted_is_for_this_thread_alone():
    granted, is_real_time, inherited, _ = _ask()
    assert granted in ("real_time", "short_slice")
    assert is_real_time == (granted == "real_time")
    assert inherited == [0, 0]


def test_without_the_right_to_real_time_a_short_slice_is_asked_for_and_niceness_stays():
    granted, is_real_time, inherited, nice = _ask(_DENY)
    assert granted == "short_slice"
    assert not is_real_time
    assert inherited == [0, 0]
    assert nice == 3
