"""The study of calibration: what it promises holds on a few seeds, and it is the same for the same seed."""

import asyncio
import threading

import pytest

from bench.fidelity import __main__ as command
from bench.fidelity.calibration import (
    CASES,
    WRONG,
    StudyStopped,
    calibration_study,
    num_false_alarms,
    ops_to_learn,
    ops_to_notice,
)


def test_two_seeds_of_the_study_hold_the_promises() -> None:
    study = calibration_study(2)
    assert study["ops_to_10pct_max"] <= 200
    assert study["alarm_after_ops_max"] <= 100
    assert study["followed_after_ops_max"] <= 100
    assert study["false_alarms"] == 0.0
    assert len(study["cases"]["alarm_after_ops"]) == len(CASES)


def test_a_run_depends_on_its_seed_alone() -> None:
    case, factors = CASES[2], WRONG["x2 and /2"]
    assert ops_to_learn(case, factors, 7) == ops_to_learn(case, factors, 7)
    assert ops_to_notice(case, 7) == ops_to_notice(case, 7)
    assert num_false_alarms(case, 7) == 0


def test_the_study_ends_when_told_to() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(StudyStopped):
        calibration_study(2, stop)


def test_cancelling_the_command_stops_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    began, told = threading.Event(), []

    def study(num_seeds: int, stop: threading.Event) -> dict[str, object]:
        began.set()
        told.append(stop.wait(30.0))
        return {}

    async def cancelled() -> None:
        task = asyncio.ensure_future(command.study_calibration())
        assert await asyncio.to_thread(began.wait, 30.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    monkeypatch.setattr(command, "calibration_study", study)
    asyncio.run(cancelled())
    assert told == [True]
