"""Reads a scheduler's event log as the steps of its newest run."""

from pathlib import Path

from bench.fidelity.trace import Step, Trace, trace_of
from bench.live.errors import LiveError
from services.scheduler.explain import log_file


def read(path: Path) -> tuple[Trace, list[log_file.Step]]:
    """The run a log holds, and its steps. Raises LiveError when it is no log, or one with holes."""
    steps: list[log_file.Step] = []
    config = None
    try:
        for entry in log_file.read_log(path):
            if isinstance(entry, log_file.Step):
                steps.append(entry)
            elif isinstance(entry, log_file.RunBegan):
                config, steps = entry.config, []
            else:
                raise LiveError(f"{path}: the scheduler left {entry.count} steps out of its event log")
    except log_file.LogError as error:
        raise LiveError(str(error)) from error
    if config is None:
        raise LiveError(f"{path}: holds no run")
    return trace_of(config, (_plain(step) for step in steps)), steps


def _plain(step: log_file.Step) -> Step:
    return step.now_s, step.event, step.commands
