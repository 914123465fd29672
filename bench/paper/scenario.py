"""One simulated run: the cluster, the traffic and the settings that every policy gets alike.

4 nodes of 2 stages in prefill mode: a request is one prefill and yields one token, so its response time is its time to
first token. Durations grow with the square of the length (the paper's form), a backward takes twice its forward, the
optimizer step takes no time. The response-time unit is the mean forward of a stage times the stages; a request is
promised `SLO_UNITS` of them. Operations hold one request each (`max_batch` 1), as in the paper.

Training in flight is bounded alike for every policy, and generously, so that a policy and not a bound decides: up to 32
micro-batches per node, in the scheduler and on the node, and 1,024 that the scheduler may look at. Their weights are
stashed (`weight_handling`), so nothing drains at an optimizer step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from services.latency import LatencyModel, NodeLatency, OpKind
from services.node_agent.core.types import NodeCoreConfig
from services.scheduler.core.types import CoreConfig, SloTarget
from services.simulator.arrivals import poisson
from services.simulator.clairvoyant import clairvoyant_node_s, demands
from services.simulator.cluster import Simulation
from services.simulator.lengths import LogNormal
from services.simulator.metrics import held_intervals, measure
from services.simulator.types import Microbatch, Request, SimulationConfig, SimulationResult, VirtualNode, Work

NODES, STAGES = 4, 2
MODE = "prefill"
SLO_UNITS = 5.0
#: Time a node stays held after its last task.
HOLD_S = 10.0
#: Of prompts and training examples, tokens.
LENGTHS = LogNormal.of(250, 150, shortest=8, longest=1024)
#: What every node gets.
NODE: Mapping[str, Any] = {
    "num_stages": STAGES,
    "max_batch": 1,
    "max_prefill_tokens": 1,
    "weight_handling": "stash",
    "max_inflight_training": 32,
}
#: What the scheduler gets, whatever the policy.
SCHEDULER: Mapping[str, Any] = {"max_waiting_training": 1024, "max_inflight_training": 32, "hold_s": HOLD_S}


@dataclass(frozen=True, slots=True)
class Point:
    """A place in the grid: tasks per second, share of them that is training, mean forward of a stage in seconds."""

    rate: float
    training_share: float
    mean_forward_s: float

    @property
    def unit_s(self) -> float:
        """The response-time unit."""
        return self.mean_forward_s * STAGES

    @property
    def load_nodes(self) -> float:
        """Nodes that the offered work would keep busy."""
        return self.rate * self.mean_forward_s * (1.0 + 2.0 * self.training_share)


@dataclass(frozen=True, slots=True)
class Run:
    """One policy on one input."""

    point: Point
    policy: str
    seed: int
    num_tasks: int


@dataclass(frozen=True, slots=True)
class Details:
    """What a chart of a single run needs: when each node was held, and the responses of its requests in order."""

    policy: str
    slo_s: float
    last_arrival_s: float
    held: dict[str, list[tuple[float, float]]]
    responses_s: list[float]


def latency(mean_forward_s: float) -> NodeLatency:
    """A node whose stages take `mean_forward_s` for the forward of a mean task."""
    per_square = mean_forward_s / LENGTHS.mean_square
    models = {
        OpKind.PREFILL: LatencyModel("quadratic", (per_square,)),
        OpKind.TRAIN_FORWARD: LatencyModel("quadratic", (per_square,)),
        OpKind.TRAIN_BACKWARD: LatencyModel("quadratic", (2.0 * per_square,)),
        OpKind.OPTIMIZER_STEP: LatencyModel("constant", (0.0,)),
    }
    return NodeLatency((models,) * STAGES)


def work(run: Run) -> list[Work]:
    """The tasks: Poisson arrivals, lognormal lengths. The same for every policy and every mean forward."""
    point = run.point
    slo = SloTarget(ttft_s=SLO_UNITS * point.unit_s)
    random = Random(f"{run.seed}/{point.rate:g}/{point.training_share:g}")
    arrivals = poisson(random, point.rate)
    tasks: list[Work] = []
    for index in range(run.num_tasks):
        at_s, length = next(arrivals), LENGTHS.draw(random)
        if random.random() < point.training_share:
            tasks.append(Microbatch(f"m{index}", at_s, "job", 1, length))
        else:
            tasks.append(Request(f"r{index}", at_s, length, 1, 1, slo))
    return tasks


def cluster(point: Point) -> list[VirtualNode]:
    """The nodes."""
    model, core = latency(point.mean_forward_s), NodeCoreConfig(**NODE)
    return [VirtualNode(node_id=f"node-{index}", latency=model, core=core) for index in range(NODES)]


def configuration(run: Run) -> SimulationConfig:
    """How it is simulated; the policy keeps its own defaults."""
    unit_s = run.point.unit_s
    core = CoreConfig(
        policy=run.policy, default_slo=SloTarget(ttft_s=SLO_UNITS * unit_s), slo_unit_s=unit_s, **SCHEDULER
    )
    return SimulationConfig(core=core, seed=run.seed)


def simulate(run: Run) -> SimulationResult:
    """Run it to the end."""
    return Simulation(configuration(run), cluster(run.point), work(run)).run()


def row(run: Run) -> dict[str, Any]:
    """The published figures of one run."""
    point = run.point
    metrics = measure(simulate(run), slo_s=SLO_UNITS * point.unit_s, hold_s=HOLD_S)
    bound_s = clairvoyant_node_s(demands(work(run), cluster(point)), HOLD_S)
    return {
        "mode": MODE,
        "rate": point.rate,
        "training_share": point.training_share,
        "mean_forward_s": point.mean_forward_s,
        "policy": run.policy,
        "seed": run.seed,
        "n_tasks": metrics.num_tasks,
        "n_ok": metrics.num_ok,
        "n_requests": metrics.num_requests,
        "slo_units": SLO_UNITS,
        "tasks_per_node_s": metrics.tasks_per_node_s,
        "tasks_per_held_node_s": metrics.tasks_per_held_node_s,
        "slo_attainment": metrics.slo_attainment,
        "utilisation": metrics.utilisation,
        "held_node_s": metrics.held_node_s,
        "clairvoyant_node_s": bound_s,
        "efficiency": bound_s / metrics.held_node_s if metrics.num_ok == metrics.num_tasks else None,
        "nodes_used": metrics.nodes_used,
        "makespan_s": metrics.makespan_s,
        "response_p50_s": _finite(metrics.response_p50_s),
        "response_p99_s": _finite(metrics.response_p99_s),
        "worst_response_slos": _finite(metrics.worst_response_slos),
        "mean_training_response_s": metrics.mean_training_response_s,
    }


def _finite(value: float) -> float | None:
    """None for the response of a request that never got one: JSON has no infinity."""
    return value if math.isfinite(value) else None


def details(run: Run) -> Details:
    """The same run again, with what the charts of a single point show."""
    result = simulate(run)
    return Details(
        run.policy,
        SLO_UNITS * run.point.unit_s,
        max(record.work.arrival_s for record in result.tasks.values()),
        held_intervals(result, HOLD_S),
        sorted(record.response_s for record in result.requests()),
    )
