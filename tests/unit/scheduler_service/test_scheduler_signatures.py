"""Failure signatures in the driver: what it hears of, the metric, the log, and that it looks again by itself."""

import asyncio
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from services.ledger import open_ledger
from services.scheduler import driver as driver_module
from services.scheduler.checkpoints import CheckpointDesk
from services.scheduler.core.events import Tick
from services.scheduler.core.tasks import SloTarget
from services.scheduler.driver import Driver
from services.scheduler.explain.live import LiveTasks
from services.scheduler.explain.signatures import Signature, Signatures
from services.scheduler.failover import Failover
from services.scheduler.guard import LedgerGuard
from services.scheduler.inbox import Ended, Told
from tests.unit.scheduler_service.driver_rig import Rig


@pytest.fixture
def log() -> Iterator[list[Any]]:
    with capture_logs() as lines:
        yield lines


@pytest.fixture
async def rig() -> Rig:
    rig = Rig(await open_ledger(f"memory://{uuid.uuid4().hex}"))
    live = LiveTasks()
    rig.driver = Driver(
        core=rig.core,
        inbox=rig.inbox,
        guard=LedgerGuard(rig.ledger),
        nodes=rig.peers,  # type: ignore[arg-type]
        gateways=rig.peers,  # type: ignore[arg-type]
        jobs=rig.peers,
        failover=Failover(CheckpointDesk(), on=False),
        clock=rig.clock,
        live=live,
        signatures=Signatures(live, SloTarget()),
    )
    return await rig.lead()


def gauge(signature: Signature) -> float | None:
    return REGISTRY.get_sample_value("lemix_scheduler_failure_signature", {"signature": signature.value})


def failed(number: int, code: ErrorCode, *, trains: bool) -> Ended:
    """A task that a node could not run."""
    outcome = work_pb2.WorkOutcome(task_id=f"t{number}", node_id="n1")
    error = LemixError(code, "out of memory").to_proto()
    if trains:
        outcome.training.job_id = "j"
        outcome.training.error.CopyFrom(error)
    else:
        outcome.inference.error.CopyFrom(error)
    return Ended(outcome)


async def test_a_signature_sets_its_gauge_and_is_logged_once_when_it_begins_and_ends(rig: Rig, log: list[Any]) -> None:
    for number in range(3):
        await rig.handle(failed(number, ErrorCode.RESOURCE_EXHAUSTED, trains=number == 1))
        rig.clock.advance(2.0)
    await rig.handle(Told(Tick()))
    assert gauge(Signature.MEMORY_EXHAUSTED) == 1.0
    assert gauge(Signature.SLO_COLLAPSE) == gauge(Signature.TRAINING_STARVED) == 0.0
    rig.clock.advance(60.0)
    await rig.handle(Told(Tick()))
    assert gauge(Signature.MEMORY_EXHAUSTED) == 0.0
    begins, ended = log
    assert (begins["log_level"], begins["event"]) == ("warning", "failure begins")
    assert begins["signature"] == "memory_exhausted"
    assert begins["memory_failures"] == 3
    assert "n1" in begins["advice"]
    assert (ended["log_level"], ended["event"]) == ("info", "failure ended")
    assert ended["memory_failures"] == 0


async def test_other_failures_are_no_want_of_memory(rig: Rig, log: list[Any]) -> None:
    for number in range(5):
        await rig.handle(failed(number, ErrorCode.INTERNAL, trains=True))
    rig.clock.advance(2.0)
    await rig.handle(Told(Tick()))
    assert gauge(Signature.MEMORY_EXHAUSTED) == 0.0
    assert log == []


async def test_an_idle_driver_looks_again_while_something_is_wrong(
    rig: Rig, log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        await rig.handle(failed(number, ErrorCode.RESOURCE_EXHAUSTED, trains=False))
    rig.clock.advance(2.0)
    await rig.handle(Told(Tick()))
    assert gauge(Signature.MEMORY_EXHAUSTED) == 1.0
    rig.clock.advance(60.0)
    monkeypatch.setattr(driver_module, "_LOOK_S", 0.001)
    ticked = asyncio.Event()
    rig.core.answers[Tick] = lambda event: ticked.set() or []
    running = asyncio.create_task(rig.driver.run())
    await asyncio.wait_for(ticked.wait(), 5.0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert gauge(Signature.MEMORY_EXHAUSTED) == 0.0
    assert rig.driver._timeout_s() is None
