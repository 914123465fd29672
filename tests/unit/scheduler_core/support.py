"""Small builders shared by the tests of the scheduler core."""

from typing import Any

from services.latency import LatencyModel, NodeLatency, OpKind
from services.scheduler.core.commands import Assign, Command
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import NodeJoined, OpFinished
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.tasks import InferenceTask, SloTarget, TrainingTask

PREFILL_S, DECODE_S, FORWARD_S, BACKWARD_S, STEP_S = 0.1, 0.01, 0.2, 0.4, 0.05


def constant_latency(num_stages: int = 1, **seconds: float) -> NodeLatency:
    """Durations that depend on nothing, by op; the module's constants by default."""
    durations = {
        "prefill": PREFILL_S,
        "decode": DECODE_S,
        "train_forward": FORWARD_S,
        "train_backward": BACKWARD_S,
        "optimizer_step": STEP_S,
        **seconds,
    }
    models = {OpKind(op): LatencyModel("constant", (value,)) for op, value in durations.items()}
    return NodeLatency((models,) * num_stages)


def node(node_id: str, num_stages: int = 1, *, latency: NodeLatency | None = None, **bounds: Any) -> NodeSpec:
    """A node with constant durations."""
    return NodeSpec(node_id, num_stages, latency or constant_latency(num_stages), **bounds)


def request(
    task_id: str,
    *,
    arrival_s: float = 0.0,
    prompt: int = 100,
    output: int = 1,
    ttft_s: float | None = None,
    choice_of: str = "",
    fixed_output: bool = False,
) -> InferenceTask:
    """A request; by default one that ends with its first token."""
    slo = SloTarget(ttft_s=ttft_s)
    return InferenceTask(task_id, arrival_s, prompt, output, slo, choice_of=choice_of, fixed_output=fixed_output)


def microbatch(task_id: str, *, job_id: str = "job", arrival_s: float = 0.0, length: int = 128) -> TrainingTask:
    """A micro-batch of one example."""
    return TrainingTask(task_id, arrival_s, job_id, 1, length)


def core_with(*nodes: NodeSpec, **config: object) -> SchedulerCore:
    """A core whose nodes joined at time 0."""
    core = SchedulerCore(CoreConfig(**config))  # type: ignore[arg-type]
    for spec in nodes:
        core.step(0.0, NodeJoined(spec))
    return core


def assigned(commands: list[Command]) -> list[tuple[str, str]]:
    """(task id, node id) of every Assign."""
    return [(command.task_id, command.node_id) for command in commands if isinstance(command, Assign)]


def backward_ended(node_id: str, task_id: str, end_s: float) -> OpFinished:
    """Trace of a backward on stage 0."""
    return OpFinished(node_id, 0, OpKind.TRAIN_BACKWARD, end_s - BACKWARD_S, end_s, (task_id,))


def step_ended(node_id: str, end_s: float = 0.0, *, stage: int = 0, weight_step: int = 0) -> OpFinished:
    """Trace of an optimizer step."""
    return OpFinished(node_id, stage, OpKind.OPTIMIZER_STEP, end_s - STEP_S, end_s, weight_step=weight_step)
