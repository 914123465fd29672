"""What the core keeps is bounded by live work, under every policy."""

import gc
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType

import pytest

from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import NodeJoined
from services.scheduler.core.policies import POLICIES
from services.scheduler.core.tasks import SloTarget
from tests.simulation.harness import Simulation, microbatches, output_lengths, requests, spec

_SHARED = (type, ModuleType, FunctionType, MethodType)
#: Longer than every running statistic's window.
NUM_TASKS = 600
RATE = 25.0
NUM_NODES = 2


def reachable(root: object) -> Iterator[object]:
    """Every object that `root` keeps alive, code and modules left out."""
    seen = {id(root)}
    stack = [root]
    while stack:
        found = stack.pop()
        yield found
        for other in gc.get_referents(found):
            if id(other) not in seen and not isinstance(other, _SHARED):
                seen.add(id(other))
                stack.append(other)


def play(policy: str, num_tasks: int) -> Simulation:
    """Requests and as many micro-batches on two nodes of two stages, all of them over at the end."""
    tasks = requests(num_tasks, RATE, seed=1)
    config = CoreConfig(
        policy=policy, default_slo=SloTarget(0.2, 0.03), max_waiting_training=num_tasks, sync_every_steps=7
    )
    simulation = Simulation(config, output_lengths(tasks, seed=2))
    for index in range(NUM_NODES):
        simulation.at(0.0, NodeJoined(spec(f"n{index}", 2)))
    simulation.offer(tasks)
    simulation.offer(microbatches(num_tasks))
    simulation.run()
    assert len(simulation.ends) == 2 * num_tasks
    return simulation


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_finished_work_leaves_nothing_behind(policy: str) -> None:
    kept = [sum(1 for _ in reachable(play(policy, num).core)) for num in (NUM_TASKS, 2 * NUM_TASKS)]
    # Numbers that happen to be equal are one object or two, so the count is not exact.
    assert kept[1] <= kept[0] + 40


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_finished_task_is_remembered_by_name(policy: str) -> None:
    simulation = play(policy, NUM_TASKS)
    names = [item for item in reachable(simulation.core) if isinstance(item, str) and item in simulation.tasks]
    # The paper's forecast keeps the backwards that end after the last forward: at most a window's worth per node.
    assert len(names) <= NUM_NODES * simulation.config.max_inflight_training
