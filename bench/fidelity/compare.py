"""Figures of a run, live or simulated, and how far two of them are apart. Pure; one definition for both."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from bench.fidelity.ops import size_of
from bench.fidelity.trace import Trace
from services.latency import OpKind
from services.scheduler.core.tasks import SloTarget
from services.simulator.metrics import quantile


class Figures(NamedTuple):
    """Of the requests that arrived between two times, and of what stages did between them.

    tokens_per_s: new tokens of prompts, outputs and training together. utilisation: busy share of all stages' time.
    Latencies are infinite when so many requests were not answered to the end.
    """

    requests: int
    slo_attainment: float
    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p50_s: float
    tokens_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    trained_tokens_per_s: float
    utilisation: float

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is infinite is None."""
        return {name: finite(value) for name, value in self._asdict().items()}


def figures(trace: Trace, begin_s: float, end_s: float, slo: SloTarget) -> Figures:
    """Of a run between two times on its clock."""
    requests = [
        request
        for request in trace.requests.values()
        if begin_s <= request.task.arrival_s and request.arrived_s < end_s
    ]
    ttfts = sorted(request.ttft_s for request in requests)
    tpots = sorted(request.tpot_s for request in requests)
    kept = sum(_keeps(request.ttft_s, request.tpot_s, slo) for request in requests)
    seconds = end_s - begin_s
    tokens = _tokens(trace, begin_s, end_s)
    stages = sum(spec.num_stages for spec in trace.nodes.values())
    busy_s = sum(max(0.0, min(op.end_s, end_s) - max(op.begin_s, begin_s)) for op in trace.ops)
    return Figures(
        requests=len(requests),
        slo_attainment=kept / len(requests) if requests else 1.0,
        ttft_p50_s=quantile(ttfts, 0.5),
        ttft_p95_s=quantile(ttfts, 0.95),
        tpot_p50_s=quantile(tpots, 0.5),
        tokens_per_s=sum(tokens.values()) / seconds,
        prompt_tokens_per_s=tokens["prompt"] / seconds,
        output_tokens_per_s=tokens["output"] / seconds,
        trained_tokens_per_s=tokens["trained"] / seconds,
        utilisation=busy_s / (seconds * stages) if stages else 0.0,
    )


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if value < math.inf else None


def _keeps(ttft_s: float, tpot_s: float, slo: SloTarget) -> bool:
    return (slo.ttft_s is None or ttft_s <= slo.ttft_s) and (slo.tpot_s is None or tpot_s <= slo.tpot_s)


def _tokens(trace: Trace, begin_s: float, end_s: float) -> dict[str, float]:
    """New tokens by what they are, each at the end of its operation on the last stage it runs on."""
    tokens = {"prompt": 0.0, "output": 0.0, "trained": 0.0}
    tops = {node_id: spec.num_stages - 1 for node_id, spec in trace.nodes.items()}
    for op in trace.ops:
        if not begin_s <= op.end_s < end_s:
            continue
        if op.op is OpKind.TRAIN_BACKWARD and op.stage == 0:
            task = trace.training.get(op.task_ids[0])
            tokens["trained"] += task.batch * task.length / op.parts if task is not None else 0.0
        elif op.op is OpKind.PREFILL and op.stage == tops[op.node_id]:
            tokens["prompt"] += op.num_tokens
            tokens["output"] += len(op.task_ids) - op.partials
        elif op.op is OpKind.DECODE and op.stage == tops[op.node_id]:
            tokens["output"] += len(op.task_ids)
    return tokens


def compare(live: Figures, simulated: Figures) -> dict[str, float | None]:
    """What the simulation is above the live run: shares in points, the others in percent; None: one has no value."""
    return {
        "slo_attainment_points": 100.0 * (simulated.slo_attainment - live.slo_attainment),
        "throughput_pct": _percent(live.tokens_per_s, simulated.tokens_per_s),
        "output_tokens_pct": _percent(live.output_tokens_per_s, simulated.output_tokens_per_s),
        "trained_tokens_pct": _percent(live.trained_tokens_per_s, simulated.trained_tokens_per_s),
        "ttft_p50_pct": _percent(live.ttft_p50_s, simulated.ttft_p50_s),
        "ttft_p95_pct": _percent(live.ttft_p95_s, simulated.ttft_p95_s),
        "tpot_p50_pct": _percent(live.tpot_p50_s, simulated.tpot_p50_s),
        "utilisation_points": 100.0 * (simulated.utilisation - live.utilisation),
    }


#: How far simulator and live cluster may be apart, in the units of `compare`.
AGREEMENT = {"slo_attainment_points": 2.0, "throughput_pct": 3.0, "ttft_p95_pct": 8.0}


def agrees(entry: Mapping[str, Any]) -> bool:
    """Whether a comparison is within all limits; one without a value is not."""
    values = [entry[key] for key in AGREEMENT]
    return all(
        value is not None and abs(value) <= limit for value, limit in zip(values, AGREEMENT.values(), strict=True)
    )


def median(runs: Sequence[Figures]) -> Figures:
    """Every figure's median."""
    return Figures(*(statistics.median(values) for values in zip(*runs, strict=True)))


def spread(runs: Sequence[Figures]) -> dict[str, float | None]:
    """How far the highest of several runs is above the lowest, in the units of `compare`."""
    kept = [run.slo_attainment for run in runs]
    ttfts = [run.ttft_p95_s for run in runs]
    tokens = [run.tokens_per_s for run in runs]
    return {
        "slo_attainment_points": 100.0 * (max(kept) - min(kept)),
        "throughput_pct": _percent(min(tokens), max(tokens)),
        "ttft_p95_pct": _percent(min(ttfts), max(ttfts)),
    }


def _percent(live: float, simulated: float) -> float | None:
    if live <= 0.0 or live == math.inf or simulated == math.inf:
        return None
    return 100.0 * (simulated / live - 1.0)


def op_slip(trace: Trace, begin_s: float, end_s: float) -> dict[str, float]:
    """How much longer the operations between two times took than the profile says, by kind: the median share."""
    ratios: defaultdict[str, list[float]] = defaultdict(list)
    for op in trace.ops:
        size = size_of(op, trace.training)
        if size is None or not begin_s <= op.end_s < end_s:
            continue
        latency = trace.nodes[op.node_id].latency
        expected_s = latency.op_s(op.stage, op.op, size.batch, size.length, size.cached) / size.parts
        if expected_s > 0.0 and not size.decodes:
            ratios[op.op.value].append((op.end_s - op.begin_s) / expected_s)
    return {kind: statistics.median(found) - 1.0 for kind, found in sorted(ratios.items())}
