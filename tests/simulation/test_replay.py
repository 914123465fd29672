"""A recorded run replays through a fresh core to the same commands, under every policy."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.node_agent.core.types import NodeCoreConfig
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import NodeJoined, NodeLost, TaskCancelled
from services.scheduler.core.policies import POLICIES
from services.scheduler.core.tasks import SloTarget
from services.scheduler.explain.log_file import LogError, read_log
from services.scheduler.explain.replay import RunReplay, replay
from services.simulator.types import Microbatch, Request, SimulationConfig, VirtualNode, Work
from tests.simulation.harness import Simulation, latency, microbatches, output_lengths, requests, spec
from tests.simulation.recorded import recorded, simulate

SLO = SloTarget(ttft_s=0.2, tpot_s=0.03)


def replayed(path: Path) -> list[RunReplay]:
    return replay(path, read_log(path))


def record(path: Path, policy: str, *, seed: int = 0, lost_s: float = 1.0) -> Path:
    """Requests, a job, a cancelled request, synchronisations, a node that is lost and comes back."""
    tasks = requests(25, 25.0, seed=seed)
    config = CoreConfig(policy=policy, default_slo=SLO, sync_every_steps=3, max_hold_back_s=0.5)
    simulation = Simulation(config, output_lengths(tasks, seed=seed))
    log, simulation.core.step = recorded(path, config, simulation.core.step)  # type: ignore[method-assign]
    for index in range(3):
        simulation.at(0.0, NodeJoined(spec(f"n{index}", slowdown=1.0 + index / 3)))
    simulation.offer(tasks)
    simulation.offer(microbatches(12))
    simulation.at(tasks[5].arrival_s + 0.001, TaskCancelled("r5"))
    simulation.at(lost_s, NodeLost("n0", "lease expired"))
    simulation.at(lost_s + 0.5, NodeJoined(spec("n0")))
    simulation.run()
    log.close()
    return path


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_recorded_run_replays_to_the_same_commands(policy: str, tmp_path: Path) -> None:
    (run,) = replayed(record(tmp_path / "log", policy))
    assert run.difference is None
    assert (run.config.policy, run.line) == (policy, 1)
    assert run.num_events > 100
    assert run.num_commands > 37, "every task was assigned, and some waited"


@settings(max_examples=30, deadline=None)
@given(policy=st.sampled_from(sorted(POLICIES)), seed=st.integers(0, 1000), lost_s=st.floats(0.0, 3.0))
def test_whatever_happens_replays(
    policy: str, seed: int, lost_s: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = record(tmp_path_factory.mktemp("log") / "log", policy, seed=seed, lost_s=lost_s)
    assert [run.difference for run in replayed(path)] == [None]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_simulators_log_replays(policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = NodeCoreConfig(num_stages=2, max_batch=4)
    nodes = [
        VirtualNode(node_id=f"n{index}", latency=latency(2), core=core, max_training_parts=4) for index in range(3)
    ]
    work: list[Work] = [
        Request(task.task_id, task.arrival_s, task.prompt_tokens, 1 + index % 30, 64, SLO)
        for index, task in enumerate(requests(40, 30.0, seed=1))
    ]
    work += [Microbatch(f"m{index}", 0.0, "job", 1, 128, 2) for index in range(20)]
    config = SimulationConfig(core=CoreConfig(policy=policy, default_slo=SLO), noise=0.1, dispatch_s=0.001)
    simulate(tmp_path / "log", config, nodes, work, monkeypatch)
    (run,) = replayed(tmp_path / "log")
    assert run.difference is None
    assert run.num_commands >= len(work)


def test_the_first_difference_is_found_with_its_line(tmp_path: Path) -> None:
    path = record(tmp_path / "log", "round_robin")
    lines = path.read_text("utf-8").splitlines()
    assigned = [number for number, line in enumerate(lines) if '"Assign"' in line]
    for number in (assigned[5], assigned[9]):
        data = json.loads(lines[number])
        data["commands"][0]["node_id"] = "elsewhere"
        lines[number] = json.dumps(data)
    path.write_text("\n".join([*lines, ""]))
    (run,) = replayed(path)
    assert run.difference is not None
    assert run.difference.line == assigned[5] + 1
    assert [replace(ours, node_id="elsewhere") for ours in run.difference.replayed[:1]] == run.difference.recorded[:1]  # type: ignore[arg-type,call-arg]


def test_every_run_of_a_log_is_replayed_by_itself(tmp_path: Path) -> None:
    path = record(tmp_path / "log", "lemix")
    lines = path.read_text("utf-8").splitlines(keepends=True)
    record(path, "separate", seed=1)
    # A changed policy makes the first run differ, and leaves the second alone.
    config = json.loads(lines[0])
    config["config"]["policy"] = "round_robin"
    path.write_text(json.dumps(config) + "\n" + "".join(path.read_text("utf-8").splitlines(keepends=True)[1:]))
    first, second = replayed(path)
    assert first.difference is not None
    assert (second.line, second.config.policy, second.difference) == (len(lines) + 1, "separate", None)


def test_a_log_with_missing_steps_has_no_replay(tmp_path: Path) -> None:
    path = record(tmp_path / "log", "lemix")
    with path.open("a") as file:
        file.write('{"dropped":3}\n')
    with pytest.raises(LogError, match=r"log: line \d+: field 'dropped': 3 steps are missing"):
        replayed(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"policy": "magic"}, "unknown policy 'magic'"),
        ({"policy": "lemix", "policy_options": {"magic": 1}}, "policy 'lemix' has no option 'magic'"),
    ],
)
def test_a_configuration_no_core_takes_is_refused(config: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(json.dumps({"version": 1, "config": config}) + "\n")
    with pytest.raises(LogError, match=f"log: line 1: field 'config': {message}"):
        replayed(path)
