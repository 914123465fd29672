"""The simulator's work and nodes in the words of the two cores."""

import math

from services.latency import MOVES, OpKind
from services.node_agent.core.types import InferenceRequest, Op, TrainingMicrobatch
from services.scheduler.core.events import OpFinished
from services.scheduler.core.node_mirror import core_config
from services.scheduler.core.node_spec import NodeSpec
from services.scheduler.core.tasks import InferenceTask, TrainingTask
from services.simulator.types import Microbatch, Request, VirtualNode

_OF_NO_TASK = MOVES | {OpKind.OPTIMIZER_STEP, OpKind.WEIGHT_SYNC}


def inference_task(work: Request) -> InferenceTask:
    """A request, for the scheduler."""
    return InferenceTask(
        work.task_id,
        work.arrival_s,
        work.prompt_tokens,
        work.max_tokens,
        work.slo,
        work.session_id,
        fixed_output=work.fixed_output,
    )


def training_task(work: Microbatch) -> TrainingTask:
    """A micro-batch, for the scheduler."""
    return TrainingTask(work.task_id, work.arrival_s, work.job_id, work.batch, work.length, work.accumulation)


def node_request(work: Request, queue_ttft_s: float | None) -> InferenceRequest:
    """A request, for a node; queue_ttft_s: see `Assign`."""
    slo = work.slo
    ttft_s = slo.ttft_s if queue_ttft_s is None else queue_ttft_s
    deadline_s = None if ttft_s is None else work.arrival_s + ttft_s
    return InferenceRequest(
        work.task_id,
        work.arrival_s,
        work.prompt_tokens,
        work.max_tokens,
        deadline_s,
        tpot_s=slo.tpot_s,
        session_id=work.session_id,
    )


def node_microbatch(work: Microbatch, *, sequence: int, parts: int) -> TrainingMicrobatch:
    """A micro-batch, for a node; `sequence` counts those of its job."""
    return TrainingMicrobatch(
        work.task_id,
        work.arrival_s,
        work.job_id,
        sequence,
        work.batch,
        work.length,
        work.accumulation,
        parts=parts,
    )


def node_spec(node: VirtualNode) -> NodeSpec:
    """What a node tells the scheduler when it joins."""
    core = node.core
    return NodeSpec(
        node.node_id,
        core.num_stages,
        node.latency if node.believed is None else node.believed,
        max_inflight_inference=node.max_inflight_inference,
        max_batch=core.max_batch,
        max_context_tokens=node.max_context_tokens,
        kv_capacity_tokens=core.kv_capacity_tokens,
        max_training_parts=node.max_training_parts,
        training_schedule=core.training_schedule,
        prefix_cache_tokens=core.prefix_cache_tokens,
        epoch_steps=core.epoch_steps,
        max_prefill_tokens=core.max_prefill_tokens,
        max_inflight_training=core.max_inflight_training,
        weight_handling=core.weight_handling,
        gradient_buffers=core.gradient_buffers,
        max_batch_tokens=core.max_batch_tokens,
        kv_block_tokens=core.kv_block_tokens,
    )


def virtual_node(spec: NodeSpec, *, joins_s: float = 0.0, lost_s: float = math.inf) -> VirtualNode:
    """A node as it told of itself. What it did not tell (its memory, its host link) it has without limit."""
    return VirtualNode(
        node_id=spec.node_id,
        latency=spec.latency,
        core=core_config(spec),
        max_inflight_inference=spec.max_inflight_inference,
        max_context_tokens=spec.max_context_tokens,
        max_training_parts=spec.max_training_parts,
        joins_s=joins_s,
        lost_s=lost_s,
    )


def trace(node_id: str, stage: int, op: Op, begin_s: float, end_s: float, *, first_token: bool) -> OpFinished:
    """The report of an operation. One that brings no task further names none."""
    return OpFinished(
        node_id,
        stage,
        op.kind,
        begin_s,
        end_s,
        () if op.kind in _OF_NO_TASK else op.task_ids,
        op.num_tokens,
        op.context_tokens,
        first_token,
        op.version,
        op.part,
        op.parts,
        op.partials,
        op.decodes,
        op.decode_context_tokens,
        job_id=op.subject if op.kind is OpKind.OPTIMIZER_STEP else "",
    )
