"""Hand-made records and a summary that look like a run, without a cluster."""

import math
import random
from dataclasses import replace
from typing import Any

from bench.demo import metrics, summary
from bench.demo.config import DemoConfig, TrafficConfig, TrainingConfig
from bench.demo.profile import Promise
from bench.demo.records import OpRecord, RunRecord, Slo, TaskSpan
from bench.live.requests import RequestRecord, Status
from services.latency import OpKind

SLO = Slo(ttft_s=0.08, tpot_s=0.012)


def run_record(policy: str, *, slow: float = 1.0, seconds: float = 40.0, seed: int = 0) -> RunRecord:
    """One run: Poisson requests on two nodes, training on both (separate: on one)."""
    rng = random.Random(seed)
    requests, ops, spans, at = [], [], [], 0.3
    while at < seconds:
        node = "node-0" if policy == "separate" or rng.random() < 0.7 else "node-1"
        first = at + 0.02 * slow * math.exp(rng.gauss(0, 0.6))
        tokens = rng.randint(4, 40)
        last = first + (tokens - 1) * 0.004 * slow * math.exp(rng.gauss(0, 0.3))
        drifted = at >= seconds / 2
        loss = 2.1 + (0.35 * math.exp(-(at - seconds / 2) / (8 * slow)) if drifted else 0) + rng.gauss(0, 0.1)
        requests.append(
            RequestRecord(
                f"r{len(requests)}", "code" if drifted else "docs", at, at + 0.0005, Status.OK, first, last, tokens,
                node, (1, 2), None if at < 2 else rng.expovariate(1.0) * slow, loss,
            )
        )  # fmt: skip
        spans.append(TaskSpan(f"r{len(requests)}", node, False, at, last, True))
        ops.append(OpRecord(node, 0, OpKind.PREFILL, at + 0.001, first, 100))
        ops.append(OpRecord(node, 0, OpKind.DECODE, first, last, tokens))
        at += rng.expovariate(10.0)
    nodes = ["node-1"] if policy == "separate" else ["node-0", "node-1"]
    for node in nodes:
        for index in range(int(seconds * 8)):
            begin = index * 0.125
            ops.append(OpRecord(node, 0, OpKind.TRAIN_FORWARD, begin, begin + 0.02, 128))
            ops.append(OpRecord(node, 0, OpKind.TRAIN_BACKWARD, begin + 0.02, begin + 0.06, 128))
            ops.append(OpRecord(node, 0, OpKind.OPTIMIZER_STEP, begin + 0.06, begin + 0.07))
            spans.append(TaskSpan(f"{node}/{index}", node, True, begin, begin + 0.07, True))
        ops.append(OpRecord(node, 0, OpKind.WEIGHT_SYNC, seconds / 2 + 0.1, seconds / 2 + 0.12))
    cpu = {"stage_workers": 0.7, "node_agents": 0.1, "scheduler": 0.06, "gateway": 0.05, "client": 0.03, "redis": 0.01}
    return RunRecord(
        policy=policy, planned_s=seconds, wall_s=seconds + 0.5, drift_s=seconds / 2, requests=requests, ops=ops,
        spans=spans, trained_tokens=127 * int(seconds * 8) * len(nodes),
        cpu_s={role: share * 2 * seconds for role, share in cpu.items()}, cores=2,
    )  # fmt: skip


def runs() -> list[RunRecord]:
    """All four policies."""
    record = run_record("lemix", slow=1.0)
    return [
        run_record("separate", slow=0.9),
        run_record("round_robin", slow=3.0),
        record,
        replace(record, policy="lemix_no_sync"),
    ]


def whole_summary(repetitions: int = 2, cores: int = 2, share: float | None = None) -> dict[str, Any]:
    """A summary as the demo writes it."""
    config = DemoConfig(repeat=repetitions, traffic=TrafficConfig(), training=TrainingConfig(share=share))
    measured = {
        run.policy: [metrics.policy_metrics(run, SLO, config.hold_s) for _ in range(repetitions)] for run in runs()
    }
    facts = summary.RunFacts(
        started_at="2026-01-01T00:00:00Z",
        machine={"cpu": "Example CPU", "cores": cores, "gpu": []},
        git_commit="0123456789ab",
        promise=Promise("abc-1", 0.016, 0.0024, 24.0, SLO),
        workload={
            "requests": 400, "seconds": 40.0, "mean_rate_rps": 10.0, "burst_rate_rps": 18.0, "burst_s": [8.0, 12.0],
            "drift_s": 20.0, "interarrival_cv": 1.1, "prompt_tokens_mean": 170.0, "output_tokens_mean": 26.0,
            "trace": None,
        },
        model={"parameters": 2_100_000},
        seconds_total=250.0,
    )  # fmt: skip
    return summary.build(config, facts, measured, problems=[])
