"""Seeded open-loop traffic: who asks what and when. The same plan is sent under every policy."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.demo.config import DemoError, TrafficConfig
from bench.demo.corpus import Corpus, sample_prompt
from bench.live.requests import PlannedRequest
from services.simulator import trace_file
from services.simulator.trace_file import TraceError, TraceRow

#: Undoes the rounding of a share: 0.9 is nine pieces of training per request.
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Feedback:
    """A piece of text to learn from, handed over `at_s` after the start."""

    at_s: float
    text: str


def mean_lengths(traffic: TrafficConfig) -> tuple[float, float]:
    """Mean (prompt, output) tokens of the clipped lognormals, by a fixed sample of 20,000."""
    rng = random.Random(12345)
    sample = [draw_lengths(traffic, rng) for _ in range(20_000)]
    return sum(prompt for prompt, _ in sample) / len(sample), sum(output for _, output in sample) / len(sample)


def draw_lengths(traffic: TrafficConfig, rng: random.Random) -> tuple[int, int]:
    """Prompt and output length of one request, tokens."""
    prompt = traffic.prompt_median * math.exp(traffic.prompt_sigma * rng.gauss(0.0, 1.0))
    output = traffic.output_median * math.exp(traffic.output_sigma * rng.gauss(0.0, 1.0))
    return _clip(prompt, traffic.prompt_limits), _clip(output, traffic.output_limits)


def _clip(value: float, limits: tuple[int, int]) -> int:
    return max(limits[0], min(limits[1], round(value)))


def base_rate(traffic: TrafficConfig, mean_rate: float) -> float:
    """Rate outside the burst that makes the whole run average `mean_rate` requests per second."""
    burst_share = traffic.burst[1] - traffic.burst[0]
    return mean_rate / (1.0 + (traffic.burst_factor - 1.0) * burst_share)


def arrivals(traffic: TrafficConfig, mean_rate: float, rng: random.Random) -> list[float]:
    """Poisson arrival times in [0, seconds), denser during the burst (thinning)."""
    outside = base_rate(traffic, mean_rate)
    peak = outside * max(1.0, traffic.burst_factor)
    times: list[float] = []
    now = rng.expovariate(peak)
    while now < traffic.seconds:
        in_burst = traffic.burst[0] <= now / traffic.seconds < traffic.burst[1]
        rate = outside * traffic.burst_factor if in_burst else outside
        if rng.random() < rate / peak:
            times.append(now)
        now += rng.expovariate(peak)
    return times


def plan(traffic: TrafficConfig, corpus: Corpus, mean_rate: float, seed: int) -> list[PlannedRequest]:
    """The requests of one run, by time."""
    rng = random.Random(seed)
    if traffic.trace is None:
        rows = [TraceRow(at, *draw_lengths(traffic, rng)) for at in arrivals(traffic, mean_rate, rng)]
    else:
        rows = scale_trace(read_trace(Path(traffic.trace)), traffic, mean_rate)
    return [_request(traffic, corpus, f"r{seed}-{index:05d}", row, rng) for index, row in enumerate(rows)]


def feedback_plan(
    requests: Sequence[PlannedRequest], share: float, pieces: Mapping[str, Sequence[str]]
) -> list[Feedback]:
    """Training that comes with the requests, so that it is `share` of all tasks; `pieces` by kind of text, in turn."""
    given: list[Feedback] = []
    taken = dict.fromkeys(pieces, 0)
    for number, request in enumerate(requests, start=1):
        while len(given) + 1 <= number * share / (1.0 - share) + _ROUNDING:
            of_kind = pieces[request.kind]
            given.append(Feedback(request.at_s, of_kind[taken[request.kind] % len(of_kind)]))
            taken[request.kind] += 1
    return given


def warmup_plan(traffic: TrafficConfig, corpus: Corpus, seed: int) -> list[PlannedRequest]:
    """Requests that wake everything up and are not counted: all at once."""
    rng = random.Random(seed + 1_000_003)
    return [
        _request(traffic, corpus, f"w{seed}-{index:05d}", TraceRow(0.0, *draw_lengths(traffic, rng)), rng)
        for index in range(traffic.warmup_requests)
    ]


def _request(
    traffic: TrafficConfig, corpus: Corpus, request_id: str, row: TraceRow, rng: random.Random
) -> PlannedRequest:
    drifted = row.arrival_s >= traffic.drift * traffic.seconds
    documents = corpus.code.prompts if drifted else corpus.docs.prompts
    prompt, reference = sample_prompt(documents, row.prompt_tokens, traffic.reference_tokens, rng)
    return PlannedRequest(
        request_id, row.arrival_s, prompt, reference, row.output_tokens, "code" if drifted else "docs"
    )


def read_trace(path: Path) -> list[TraceRow]:
    """At least two requests of a recorded trace. Raises DemoError naming the column and the line at fault."""
    try:
        rows = trace_file.read_trace(path)
    except TraceError as error:
        raise DemoError(str(error)) from error
    if len(rows) < 2:
        raise DemoError(f"{path}: holds {len(rows)} requests; need at least 2")
    return rows


def scale_trace(rows: Sequence[TraceRow], traffic: TrafficConfig, mean_rate: float) -> list[TraceRow]:
    """A trace fitted to the demo's model and load; the order and the relative gaps and lengths stay.

    The first `mean_rate * seconds` requests are taken and their time scaled so that they span the run. Prompt and
    output lengths are multiplied by one factor each, so that their means equal the demo's, then clipped to its limits.
    """
    wanted = max(2, round(mean_rate * traffic.seconds))
    taken = rows[:wanted]
    span = taken[-1].arrival_s - taken[0].arrival_s
    if span <= 0:
        raise DemoError("--trace: all requests arrive at the same time; the trace has no span to scale")
    seconds = traffic.seconds * min(1.0, len(taken) / wanted)
    stretch = seconds * (1.0 - 1.0 / len(taken)) / span
    mean_prompt, mean_output = mean_lengths(traffic)
    by_prompt = mean_prompt * len(taken) / sum(row.prompt_tokens for row in taken)
    by_output = mean_output * len(taken) / sum(row.output_tokens for row in taken)
    return [
        TraceRow(
            (row.arrival_s - taken[0].arrival_s) * stretch,
            _clip(row.prompt_tokens * by_prompt, traffic.prompt_limits),
            _clip(row.output_tokens * by_output, traffic.output_limits),
        )
        for row in taken
    ]


def describe(requests: Sequence[PlannedRequest], traffic: TrafficConfig) -> dict[str, Any]:
    """The workload in numbers, for the summary and the report."""
    seconds = traffic.seconds
    burst_s = (traffic.burst[0] * seconds, traffic.burst[1] * seconds)
    in_burst = [item for item in requests if burst_s[0] <= item.at_s < burst_s[1]]
    gaps = [after.at_s - before.at_s for before, after in pairwise(requests)]
    mean_gap = sum(gaps) / len(gaps) if gaps else 0.0
    variance = sum((gap - mean_gap) ** 2 for gap in gaps) / len(gaps) if gaps else 0.0
    return {
        "requests": len(requests),
        "seconds": seconds,
        "mean_rate_rps": len(requests) / seconds,
        "burst_rate_rps": len(in_burst) / (burst_s[1] - burst_s[0]) if burst_s[1] > burst_s[0] else 0.0,
        "burst_s": list(burst_s) if traffic.trace is None else None,
        "drift_s": traffic.drift * seconds,
        "interarrival_cv": math.sqrt(variance) / mean_gap if mean_gap > 0 else 0.0,
        "prompt_tokens_mean": _mean([len(item.prompt) for item in requests]),
        "output_tokens_mean": _mean([item.max_tokens for item in requests]),
        "trace": None if traffic.trace is None else Path(traffic.trace).name,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
