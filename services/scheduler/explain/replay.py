"""Plays an event log into fresh cores and compares what they decide with what was decided. Pure but for reading."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from services.scheduler.core.commands import Command
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import Event
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.explain.log_file import Dropped, Entry, LogError, RunBegan, Step


@dataclass(frozen=True, slots=True)
class Difference:
    """The first step of a run whose commands differ."""

    line: int
    now_s: float
    event: Event
    recorded: list[Command]
    replayed: list[Command]


@dataclass(slots=True)
class RunReplay:
    """One run of the log, from its configuration line on; `difference` None: every command was the same."""

    line: int
    config: CoreConfig
    num_events: int = 0
    num_commands: int = 0
    difference: Difference | None = None


def replay(path: Path, entries: Iterable[Entry]) -> list[RunReplay]:
    """Compare every run of a log, each up to its first difference.

    Raises LogError, naming `path`, when a core refuses the configuration or steps are missing.
    """
    runs: list[RunReplay] = []
    core = None
    for entry in entries:
        match entry:
            case RunBegan(line, config):
                core = _core(path, line, config)
                runs.append(RunReplay(line, config))
            case Dropped(line, count):
                raise LogError(f"{path}: line {line}: field 'dropped': {count} steps are missing, so it has no replay")
            case Step():
                if core is not None and not _same(core, entry, runs[-1]):
                    core = None
    return runs


def _core(path: Path, line: int, config: CoreConfig) -> SchedulerCore:
    try:
        return SchedulerCore(config)
    except ValueError as error:
        raise LogError(f"{path}: line {line}: field 'config': {error}") from error


def _same(core: SchedulerCore, step: Step, run: RunReplay) -> bool:
    replayed = core.step(step.now_s, step.event)
    run.num_events += 1
    run.num_commands += len(replayed)
    if replayed == step.commands:
        return True
    run.difference = Difference(step.line, step.now_s, step.event, step.commands, replayed)
    return False
