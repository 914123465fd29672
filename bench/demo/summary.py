"""`summary.json`: the figures of every policy with everything needed to judge and repeat them. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.demo.config import DemoConfig
from bench.demo.profile import Promise
from bench.demo.verdict import verdicts
from bench.live.cpu import OTHERS
from bench.report.verdict import combine, spread

_FAIRNESS = (
    "every policy gets a fresh cluster with the same initial weights, the same settings and the same warm-up; stage "
    "workers {pinning} and run at a lower priority than the control plane and the client; policies run one after the "
    "other"
)
#: Share of the machine's CPU time that other programs may use before the figures are doubted.
_MAX_OTHERS = 0.1


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What was found out while the demo ran."""

    started_at: str
    machine: Mapping[str, Any]
    git_commit: str
    promise: Promise
    workload: Mapping[str, Any]
    model: Mapping[str, Any]
    seconds_total: float


def build(
    config: DemoConfig,
    facts: RunFacts,
    measured: Mapping[str, Sequence[Mapping[str, Any]]],
    problems: Sequence[str],
) -> dict[str, Any]:
    """The summary. `measured` holds, by policy, the metrics of every repetition."""
    promise = facts.promise
    sharing = shared_cores(config, facts.machine["cores"])
    doubts = dict.fromkeys(measured, sharing) if sharing else _disturbed(measured)
    return {
        "started_at": facts.started_at,
        "git_commit": facts.git_commit,
        "machine": dict(facts.machine),
        "seed": config.seed,
        "repetitions": config.repeat,
        "slo": {"ttft_ms": 1000 * promise.slo.ttft_s, "tpot_ms": 1000 * promise.slo.tpot_s},
        "policies": {name: combine(items) for name, items in measured.items()},
        "spread": {name: spread(items) for name, items in measured.items()} if config.repeat > 1 else {},
        "claims": [claim for claim in verdicts(measured, doubts) if _is_meant(config, claim)],
        "problems": list(problems),
        "warnings": sharing_warnings(config, facts.machine["cores"]) + warnings(measured),
        "capacity": {
            "profile_id": promise.profile_id,
            "requests_per_s": promise.capacity_rps,
            "prefill_s": promise.prefill_s,
            "decode_s": promise.decode_s,
        },
        "workload": {**facts.workload, "description": _describe_traffic(config)},
        "model": {**facts.model, "description": _describe_model(config, facts.model)},
        "training": {"description": _describe_training(config)},
        "fairness": _describe_fairness(config, facts.machine),
        "config": config.to_json(),
        "seconds_total": facts.seconds_total,
    }


def warnings(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Why the figures may mislead although every request ended well."""
    disturbed = [name for name in measured if _others(measured[name]) > _MAX_OTHERS]
    if not disturbed:
        return []
    shares = ", ".join(f"{100 * _others(measured[name]):.0f} % ({name})" for name in disturbed)
    return [
        f"other programs used much of the CPU: {shares}; run the demo on an otherwise idle machine before you compare "
        "figures"
    ]


def sharing_warnings(config: DemoConfig, cores: int) -> list[str]:
    """What to say before and after a run whose stage workers have to share cores."""
    sharing = shared_cores(config, cores)
    return [f"{sharing}: the figures say nothing about the policies"] if sharing else []


def shared_cores(config: DemoConfig, cores: int) -> str:
    """How many stage workers share how many cores; empty when each has one of its own."""
    workers = config.cluster.nodes * config.cluster.stages
    return f"{workers} stage workers share {cores} core{'s' if cores > 1 else ''}" if workers > cores else ""


def _disturbed(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """By policy: why its figures are worth nothing."""
    shares = {name: _others(items) for name, items in measured.items()}
    return {
        name: f"other programs used {100 * share:.0f} % of the CPU"
        for name, share in shares.items()
        if share > _MAX_OTHERS
    }


def _others(items: Sequence[Mapping[str, Any]]) -> float:
    """Largest share of the machine's CPU time that other programs used in any repetition."""
    return max(float(item["cpu_share"].get(OTHERS, 0.0)) for item in items)


def _describe_fairness(config: DemoConfig, machine: Mapping[str, Any]) -> str:
    stages = config.cluster.nodes * config.cluster.stages
    alone = machine["cores"] >= stages
    return _FAIRNESS.format(pinning="have a core each" if alone else f"share {machine['cores']} cores")


def _describe_traffic(config: DemoConfig) -> str:
    traffic = config.traffic
    if traffic.trace is not None:
        return (
            "the first requests of the trace, its time scaled to the load and the run, prompt and output lengths "
            "multiplied by one factor each to the demo's means and clipped to its limits"
        )
    return (
        f"Poisson arrivals at {100 * traffic.load:.0f} % of one node's capacity on average, {traffic.burst_factor:g} "
        f"times as dense between {100 * traffic.burst[0]:.0f} % and {100 * traffic.burst[1]:.0f} % of the run; "
        "lognormal lengths"
    )


def _describe_model(config: DemoConfig, facts: Mapping[str, Any]) -> str:
    model = config.model
    return (
        f"Llama of {facts['parameters'] / 1e6:.1f} M parameters ({model.layers} layers of {model.hidden}), one token "
        f"per byte, pre-trained for {model.pretrain_steps} steps on other parts of the documentation"
    )


def _is_meant(config: DemoConfig, claim: Mapping[str, Any]) -> bool:
    """How much is trained says nothing when what comes is the same for all."""
    return config.training.share is None or claim["name"] != "training"


def _describe_training(config: DemoConfig) -> str:
    training = config.training
    if training.share is not None:
        return (
            f"feedback that comes with the requests, {100 * training.share:g} % of all tasks: one piece of "
            f"{training.piece_tokens} tokens per AdamW step at {training.learning_rate:g}, documentation before the "
            "drift and source code after it"
        )
    return (
        f"one online job at a time: micro-batches of {training.batch_size} × {training.piece_tokens} tokens, one AdamW "
        f"step each at {training.learning_rate:g}, documentation before the drift and source code after it; the "
        "backlog never empties"
    )
