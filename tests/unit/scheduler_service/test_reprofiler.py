"""Nodes that are off their profile are measured again when they are idle, not before and not for ever."""

from types import SimpleNamespace
from typing import Any

import pytest

from lemix.errors import ErrorCode, LemixError
from services.latency import NodeLatency, OpKind
from services.runtime.clock import FakeClock
from services.scheduler.core.events import NodeProfiled
from services.scheduler.inbox import Inbox, Told
from services.scheduler.reprofiler import Reprofiler

NEW = NodeLatency(({},))


class Scene:
    """Two nodes, "a" off its profile, and a profiler that may fail."""

    def __init__(self) -> None:
        self.inflight = {"a": 0, "b": 0}
        self.drifting = {"a": True, "b": False}
        self.gone: set[str] = set()
        self.failure: LemixError | None = None
        self.measured: list[tuple[str, str, float]] = []
        self.clock = FakeClock(monotonic_s=0.0)
        self.inbox = Inbox(16)
        self.reprofiler = Reprofiler(
            core=self,  # type: ignore[arg-type]
            profiles=self,
            nodes=self,
            inbox=self.inbox,
            clock=self.clock,
            idle_s=10.0,
            budget_s=7.0,
        )

    def snapshot(self) -> Any:
        nodes = [
            SimpleNamespace(node_id=node_id, inflight_inference=count, inflight_training=0)
            for node_id, count in self.inflight.items()
        ]
        return SimpleNamespace(nodes=nodes)

    def op_records(self) -> Any:
        return {name: [SimpleNamespace(op=OpKind.DECODE, drifting=flag)] for name, flag in self.drifting.items()}

    def address(self, node_id: str) -> str:
        return "" if node_id in self.gone else f"{node_id}:1"

    async def measure_again(self, node_id: str, address: str, budget_s: float) -> NodeLatency:
        self.measured.append((node_id, address, budget_s))
        if self.failure is not None:
            raise self.failure
        return NEW

    async def look_at(self, *times_s: float) -> None:
        for now_s in times_s:
            self.clock.advance(now_s - self.clock.monotonic_s())
            await self.reprofiler.look()


async def test_an_idle_node_off_its_profile_is_measured_once_and_the_core_told() -> None:
    scene = Scene()
    await scene.look_at(0.0, 5.0, 9.9)
    assert scene.measured == []
    await scene.look_at(10.0, 20.0, 200.0)
    assert scene.measured == [("a", "a:1", 7.0)]
    assert await scene.inbox.get(0.0) == Told(NodeProfiled("a", NEW))
    await scene.look_at(311.0)
    assert len(scene.measured) == 2


async def test_work_begins_the_wait_anew() -> None:
    scene = Scene()
    await scene.look_at(0.0, 8.0)
    scene.inflight["a"] = 1
    await scene.look_at(9.0)
    scene.inflight["a"] = 0
    await scene.look_at(12.0, 21.0)
    assert scene.measured == []
    await scene.look_at(22.0)
    assert len(scene.measured) == 1


async def test_who_was_not_looked_at_during_a_measurement_waits_anew() -> None:
    scene = Scene()
    scene.drifting["b"] = True
    await scene.look_at(0.0, 10.0)
    assert [name for name, _, _ in scene.measured] == ["a"]
    await scene.look_at(70.0, 79.0)
    assert len(scene.measured) == 1
    await scene.look_at(80.0)
    assert [name for name, _, _ in scene.measured] == ["a", "b"]


@pytest.mark.parametrize("change", ["on its profile", "gone"])
async def test_others_are_left_alone(change: str) -> None:
    scene = Scene()
    scene.drifting["a"] = change != "on its profile"
    scene.gone = {"a"} if change == "gone" else set()
    await scene.look_at(0.0, 11.0, 400.0)
    assert scene.measured == []


async def test_a_failure_is_not_repeated_at_once() -> None:
    scene = Scene()
    scene.failure = LemixError(ErrorCode.UNAVAILABLE, "the profiler is away")
    await scene.look_at(0.0, 11.0, 20.0, 100.0)
    assert len(scene.measured) == 1
    assert await scene.inbox.get(0.0) is None
    await scene.look_at(312.0)
    assert len(scene.measured) == 2
