"""Protobuf <-> the core's types."""

from collections.abc import Iterable, Mapping
from typing import Any

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2, work_pb2
from lemix.v1 import cluster_service_pb2, types_pb2
from services.latency import NodeLatency
from services.profile_messages import KIND_OF_PROTO
from services.scheduler.core.commands import SyncMode
from services.scheduler.core.costs import OpRecord
from services.scheduler.core.events import OpFinished, TaskEnded
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.status import CoreSnapshot
from services.scheduler.core.tasks import InferenceTask, SloTarget, Task, TrainingTask
from services.scheduler.explain.accuracy import PredictionError

_SYNC_MODES = {
    SyncMode.REPLACE: scheduler_service_pb2.SYNC_MODE_REPLACE,
    SyncMode.AVERAGE: scheduler_service_pb2.SYNC_MODE_AVERAGE,
}

# --------------------------------------------------------------------------- nodes


def spec_from_hello(hello: scheduler_service_pb2.NodeHello, latency: NodeLatency, offset_s: float) -> NodeSpec:
    """What the core knows of a node, whose clock is `offset_s` behind the scheduler's.

    Raises ValueError when profile and node differ in their stages.
    """
    if latency.num_stages != hello.num_stages:
        raise ValueError(f"node {hello.node_id} has {hello.num_stages} stages, its profile {latency.num_stages}")
    bounds = {
        "max_inflight_inference": hello.max_inflight_inference,
        "max_batch": hello.max_batch,
        "max_context_tokens": hello.max_context_tokens,
        "kv_capacity_tokens": hello.kv_capacity_tokens,
        "prefix_cache_tokens": hello.prefix_cache_tokens,
        "epoch_steps": hello.epoch_steps,
        "max_prefill_tokens": hello.max_prefill_tokens,
        "max_inflight_training": hello.max_inflight_training,
        "weight_handling": hello.weight_handling,
        "gradient_buffers": hello.gradient_buffers,
        "max_training_parts": hello.max_training_parts,
        "training_schedule": hello.training_schedule,
        "max_batch_tokens": hello.max_batch_tokens,
        "kv_block_tokens": hello.kv_block_tokens,
        "incarnation": hello.incarnation,
    }
    told: dict[str, Any] = {name: value for name, value in bounds.items() if value}
    if hello.HasField("weights_age_s"):
        told["trained_s"] = hello.sent_monotonic_s + offset_s - hello.weights_age_s
    return NodeSpec(hello.node_id, hello.num_stages, latency, **told)


def ops_from_traces(
    node_id: str, ops: Iterable[scheduler_service_pb2.OpTrace], offset_s: float
) -> tuple[OpFinished, ...]:
    """Traces on the scheduler's clock, `offset_s` ahead of the node's; unknown operations are left out."""
    # By position, and through the list that Python makes for a comprehension: this runs for every operation.
    return tuple(
        [
            OpFinished(
                node_id,
                op.stage,
                kind,
                begin_s := op.begin_monotonic_s + offset_s,
                begin_s + op.duration_s,
                tuple(op.task_ids),
                op.num_tokens,
                op.context_tokens,
                op.first_token,
                op.weight_step,
                op.part,
                op.parts or 1,
                op.partials,
                op.decodes,
                op.decode_context_tokens,
                op.isolated,
                op.job_id,
            )
            for op in ops
            if (kind := KIND_OF_PROTO.get(op.op))
        ]
    )


def sync_mode_to_proto(mode: SyncMode) -> scheduler_service_pb2.SyncMode:
    """The wire form."""
    return _SYNC_MODES[mode]


# --------------------------------------------------------------------------- tasks


def task_from_item(item: work_pb2.WorkItem, *, now_s: float, now_unix_s: float) -> Task:
    """The core's view of a task. Raises ValueError for work of a kind this version does not know."""
    match item.WhichOneof("work"):
        case "inference":
            return _inference_task(item.task_id, item.inference, now_s, now_unix_s)
        case "training":
            work = item.training
            length = max((len(example.token_ids) for example in work.examples), default=0)
            accumulation = max(1, work.hyperparameters.gradient_accumulation_steps)
            size, trains_adapter = len(work.examples), work.HasField("lora")
            return TrainingTask(item.task_id, now_s, work.job_id, size, length, accumulation, trains_adapter)
        case _:
            raise ValueError(f"task {item.task_id} holds no work that this version knows")


def _inference_task(task_id: str, work: work_pb2.InferenceWork, now_s: float, now_unix_s: float) -> InferenceTask:
    # The promise counts from the gateway; a clock ahead of ours must not put an arrival into the future.
    age_s = max(0.0, now_unix_s - work.arrival_unix_s) if work.arrival_unix_s else 0.0
    slo = SloTarget(
        work.slo.ttft_s if work.slo.HasField("ttft_s") else None,
        work.slo.tpot_s if work.slo.HasField("tpot_s") else None,
    )
    return InferenceTask(
        task_id,
        now_s - age_s,
        len(work.prompt_token_ids),
        work.sampling.max_tokens,
        slo,
        # What is kept of a session's turns before is of the adapter that served them.
        f"{work.adapter_id}/{work.session_id}" if work.adapter_id and work.session_id else work.session_id,
        work.max_staleness_s if work.HasField("max_staleness_s") else None,
        work.adapter_id,
        work.choice_of,
        _is_fixed(work.sampling),
    )


def _is_fixed(sampling: work_pb2.ResolvedSampling) -> bool:
    """Whether nothing ends the output before its limit."""
    never_ends = sampling.ignore_eos and not sampling.stop
    return never_ends or sampling.min_tokens >= sampling.max_tokens


def queue_by(work: work_pb2.InferenceWork, ttft_s: float | None) -> None:
    """Write down what a request is queued by on its node. One that lets others pass still comes up in time: when half
    of the time that its client waits is over."""
    if ttft_s is None:
        work.ClearField("queue_ttft_s")
        return
    if work.deadline_unix_s and work.arrival_unix_s:
        ttft_s = min(ttft_s, 0.5 * max(0.0, work.deadline_unix_s - work.arrival_unix_s))
    work.queue_ttft_s = ttft_s


def ended_from_outcome(outcome: work_pb2.WorkOutcome) -> TaskEnded:
    """The event that an outcome is for the core."""
    if outcome.HasField("training"):
        training = outcome.training
        loss = training.loss if training.HasField("loss") else None
        return TaskEnded(outcome.task_id, outcome.node_id, ok=not training.HasField("error"), loss=loss)
    inference = outcome.inference
    ok = inference.finish_reason in (types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH)
    return TaskEnded(outcome.task_id, outcome.node_id, ok=ok, output_tokens=len(inference.token_ids))


def expired_outcome(item: work_pb2.WorkItem) -> work_pb2.WorkOutcome:
    """The outcome of a task that has ended, nobody knows how any more."""
    return failed_outcome(item, LemixError(ErrorCode.NOT_FOUND, "the result of this request has expired"))


def failed_outcome(item: work_pb2.WorkItem, error: LemixError) -> work_pb2.WorkOutcome:
    """The outcome of a task that no node will run."""
    outcome = work_pb2.WorkOutcome(task_id=item.task_id)
    if item.HasField("training"):
        outcome.training.job_id = item.training.job_id
        outcome.training.sequence = item.training.sequence
        outcome.training.error.CopyFrom(error.to_proto())
        return outcome
    cancelled = error.code is ErrorCode.CANCELLED
    reason = types_pb2.FINISH_REASON_CANCELLED if cancelled else types_pb2.FINISH_REASON_ERROR
    outcome.inference.finish_reason = reason
    outcome.inference.prompt_tokens = len(item.inference.prompt_token_ids)
    outcome.inference.error.CopyFrom(error.to_proto())
    return outcome


# --------------------------------------------------------------------------- status


def status_to_proto(snapshot: CoreSnapshot, not_ready_reason: str) -> cluster_service_pb2.GetStatusResponse:
    """The public view; an empty reason means ready."""
    nodes = [
        cluster_service_pb2.NodeStatus(
            node_id=node.node_id,
            ready=True,
            num_stages=node.num_stages,
            inflight_inference=node.inflight_inference,
            inflight_training=node.inflight_training,
            weight_step=node.weight_step,
            role=node.role.value,
        )
        for node in snapshot.nodes
    ]
    return cluster_service_pb2.GetStatusResponse(
        policy=snapshot.policy,
        ready=not not_ready_reason,
        not_ready_reason=not_ready_reason,
        nodes=nodes,
        waiting_inference=snapshot.waiting_inference,
        waiting_training=snapshot.waiting_training,
    )


def add_predictions(
    status: cluster_service_pb2.GetStatusResponse,
    records: Mapping[str, Iterable[OpRecord]],
    errors: Iterable[PredictionError],
) -> None:
    """How good predictions are, in the public view."""
    for node in status.nodes:
        for record in records.get(node.node_id, ()):
            node.ops.add(
                stage=record.stage,
                op=record.op.value,
                count=record.num_seen,
                error=record.error,
                error_beside=record.error_beside,
                ratio=record.ratio,
                interval_low=record.low,
                interval_high=record.high,
                drifting=record.drifting,
            )
    for error in errors:
        status.predictions.add(
            predicted=error.predicted.value,
            beside_training=error.beside_training,
            count=error.num_seen,
            error=error.error,
        )
