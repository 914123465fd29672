"""Golden transcripts: what the core decides in fixed scenarios, event by event.

A difference is a change of behaviour. If it is meant, write the files again with LEMIX_REWRITE_GOLDEN=1, read the diff
line by line, and commit it with the change that caused it.
"""

import json
import os
from pathlib import Path

import pytest

from services.scheduler.core.codec import (
    command_from_json,
    command_to_json,
    config_from_json,
    config_to_json,
    event_from_json,
)
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.scheduler import SchedulerCore
from tests.simulation.harness import LogEntry, Simulation
from tests.simulation.scenarios import SCENARIOS

GOLDEN = Path(__file__).parent / "golden"


def transcript(simulation: Simulation) -> str:
    """Short form for people: time, event, and the commands it led to; traces that led to nothing are left out."""
    lines = []
    for entry in simulation.log:
        if entry.event["type"] == "OpFinished" and not entry.commands:
            continue
        lines.append(f"{entry.now_s:.4f} {_short(entry.event)}")
        lines += [f"    -> {_short(command)}" for command in entry.commands]
    return "\n".join(lines) + "\n"


def _short(data: dict[str, object]) -> str:
    """One line: numbers to 4 digits, terms as node=score, the latency model left out."""
    parts = []
    for name, value in data.items():
        if name == "terms" and isinstance(value, list):
            scores = " ".join(f"{terms['node_id']}={terms['score']:.4f}" for terms in value)
            parts.append(f"[{scores}]")
        elif isinstance(value, dict):
            parts.append(f"{name}=({_short(value)})" if name != "latency" else "latency=...")
        elif isinstance(value, float):
            parts.append(f"{name}={value:.4f}")
        elif isinstance(value, list):
            parts.append(f"{name}={','.join(str(item) for item in value)}")
        elif name == "type":
            parts.append(str(value))
        else:
            parts.append(f"{name}={value}")
    return " ".join(parts)


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_transcript_is_unchanged(name: str) -> None:
    simulation = SCENARIOS[name]()
    simulation.run()
    path = GOLDEN / f"{name}.txt"
    actual = transcript(simulation)
    if os.environ.get("LEMIX_REWRITE_GOLDEN") == "1":
        path.write_text(actual, encoding="utf-8")
    assert actual == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_scenario_ends_every_task_once(name: str) -> None:
    simulation = SCENARIOS[name]()
    simulation.run()
    assert {task_id: len(ends) for task_id, ends in simulation.ends.items()} == dict.fromkeys(simulation.tasks, 1)
    snapshot = simulation.core.snapshot()
    assert (snapshot.waiting_inference, snapshot.waiting_training) == (0, 0)
    assert all(node.inflight_inference == node.inflight_training == 0 for node in snapshot.nodes)


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_same_seed_same_log(name: str) -> None:
    logs: list[list[LogEntry]] = []
    for _ in range(2):
        simulation = SCENARIOS[name]()
        simulation.run()
        logs.append(simulation.log)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_replay_of_an_event_log_gives_the_same_commands(name: str) -> None:
    simulation = SCENARIOS[name]()
    header = json.dumps(config_to_json(simulation.config))
    simulation.run()
    lines = [json.dumps([entry.now_s, entry.event, entry.commands]) for entry in simulation.log]
    core = SchedulerCore(config_from_json(json.loads(header)))
    for line in lines:
        now_s, event, commands = json.loads(line)
        replayed = core.step(now_s, event_from_json(event))
        assert [json.loads(json.dumps(command_to_json(command))) for command in replayed] == commands
        assert replayed == [command_from_json(command) for command in commands]


def test_replay_under_another_configuration_differs() -> None:
    simulation = SCENARIOS["lemix"]()
    simulation.run()
    core = SchedulerCore(CoreConfig(policy="round_robin"))
    replayed = [core.step(entry.now_s, event_from_json(entry.event)) for entry in simulation.log]
    assert [[command_to_json(command) for command in commands] for commands in replayed] != [
        entry.commands for entry in simulation.log
    ]
