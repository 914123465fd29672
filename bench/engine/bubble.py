"""Idle stage time under a training backlog: the node core on four simulated stages, per schedule."""

from bench.engine.figures import Figure
from services.latency import LatencyModel, NodeLatency, OpKind
from services.node_agent.core.types import ASYNC, SCHEDULES, NodeCoreConfig
from services.scheduler.core.config import CoreConfig
from services.simulator.cluster import Simulation
from services.simulator.types import Microbatch, SimulationConfig, VirtualNode

STAGES = 4
#: Behind each other without a pause; the span has one start and one end of the pipeline.
MICROBATCHES = 512
TARGET = 0.05
#: Seconds of an op on a stage; backward twice the forward, as in the engine.
_SECONDS = {
    OpKind.PREFILL: 0.05,
    OpKind.DECODE: 0.01,
    OpKind.TRAIN_FORWARD: 0.1,
    OpKind.TRAIN_BACKWARD: 0.2,
    OpKind.OPTIMIZER_STEP: 0.02,
}


def measure(sizes: tuple[int, ...] = (4, 16, 64)) -> list[Figure]:
    """Bubble rate of a schedule by micro-batches per optimizer step.

    A pipeline that empties for every step of M micro-batches idles for (S-1)/(M+S-1) with equal ops. Where that is
    above the target, what drains cannot meet it: the figure stands beside it without a verdict.
    """
    figures = []
    for size in sizes:
        textbook = (STAGES - 1) / (size + STAGES - 1)
        for schedule, handling in ((ASYNC, "stash"), *((schedule, "drain") for schedule in SCHEDULES)):
            empties = handling == "drain"
            bound = f" (textbook {textbook:.3f})" if empties else ""
            name = f"bubble rate, {schedule}, {handling}, {size} per step{bound}"
            target = None if empties and textbook > TARGET else TARGET
            figures.append(Figure(name, "", (bubble_rate(schedule, handling, size),), target, at_least=False))
    return figures


def bubble_rate(schedule: str, weight_handling: str, size: int) -> float:
    """Share of the span of the stages in which they are idle: between a stage's first begin and its last end."""
    core = NodeCoreConfig(
        num_stages=STAGES,
        training_schedule=schedule,
        weight_handling=weight_handling,
        gradient_buffers=STAGES if weight_handling == "stash" else 1,
        max_inflight_training=2 * STAGES,
    )
    latency = NodeLatency(({kind: LatencyModel("constant", (value,)) for kind, value in _SECONDS.items()},) * STAGES)
    node = VirtualNode(node_id="n0", latency=latency, core=core)
    work = [Microbatch(f"m{index}", 0.0, "job", 1, 100, size) for index in range(MICROBATCHES)]
    scheduler = CoreConfig(policy="lemix", max_inflight_training=2 * STAGES, max_waiting_training=MICROBATCHES)
    result = Simulation(SimulationConfig(core=scheduler), [node], work).run()
    if {record.outcome for record in result.tasks.values()} != {"trained"}:
        raise RuntimeError(f"{schedule} did not train everything")
    uses = result.stages.values()
    busy_s = sum(sum(use.busy_s.values()) for use in uses)
    span_s = sum((use.last_end_s or 0.0) - (use.first_begin_s or 0.0) for use in uses)
    return 1.0 - busy_s / span_s
