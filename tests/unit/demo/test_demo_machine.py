"""Facts about the machine, and CPU time by role."""

import os
import subprocess

import pytest

from bench import machine
from bench.live.cpu import CpuMeter, role_of


def test_facts_have_the_published_keys():
    facts = machine.machine()
    assert {"cpu", "cores", "gpu"} <= set(facts)
    assert facts["cores"] >= 1


def test_cpu_name_from_the_kernel(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor\t: 0\nmodel name\t: Example 9000 @ 3 GHz\n")
    assert machine.cpu_name(path) == "Example 9000 @ 3 GHz"


def test_cpu_name_elsewhere(tmp_path):
    assert machine.cpu_name(tmp_path / "missing")


def test_commit_of_a_checkout_and_its_changes(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert machine.git_commit(tmp_path / "nowhere") == "unknown"
    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    clean = machine.git_commit(tmp_path)
    assert len(clean) == 12
    (tmp_path / "file").write_text("two")
    assert machine.git_commit(tmp_path) == f"{clean}-dirty"


@pytest.mark.parametrize(
    ("process", "role"),
    [
        ("node-0", "node_agents"),
        ("node-12/1", "stage_workers"),
        ("scheduler", "scheduler"),
        ("gateway/0", "gateway"),
        ("redis", "redis"),
    ],
)
def test_roles(process, role):
    assert role_of(process) == role


def test_cpu_time_is_the_difference_of_the_samples():
    meter = CpuMeter()
    meter.sample({"demo": os.getpid()})
    begin = os.times()
    while os.times().user + os.times().system - begin.user - begin.system < 0.05:
        sum(range(10_000))
    meter.sample({"demo": os.getpid(), "ghost": 2**22 + 1})
    assert 0.04 <= meter.totals_s()["demo"] < 1.0
    assert "ghost" not in meter.totals_s()


def test_what_others_use_is_the_rest_of_the_machine():
    meter = CpuMeter()
    meter.sample({})
    begin = os.times()
    while os.times().user + os.times().system - begin.user - begin.system < 0.1:
        sum(range(10_000))
    meter.sample({})
    assert meter.totals_s()["other_programs"] >= 0.05  # this test, which nobody told the meter about


def test_cores_are_those_of_this_process():
    assert machine.usable_cores() == len(machine.usable_core_ids()) >= 1
