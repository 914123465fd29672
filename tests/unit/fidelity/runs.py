"""A run whose steps anybody can compute: simulated, in the form of a live one."""

from bench.fidelity.trace import Trace, trace_of
from services.latency import LatencyModel, NodeLatency, OpKind
from services.node_agent.core.types import NodeCoreConfig
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.tasks import SloTarget
from services.scheduler.explain.log_file import Step
from services.simulator.cluster import Simulation
from services.simulator.types import Microbatch, Request, SimulationConfig, VirtualNode

SLO = SloTarget(1.0, 0.1)
MODELS = {
    OpKind.PREFILL: LatencyModel("affine", (0.004, 0.0002), residual_p5=-0.1, residual_p95=0.1),
    OpKind.DECODE: LatencyModel("full_decode", (0.008, 0.0005, 0.000001), residual_p5=-0.1, residual_p95=0.1),
    OpKind.TRAIN_FORWARD: LatencyModel("affine", (0.004, 0.0002)),
    OpKind.TRAIN_BACKWARD: LatencyModel("affine", (0.004, 0.0004)),
    OpKind.OPTIMIZER_STEP: LatencyModel("constant", (0.02,)),
}


def requests(count=40, gap_s=0.2):
    return [
        Request(f"r{index}", 1.0 + gap_s * index, 100 + 37 * (index % 5), 4 + index % 7, 16, SLO)
        for index in range(count)
    ]


def backlog(length=64):
    index = 0
    while True:
        yield Microbatch(f"m{index}", 1.0, "job", 1, length)
        index += 1


def steps_of(*, slower=1.0, trains=False, work=None, **delays):
    """(configuration, steps) of two stages that are `slower` than the profile says."""
    truth = NodeLatency(
        tuple(
            {kind: LatencyModel(m.form, tuple(slower * c for c in m.coefficients)) for kind, m in MODELS.items()}
            for _ in range(2)
        )
    )
    config = CoreConfig(policy="lemix", policy_options={"forecast": "fast_forward"}, default_slo=SLO)
    node = VirtualNode(
        node_id="node-0",
        latency=truth,
        believed=NodeLatency((MODELS, MODELS)),
        core=NodeCoreConfig(num_stages=2, max_batch=4),
    )
    steps = []
    Simulation(
        SimulationConfig(core=config, cut_overhead=0.0, **delays),
        [node],
        requests() if work is None else work,
        backlog() if trains else None,
        lambda now_s, event, commands: steps.append((now_s, event, commands)),
    ).run()
    return config, steps


def recorded(steps):
    """The same in the form of a log that was read."""
    return [Step(index, now_s, event, list(commands)) for index, (now_s, event, commands) in enumerate(steps)]


def trace(**kwargs) -> Trace:
    config, steps = steps_of(**kwargs)
    return trace_of(config, steps)
