"""Child processes: logs, ends, descendants, and death with the parent."""

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from deploy.local.process import ROOT, ChildProcess

# A program that starts a child of its own, says so and waits; "deaf" ignores SIGTERM.
PROGRAM = """
import signal, subprocess, sys
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print("started", child.pid, flush=True)
signal.pause()
"""
DYING = "import sys\nfor n in range(50): print('line', n)\nsys.exit(3)\n"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start a module made of some source; everything it left is killed at the end."""
    running = []
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}

    def start(source, *arguments, name="part"):
        (tmp_path / f"{name}.py").write_text(source)
        child = ChildProcess(name, name, arguments, tmp_path / "logs" / f"{name}.log", environment)
        child.start()
        running.append(child)
        return child

    yield start
    for child in running:
        for process in child.descendants():
            process.kill()
        child.kill()


async def logged(child, text):
    """Wait until the child's log holds some text; returns the log."""
    deadline = 500
    while text not in child.tail():
        assert not await child.wait(0.02), child.tail()
        deadline -= 1
        assert deadline, "the child said nothing"
    return child.tail()


async def test_a_stopped_service_leaves_no_descendant(start):
    child = start(PROGRAM)
    pid = int((await logged(child, "started")).split()[-1])
    assert [process.pid for process in child.descendants()] == [pid]
    await child.stop(5.0)
    assert child.exit_code == -signal.SIGTERM
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def test_a_service_deaf_to_sigterm_is_killed(start):
    child = start(PROGRAM, "deaf")
    await logged(child, "started")
    await child.stop(0.2)
    assert child.exit_code == -signal.SIGKILL


async def test_a_dead_service_has_its_exit_code_and_the_end_of_its_log(start):
    child = start(DYING)
    assert await child.wait(5.0)
    assert child.exit_code == 3
    assert child.tail(2) == "line 48\nline 49"
    await child.stop(1.0)  # stopping what has ended does nothing
    assert child.exit_code == 3


async def test_started_again_it_appends_to_its_log_and_shows_the_new_part(start):
    child = start(DYING)
    await child.wait(5.0)
    before = child.log_path.stat().st_size
    child.start()
    await child.wait(5.0)
    assert child.log_path.stat().st_size == 2 * before
    assert len(child.tail(1000).splitlines()) == 50


async def test_killed_as_in_a_crash(start):
    child = start(PROGRAM)
    await logged(child, "started")
    orphans = child.descendants()
    child.kill()
    assert await child.wait(5.0)
    assert child.exit_code == -signal.SIGKILL
    await child.stop(5.0)  # the orphan is in its process group
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in orphans)


def test_not_started_is_an_error_not_a_guess(tmp_path):
    child = ChildProcess("x", "x", [], tmp_path / "x.log", {})
    assert (child.running, child.exit_code, child.tail()) == (False, None, "")
    with pytest.raises(RuntimeError, match="never started"):
        _ = child.pid


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for a signal at the parent's death")
def test_services_die_with_a_launcher_killed_by_force(tmp_path):
    (tmp_path / "part.py").write_text("import signal\nsignal.pause()\n")
    launcher = textwrap.dedent(
        f"""
        import os, pathlib, signal
        from deploy.local.process import ChildProcess
        environment = {{**os.environ, "PYTHONPATH": "{ROOT}:{tmp_path}"}}
        child = ChildProcess("part", "part", [], pathlib.Path("{tmp_path}/part.log"), environment)
        child.start()
        print(child.pid, flush=True)
        signal.pause()
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        child = psutil.Process(int(process.stdout.readline()))
        process.kill()
    _, left = psutil.wait_procs([child], timeout=5)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in left)  # unless init reaps it at leisure
