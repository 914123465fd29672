"""Scenarios whose transcripts are kept in `golden`: one per policy, each touching what that policy is about."""

from collections.abc import Callable

from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import JobCancelled, NodeJoined, NodeLost, TaskCancelled
from services.scheduler.core.tasks import SloTarget
from tests.simulation.harness import Simulation, microbatches, output_lengths, requests, spec

SLO = SloTarget(ttft_s=0.2, tpot_s=0.03)


def _mixed(policy: str, num_nodes: int, num_stages: int, **config: object) -> Simulation:
    """Requests and a training job on equal nodes."""
    tasks = requests(24, 15.0, seed=3)
    simulation = Simulation(
        CoreConfig(policy=policy, default_slo=SLO, max_inflight_training=2, **config),  # type: ignore[arg-type]
        output_lengths(tasks, seed=4),
    )
    for index in range(num_nodes):
        simulation.at(0.0, NodeJoined(spec(f"n{index}", num_stages)))
    simulation.offer(tasks)
    simulation.offer(microbatches(16))
    return simulation


def round_robin() -> Simulation:
    """Two nodes, replicas averaged every three steps."""
    return _mixed("round_robin", 2, 1, sync_every_steps=3)


def separate() -> Simulation:
    """Three nodes; the one that serves is lost and another takes over."""
    simulation = _mixed("separate", 3, 1, sync_every_steps=4)
    simulation.at(0.8, NodeLost("n0", "lease expired"))
    return simulation


def paper_additive() -> Simulation:
    """Two nodes of two stages."""
    return _mixed("paper_additive", 2, 2)


def lemix() -> Simulation:
    """Two nodes, one of them slow; a cancelled request, a cancelled job, a node that is lost and comes back."""
    tasks = requests(30, 25.0, seed=5)
    simulation = Simulation(
        CoreConfig(policy="lemix", default_slo=SLO, max_inflight_training=2, max_hold_back_s=0.5),
        output_lengths(tasks, seed=6),
        accumulation=2,
    )
    simulation.at(0.0, NodeJoined(spec("fast")))
    simulation.at(0.0, NodeJoined(spec("slow", slowdown=2.0)))
    simulation.offer(tasks)
    simulation.offer(microbatches(12))
    simulation.offer(microbatches(4, job_id="unwanted"))
    simulation.at(tasks[4].arrival_s + 0.001, TaskCancelled("r4"))
    simulation.at(0.3, JobCancelled("unwanted"))
    simulation.at(0.6, NodeLost("fast", "lease expired"))
    simulation.at(1.0, NodeJoined(spec("fast")))
    return simulation


SCENARIOS: dict[str, Callable[[], Simulation]] = {
    scenario.__name__: scenario for scenario in (lemix, paper_additive, round_robin, separate)
}
