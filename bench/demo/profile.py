"""What the latency profile promises: capacity of a node and the SLO, fixed before any policy runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.demo.config import DemoError, TrainingConfig
from bench.demo.records import Slo
from lemix.internal.v1 import profile_pb2
from services.latency import NodeLatency, OpKind
from services.profiler.store import CorruptProfile, load_profile

#: Tokens of the largest prefill that is measured: about a full batch of mean prompts.
_MAX_POINT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Promise:
    """What the profile says about the mean request, and what follows from it."""

    profile_id: str
    #: Seconds, the mean request alone on an idle node.
    prefill_s: float
    decode_s: float
    #: Requests per second one node can serve, its decode batches full.
    capacity_rps: float
    slo: Slo


def profile_grid(training: TrainingConfig) -> dict[str, Any]:
    """Settings of the profiler's grid: the sizes that occur in the demo and twice as much, not all a node could take.

    Two thirds of the default grid's time go to micro-batches that the demo never trains.
    """
    longest = 2 * training.piece_tokens
    return {
        "max_point_tokens": _MAX_POINT_TOKENS,
        "train": {
            "batches": [training.batch_size, 2 * training.batch_size],
            "lengths": [longest // 16, longest // 5, longest // 2, longest],
        },
    }


def newest_profile(directory: Path, num_stages: int) -> profile_pb2.Profile:
    """The newest readable artifact for so many stages. Raises DemoError when there is none."""
    found: list[profile_pb2.Profile] = []
    problems: list[str] = []
    for path in sorted(directory.glob("*/*.json")):
        try:
            profile = load_profile(path)
        except CorruptProfile as error:
            problems.append(str(error))
            continue
        if profile.num_stages == num_stages:
            found.append(profile)
    if not found:
        raise DemoError(f"the profiler left no profile for {num_stages} stages in {directory} {'; '.join(problems)}")
    return max(found, key=lambda profile: profile.created_unix_s)


def promise(
    profile_id: str,
    latency: NodeLatency,
    *,
    mean_prompt: float,
    mean_output: float,
    reference_tokens: int,
    max_batch: int,
    slo_units: float,
    core_share: float = 1.0,
) -> Promise:
    """Capacity and SLO at the workload's mean lengths.

    The reference continuation is computed with the prompt, so it counts as prompt here. Capacity: a request costs
    every stage one prefill and its share of full decode batches; the slowest stage bounds the pipeline. `core_share`
    is the part of a core each stage has when all stages run (the profile times one stage of every node at a time).
    Raises DemoError when the profile predicts no time at all.
    """
    length = mean_prompt + reference_tokens
    context = mean_prompt + mean_output / 2.0
    further = max(0.0, mean_output - 1.0)
    prefill_s = latency.node_s(OpKind.PREFILL, 1, length)
    decode_s = latency.node_s(OpKind.DECODE, 1, context)
    cost_s = max(
        latency.op_s(stage, OpKind.PREFILL, 1, length)
        + further * latency.op_s(stage, OpKind.DECODE, max_batch, context) / max_batch
        for stage in range(latency.num_stages)
    )
    if min(prefill_s, decode_s, cost_s) <= 0.0:
        raise DemoError(f"profile {profile_id} predicts no time for prefill or decode; delete it and profile again")
    return Promise(
        profile_id, prefill_s, decode_s, core_share / cost_s, Slo(slo_units * prefill_s, slo_units * decode_s)
    )
