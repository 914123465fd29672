"""The smallest time scale whose clock slip is small enough."""

import pytest

from bench.fidelity import clock
from bench.fidelity.clock import Load, Overloaded, check_load, smallest_time_scale, traffic
from bench.live.emulated import ClockSlip
from bench.live.errors import LiveError
from bench.live.requests import RequestRecord, Status

SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)


@pytest.mark.parametrize("needed", [0.5, 1.0, 3.0, 4.0, 16.0])
async def test_the_smallest_scale_under_the_limit_is_found(needed):
    asked = []

    async def p99_slip(scale):
        asked.append(scale)
        return 0.02 * needed / scale * 0.99

    choice = await smallest_time_scale(p99_slip, SCALES)
    assert choice.time_scale == min(scale for scale in SCALES if scale >= needed)
    assert list(choice.tried) == sorted(asked)
    assert len(asked) == len(set(asked)) <= 3


async def test_it_is_said_when_no_scale_keeps_time():
    async def p99_slip(scale):
        return 0.02

    choice = await smallest_time_scale(p99_slip, SCALES)
    assert choice.time_scale is None
    assert max(choice.tried) == 16.0


def test_arrivals_are_scaled_and_lengths_are_not():
    (once, backlog), (thrice, none) = traffic(Load(seconds=30.0), 1.0), traffic(Load(seconds=90.0, trains=False), 3.0)
    assert [3.0 * item.at_s for item in once] == pytest.approx([item.at_s for item in thrice])
    assert [item.max_tokens for item in once] == [item.max_tokens for item in thrice]
    assert all(item.at_s < 90.0 for item in thrice)
    assert backlog is not None
    assert none is None


def test_a_load_that_did_not_run_is_no_measure():
    ended = RequestRecord("a", "", 0.0, 0.0, Status.OK)
    check_load([ended])
    refused = RequestRecord("b", "", 0.0, 0.0, Status.REJECTED, error="HTTP 429: full")
    with pytest.raises(Overloaded, match="1 of 2 requests rejected: HTTP 429: full"):
        check_load([ended, refused])
    failed = RequestRecord("c", "", 0.0, 0.0, Status.FAILED, error="HTTP 500")
    with pytest.raises(LiveError, match="1 of 2 requests failed: HTTP 500"):
        check_load([refused, failed])


def test_an_overloaded_scale_does_not_keep_time(tmp_path, monkeypatch, capsys):
    async def measure(load, time_scale, directory):
        if time_scale < 8.0:
            raise Overloaded("1 of 2 requests unfinished")
        return ClockSlip(ops=10, p50=0.001, p99=0.01, worst_s=0.001, total=0.001, wake_priority="usual"), {}

    monkeypatch.setattr(clock, "measure", measure)
    assert clock.main(["--out", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "does not keep time: 1 of 2 requests unfinished" in told
    assert told.splitlines()[-1].endswith(": 8")
