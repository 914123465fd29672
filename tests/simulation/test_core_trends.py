"""What the policies trade against each other, on fake nodes: packing, response, training."""

import pytest

from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import NodeJoined
from services.scheduler.core.tasks import SloTarget
from tests.simulation.harness import Simulation, microbatches, output_lengths, requests, spec

SLO = SloTarget(ttft_s=0.2, tpot_s=0.03)
NUM_REQUESTS = 120


def play(policy: str, *, rate: float = 12.0, num_microbatches: int = 0, **options: float) -> Simulation:
    """Two equal nodes under Poisson traffic."""
    tasks = requests(NUM_REQUESTS, rate, seed=11)
    config = CoreConfig(
        policy=policy, policy_options=dict(options), default_slo=SLO, max_waiting_training=max(1, num_microbatches)
    )
    simulation = Simulation(config, output_lengths(tasks, seed=12))
    for node_id in ("a", "b"):
        simulation.at(0.0, NodeJoined(spec(node_id)))
    simulation.offer(tasks)
    simulation.offer(microbatches(num_microbatches))
    simulation.run()
    return simulation


def share_of_first_node(simulation: Simulation) -> float:
    nodes = [placed[-1][1] for task_id, placed in simulation.assignments.items() if task_id.startswith("r")]
    return nodes.count("a") / len(nodes)


def ttft_attainment(simulation: Simulation) -> float:
    kept = 0
    for entry in simulation.log:
        if entry.event["type"] == "OpFinished" and entry.event["first_token"]:
            kept += sum(entry.now_s - simulation.tasks[task_id].arrival_s <= 0.2 for task_id in entry.event["task_ids"])
    return kept / NUM_REQUESTS


def test_opening_nodes_later_packs_more() -> None:
    def share(open_at: float) -> float:
        return share_of_first_node(play("lemix", rate=30.0, open_at=open_at, slo_fraction=0.05, dwell_s=0.1))

    shares = [share(open_at) for open_at in (0.1, 0.3, 0.5, 1.0)]
    assert shares == sorted(shares)
    assert shares[0] < 0.55
    assert shares[-1] > 0.9


def mean_response_s(simulation: Simulation) -> float:
    responses = [
        ends[0][0] - simulation.tasks[task_id].arrival_s
        for task_id, ends in simulation.ends.items()
        if task_id.startswith("r")
    ]
    return sum(responses) / len(responses)


def test_lemix_responds_sooner_than_first_come_first_served() -> None:
    lemix, naive = (play(policy, rate=20.0, num_microbatches=400) for policy in ("lemix", "round_robin"))
    assert ttft_attainment(lemix) >= 0.98
    assert mean_response_s(lemix) < 0.8 * mean_response_s(naive)


def test_lemix_trains_faster_than_separate_clusters() -> None:
    def last_step_s(simulation: Simulation) -> float:
        return max(ends[0][0] for task_id, ends in simulation.ends.items() if task_id.startswith("job"))

    # All of it can be seen, and what is left at the end would run on one node.
    lemix = play("lemix", num_microbatches=400, backlog_s=1.0)
    separate = play("separate", num_microbatches=400)
    assert last_step_s(lemix) < 0.8 * last_step_s(separate)


@pytest.mark.parametrize("policy", ["lemix", "paper_additive", "round_robin", "separate"])
def test_everything_accepted_ends_well(policy: str) -> None:
    simulation = play(policy, num_microbatches=100)
    assert set(simulation.ends) == set(simulation.tasks)
    assert all([how for _, how in ends] == ["ok"] for ends in simulation.ends.values())
