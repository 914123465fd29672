"""Requests for an isolated adapter go to nodes that hold it."""

from dataclasses import replace

from services.scheduler.core.commands import Command, Reject
from services.scheduler.core.events import AdaptersTold, NodeJoined, NodeLost, TaskArrived, TaskEnded
from services.scheduler.core.scheduler import SchedulerCore
from tests.unit.scheduler_core.support import assigned, core_with, node
from tests.unit.scheduler_core.support import request as plain_request


def request(task_id: str, adapter_id: str = "job-1") -> TaskArrived:
    return TaskArrived(replace(plain_request(task_id), adapter_id=adapter_id))


def made(*names: str, **bounds: int) -> SchedulerCore:
    return core_with(*(node(name, **bounds) for name in names), policy="round_robin")


def refused(commands: list[Command]) -> list[str]:
    return [command.code for command in commands if isinstance(command, Reject)]


def test_only_nodes_that_hold_it_serve_it() -> None:
    core = made("a", "b", "c")
    assert core.step(1.0, AdaptersTold("b", ("job-1", "job-2"))) == []
    for index in range(3):
        assert assigned(core.step(1.0, request(f"r{index}"))) == [(f"r{index}", "b")]
    others = [assigned(core.step(1.0, request(f"s{index}", "")))[0][1] for index in range(3)]
    assert sorted(others) == ["a", "b", "c"]


def test_it_waits_for_room_on_them() -> None:
    core = made("a", "b", max_inflight_inference=1)
    core.step(1.0, AdaptersTold("b", ("job-1",)))
    core.step(1.0, request("first"))
    assert assigned(core.step(1.0, request("second"))) == []
    assert assigned(core.step(2.0, TaskEnded("first", "b", ok=True))) == [("second", "b")]


def test_without_such_a_node_it_is_refused() -> None:
    core = made("a", "b", max_inflight_inference=1)
    for name in ("a", "b"):
        core.step(1.0, AdaptersTold(name, ()))
    assert refused(core.step(1.0, request("r"))) == ["MODEL_NOT_FOUND"]
    core.step(1.0, AdaptersTold("b", ("job-1",)))
    core.step(1.0, request("runs"))
    core.step(1.0, request("waits"))
    assert refused(core.step(2.0, AdaptersTold("b", ()))) == ["MODEL_NOT_FOUND"]  # it was deleted
    assert refused(core.step(3.0, NodeLost("b"))) == ["MODEL_NOT_FOUND"]  # what ran there cannot run elsewhere


def test_a_node_that_joins_again_tells_again() -> None:
    core = made("a")
    core.step(1.0, AdaptersTold("a", ("job-1",)))
    core.step(2.0, NodeJoined(node("a")))
    core.step(3.0, AdaptersTold("a", ()))
    assert refused(core.step(3.0, request("r"))) == ["MODEL_NOT_FOUND"]
    core.step(3.0, AdaptersTold("unknown", ("job-1",)))


def test_it_waits_for_what_a_node_has_not_told_yet() -> None:
    """After a restart of the scheduler, or of the node's session, accepted requests must find the model again."""
    core = made()
    assert refused(core.step(1.0, request("r"))) == []
    for joined_s in (2.0, 4.0):
        assert refused(core.step(joined_s, NodeJoined(node("a")))) == []
        assert refused(core.step(joined_s, request(f"r{joined_s}"))) == []
        told = core.step(joined_s + 1.0, AdaptersTold("a", ("job-1",)))
        assert [node_id for _, node_id in assigned(told)] == ["a"] * len(assigned(told)) != []
    core.step(6.0, NodeJoined(node("a")))
    core.step(6.0, request("late"))
    assert refused(core.step(7.0, AdaptersTold("a", ()))) == ["MODEL_NOT_FOUND"]
