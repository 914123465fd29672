"""Event logs of whole runs, written as the scheduler writes them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from services.scheduler.core.commands import Command
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import Event
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.event_log import EventLog
from services.simulator import cluster
from services.simulator.types import SimulationConfig, SimulationResult, VirtualNode, Work


def recorded(
    path: Path, config: CoreConfig, step: Callable[[float, Event], list[Command]]
) -> tuple[EventLog, Callable[[float, Event], list[Command]]]:
    """A log, which the caller closes, and the core's step that writes to it."""
    log = EventLog(path, config)

    def logged(now_s: float, event: Event) -> list[Command]:
        commands = step(now_s, event)
        log.add(now_s, event, commands)
        return commands

    return log, logged


def simulate(
    path: Path,
    config: SimulationConfig,
    nodes: Sequence[VirtualNode],
    work: Sequence[Work],
    monkeypatch: pytest.MonkeyPatch,
) -> SimulationResult:
    """Run the simulator with an event log."""
    logs: list[EventLog] = []

    class LoggedCore(SchedulerCore):
        def __init__(self, core: CoreConfig) -> None:
            super().__init__(core)
            log, self.step = recorded(path, core, super().step)  # type: ignore[method-assign]
            logs.append(log)

    with monkeypatch.context() as patched:
        patched.setattr(cluster, "SchedulerCore", LoggedCore)
        result = cluster.Simulation(config, nodes, work).run()
    for log in logs:
        log.close()
    return result
