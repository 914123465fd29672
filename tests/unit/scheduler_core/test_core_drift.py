"""The alarm for devices that are not what was profiled: when it comes, when it does not, when it ends."""

import math
from random import Random

import pytest

from services.latency import LatencyModel, NodeLatency, OpKind
from services.scheduler.core.commands import DriftAlarm
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.costs import NodeCosts
from services.scheduler.core.drift import DriftDetector
from services.scheduler.core.events import NodeJoined, NodeProfiled, OpFinished
from services.scheduler.core.scheduler import SchedulerCore
from tests.unit.scheduler_core.support import PREFILL_S, constant_latency, core_with, node

BAND = 0.12


def alarms(core: SchedulerCore, ratio: float, num_ops: int, begin_s: float = 0.0) -> list[DriftAlarm]:
    """Of prefills that take `ratio` times what was profiled."""
    told = []
    for index in range(num_ops):
        at_s = begin_s + index
        op = OpFinished("a", 0, OpKind.PREFILL, at_s, at_s + ratio * PREFILL_S, ("r",), 100)
        told += [command for command in core.step(at_s + 1.0, op) if isinstance(command, DriftAlarm)]
    return told


@pytest.mark.parametrize("ratio", [1.3, 2.0, 0.7])
def test_a_device_off_its_profile_raises_one_alarm_and_ends_it_when_it_is_back(ratio: float) -> None:
    core = core_with(node("a"))
    assert not alarms(core, 1.05, 200)
    (alarm,) = alarms(core, ratio, 300, 1000.0)
    assert (alarm.node_id, alarm.stage, alarm.op, alarm.active) == ("a", 0, OpKind.PREFILL, True)
    assert alarm.ratio > 1.1 if ratio > 1.0 else alarm.ratio < 0.9
    (record,) = core.op_records()["a"]
    assert record.drifting
    assert record.ratio == pytest.approx(ratio, rel=0.01)
    (ended,) = alarms(core, 1.0, 300, 2000.0)
    assert not ended.active
    assert not core.op_records()["a"][0].drifting


def test_thirty_percent_are_noticed_within_a_hundred_noisy_operations_and_noise_is_not() -> None:
    random = Random(5)
    detector = DriftDetector(BAND)
    for _ in range(10_000):
        outlier = math.log(10.0) if random.random() < 0.01 else 0.0
        assert not detector.observe(random.gauss(0.0, 0.1) + outlier, 0.1)
    slow = [detector.observe(math.log(1.3) + random.gauss(0.0, 0.1), 0.1) for _ in range(100)]
    assert slow.index(True) < 50
    assert slow.count(True) == 1, "latched"
    assert detector.active


def test_within_the_band_there_is_no_alarm_however_long() -> None:
    detector = DriftDetector(BAND)
    assert not any(detector.observe(math.log(1.1), 0.02) for _ in range(10_000))
    assert not any(detector.observe(math.log(1 / 1.1), 0.02) for _ in range(10_000))


def test_it_takes_several_operations() -> None:
    detector = DriftDetector(BAND)
    assert not any(detector.observe(math.log(1000.0), 0.1) for _ in range(6))


def test_half_way_back_is_not_back() -> None:
    detector = DriftDetector(BAND)
    assert any(detector.observe(math.log(1.3), 0.02) for _ in range(100))
    assert not any(detector.observe(math.log(1.1), 0.02) for _ in range(1000))
    assert any(detector.observe(math.log(1.02), 0.02) for _ in range(100))


def test_a_device_that_is_slow_by_turns_raises_fewer_alarms_each_time_and_patience_ends() -> None:
    detector = DriftDetector(BAND)

    def alarm_in_turn(slow: int = 150, quick: int = 450) -> bool:
        raised = True in [detector.observe(math.log(1.3), 0.02) for _ in range(slow)]
        quick_again = [detector.observe(0.0, 0.02) for _ in range(quick)]
        assert (True in quick_again) == raised, "every alarm ends"
        return raised

    turns = [alarm_in_turn() for _ in range(24)]
    assert turns[0]
    assert turns.count(True) < len(turns) // 2
    assert not any(detector.observe(0.0, 0.02) for _ in range(5000))
    slow = [detector.observe(math.log(1.3), 0.02) for _ in range(100)]
    assert slow.index(True) < 50, "as after the start"


def test_noisy_operations_need_more_to_be_off() -> None:
    def first(sigma: float) -> int:
        detector = DriftDetector(BAND)
        return next(index for index in range(1000) if detector.observe(math.log(1.4), sigma))

    assert first(0.4) > 2 * first(0.05)


def test_a_new_profile_ends_the_alarm_and_the_same_one_keeps_what_was_learnt() -> None:
    core = core_with(node("a"))
    assert alarms(core, 1.5, 100)
    core.step(500.0, NodeJoined(node("a")))
    assert core.op_records()["a"][0].drifting, "it only connected again"
    commands = core.step(501.0, NodeJoined(node("a", latency=constant_latency(prefill=1.5 * PREFILL_S))))
    (ended,) = [command for command in commands if isinstance(command, DriftAlarm)]
    assert not ended.active
    assert core.op_records()["a"] == []
    assert not alarms(core, 1.5, 100, 600.0)


def test_a_node_measured_again_starts_from_its_new_profile() -> None:
    core = core_with(node("a"))
    assert alarms(core, 1.5, 300)
    profiled = NodeProfiled("a", constant_latency(prefill=1.5 * PREFILL_S))
    (ended,) = [command for command in core.step(500.0, profiled) if isinstance(command, DriftAlarm)]
    assert (ended.node_id, ended.active) == ("a", False)
    assert core.op_records()["a"] == []
    assert not alarms(core, 1.5, 100, 600.0)


def test_the_band_is_a_setting_and_zero_switches_alarms_off() -> None:
    assert not alarms(core_with(node("a"), drift_band=0.5), 1.4, 500)
    assert alarms(core_with(node("a"), drift_band=0.5), 1.8, 500)
    assert not alarms(core_with(node("a"), drift_band=0.0), 3.0, 500)
    with pytest.raises(ValueError, match="drift_band"):
        CoreConfig(drift_band=-0.1)


def test_a_profile_that_knows_it_is_rough_has_a_wider_band() -> None:
    def first(mape: float) -> int | None:
        costs = NodeCosts(NodeLatency(({OpKind.PREFILL: LatencyModel("constant", (0.1,), mape=mape)},)), BAND)
        for index in range(500):
            costs.calibrate(0, OpKind.PREFILL, 1, 1, 0.13)
            if costs.changes:
                return index
        return None

    assert first(0.02) == first(0.1)
    assert first(0.4) is None


def test_the_ablation_without_a_profile_has_nothing_to_be_off() -> None:
    core = core_with(node("a"), policy="paper_additive", policy_options={"profile": False})
    assert not alarms(core, 3.0, 500)
