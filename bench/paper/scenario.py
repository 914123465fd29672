"""One simulated run: the cluster and the settings that every policy gets alike. The defaults are those of the grid.

4 nodes of 2 stages in prefill mode: a request is one prefill and yields one token, so its response time is its time to
first token. Durations grow with the square of the length (the paper's form), a backward takes twice its forward, the
optimizer step takes no time. The response-time unit is the mean forward of a stage times the stages; a request is
promised `SLO_UNITS` of them. Operations hold one request each (`max_batch` 1), as in the paper.

In decode mode a request yields `OUTPUTS` tokens. A decode iteration costs a constant, because it reads the weights
whatever the batch, and a share per token of context; up to `DECODE_BATCH` requests share one. Its promise holds for the
time to first token and, in units of an iteration, for the time per token.

Training in flight is bounded alike for every policy, and generously, so that a policy and not a bound decides: up to 32
micro-batches per node, in the scheduler and on the node, and 1,024 that the scheduler may look at. Their weights are
stashed (`weight_handling`), with gradients of two groups per stage, so nothing drains at an optimizer step.

Every node can cut a training operation into up to `MAX_TRAINING_PARTS` pieces for whichever policy asks for it. The
pieces of an operation together take 5 % longer than the whole (`SimulationConfig.cut_overhead`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from random import Random
from statistics import NormalDist
from typing import Any

from bench.paper.traffic import LENGTHS, Lengths, tasks
from services.latency import LatencyModel, NodeLatency, OpKind
from services.node_agent.core.types import NodeCoreConfig
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.tasks import SloTarget
from services.simulator.cluster import Simulation
from services.simulator.lengths import LogNormal
from services.simulator.types import Microbatch, SimulationConfig, SimulationResult, VirtualNode, Work

NODES, STAGES = 4, 2
PREFILL, DECODE = "prefill", "decode"
SLO_UNITS = 5.0
#: Time a node stays held after its last task.
HOLD_S = 10.0
MAX_TRAINING_PARTS = 64
#: What every node gets.
NODE: Mapping[str, Any] = {
    "max_batch": 1,
    "max_prefill_tokens": 1,
    "weight_handling": "stash",
    "gradient_buffers": 2,
    "max_inflight_training": 32,
}
#: What the scheduler gets, whatever the policy.
SCHEDULER: Mapping[str, Any] = {"max_waiting_training": 1024, "max_inflight_training": 32, "hold_s": HOLD_S}

#: Requests decoded together.
DECODE_BATCH = 16
#: Tokens a request yields in decode mode.
OUTPUTS = LogNormal.of(64, 48, shortest=1, longest=512)
#: A decode iteration in mean forwards: what it costs at least, and more for this many tokens of context.
_DECODE_BASE, _DECODE_FULL, _FULL_CONTEXT = 0.1, 0.1, DECODE_BATCH * 300


@dataclass(frozen=True, slots=True)
class Point:
    """A place in the grid: tasks per second, share of them that is training, mean forward of a stage in seconds."""

    rate: float
    training_share: float
    mean_forward_s: float

    @property
    def load_nodes(self) -> float:
        """Nodes that the offered work would keep busy, without decoding."""
        return self.rate * self.mean_forward_s * (1.0 + 2.0 * self.training_share)


@dataclass(frozen=True, slots=True)
class Run:
    """One policy on one input.

    options: of the policy. noise: relative standard deviation of the durations. belief_error: standard deviation of the
    logarithm of the factor, one per node, by which the scheduler's latency models are wrong. swing, cv: arrivals follow
    a day (0: they do not) and clump (1: Poisson), see `traffic`. accumulation: micro-batches per optimizer step. node:
    further fields of `NodeCoreConfig`. link_bytes_per_s: between a stage and its host. also: further figures for the
    row, from what happened. simulation: instead of the cluster and the tasks of this module, without a bound.
    """

    point: Point
    policy: str
    seed: int
    num_tasks: int
    options: tuple[tuple[str, float | int | bool | str], ...] = ()
    nodes: int = NODES
    stages: int = STAGES
    mode: str = PREFILL
    lengths: Lengths = LENGTHS
    swing: float = 0.0
    cv: float = 1.0
    noise: float = 0.0
    belief_error: float = 0.0
    accumulation: int = 1
    node: tuple[tuple[str, Any], ...] = ()
    link_bytes_per_s: float = math.inf
    also: Callable[["Run", SimulationResult], Mapping[str, Any]] | None = None
    simulation: Callable[["Run"], SimulationResult] | None = None

    @property
    def unit_s(self) -> float:
        """The response-time unit."""
        return self.point.mean_forward_s * self.stages

    @property
    def slo(self) -> SloTarget:
        """What requests are promised."""
        tpot_s = SLO_UNITS * _DECODE_BASE * self.unit_s if self.mode == DECODE else None
        return SloTarget(ttft_s=SLO_UNITS * self.unit_s, tpot_s=tpot_s)

    @property
    def has_bound(self) -> bool:
        """Whether the clairvoyant bound holds: not for batches or noisy durations."""
        return self.mode == PREFILL and not self.noise and self.simulation is None


def latency(run: Run) -> NodeLatency:
    """A node whose stages take the mean forward for a mean task. However lengths spread, the mean work is the same."""
    mean_s = run.point.mean_forward_s
    correction = _cut_share(LENGTHS.shape) / _cut_share(run.lengths.shape)
    per_square = mean_s / run.lengths.shape.mean_square * correction
    models = {
        OpKind.PREFILL: LatencyModel("quadratic", (per_square,)),
        OpKind.TRAIN_FORWARD: LatencyModel("quadratic", (per_square,)),
        OpKind.TRAIN_BACKWARD: LatencyModel("quadratic", (2.0 * per_square,)),
        OpKind.OPTIMIZER_STEP: LatencyModel("constant", (0.0,)),
    }
    if run.mode == DECODE:
        models[OpKind.DECODE] = LatencyModel("affine", (_DECODE_BASE * mean_s, _DECODE_FULL * mean_s / _FULL_CONTEXT))
    return NodeLatency((models,) * run.stages)


def _cut_share(lengths: LogNormal) -> float:
    """E[l^2] of the clamped lengths over that of the unclamped ones; the short end does not matter."""
    normal, log_longest = NormalDist(lengths.mu, lengths.sigma), math.log(lengths.longest)
    inside = normal.cdf(log_longest - 2.0 * lengths.sigma**2)
    return inside + lengths.longest**2 * (1.0 - normal.cdf(log_longest)) / lengths.mean_square


def work(run: Run) -> list[Work]:
    """The tasks. The same for every policy and every mean forward."""
    point = run.point
    outputs = OUTPUTS if run.mode == DECODE else None
    name = f"{run.seed}/{point.rate:g}/{point.training_share:g}"
    drawn = tasks(
        name, run.num_tasks, point.rate, point.training_share, run.slo, run.lengths, outputs, swing=run.swing, cv=run.cv
    )
    return [replace(task, accumulation=run.accumulation) if isinstance(task, Microbatch) else task for task in drawn]


def cluster(run: Run) -> list[VirtualNode]:
    """The nodes."""
    truth = latency(run)
    batch = {"max_batch": DECODE_BATCH} if run.mode == DECODE else {}
    core = NodeCoreConfig(num_stages=run.stages, **{**NODE, **batch, **dict(run.node)})
    random = Random(f"{run.seed}/belief")
    return [
        VirtualNode(
            node_id=f"node-{index}",
            latency=truth,
            believed=_scaled(truth, random.lognormvariate(0.0, run.belief_error)) if run.belief_error else None,
            core=core,
            max_training_parts=MAX_TRAINING_PARTS,
            host_link_bytes_per_s=run.link_bytes_per_s,
        )
        for index in range(run.nodes)
    ]


def _scaled(node: NodeLatency, factor: float) -> NodeLatency:
    """The same models, wrong by a factor."""
    return NodeLatency(
        tuple(
            {op: LatencyModel(model.form, tuple(factor * c for c in model.coefficients)) for op, model in stage.items()}
            for stage in node.models
        )
    )


def configuration(run: Run) -> SimulationConfig:
    """How it is simulated; the policy keeps its own defaults unless the run names options."""
    core = CoreConfig(
        policy=run.policy,
        policy_options=dict(run.options),
        default_slo=run.slo,
        slo_unit_s=run.unit_s,
        **SCHEDULER,
    )
    return SimulationConfig(core=core, seed=run.seed, noise=run.noise)


def simulate(run: Run) -> SimulationResult:
    """Run it to the end."""
    if run.simulation is not None:
        return run.simulation(run)
    return Simulation(configuration(run), cluster(run), work(run)).run()
