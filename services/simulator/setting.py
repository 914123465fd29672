"""From the command line to a scenario: files are read, defaults filled in."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from services.scheduler.core.tasks import SloTarget
from services.simulator.cautions import of_input
from services.simulator.lengths import Shape
from services.simulator.profile_file import Profile, read_profile
from services.simulator.scenario import Demand, Node, Scenario, ScenarioError, Training, demand, slo_of_units
from services.simulator.trace_file import TraceRow, read_trace
from services.simulator.traffic import WORKLOADS, CutTraffic, DrawnTraffic, RecordedTraffic, Traffic

_NO_PROFILE = (
    "--profile is missing: name a profile the profiler stored, <its directory>/<fingerprint>/<version>.json "
    "(make up leaves them in out/up/profiles)"
)

#: Drawn requests arrive this long by default.
_DURATION_S = 300.0

_LIMITS = ("max_batch", "max_prefill_tokens", "kv_capacity_tokens", "max_context_tokens", "prefix_cache_tokens")


class TrafficSample(NamedTuple):
    """The requests of the first seed: how many, per second, and tokens on average."""

    source: str
    num_requests: int
    rate: float
    mean_prompt_tokens: float
    mean_output_tokens: float


@dataclass(frozen=True, slots=True)
class Setting:
    """What was asked for. `scenario` has the first policy."""

    scenario: Scenario
    seeds: tuple[int, ...]
    profile: Profile
    demand: Demand
    sample: TrafficSample
    #: What to know before believing the figures, a line each.
    cautions: tuple[str, ...]

    @property
    def noise(self) -> float:
        """Relative standard deviation of durations; of a profile's the mean over its operations."""
        return self.profile.noise if self.scenario.noise is None else self.scenario.noise

    def describe(self) -> dict[str, Any]:
        """For the JSON file."""
        scenario, slo = self.scenario, self.scenario.slo
        training = scenario.training
        return {
            "profile": {"profile_id": self.profile.profile_id, "model": self.profile.model},
            "traffic": self.sample._asdict(),
            "stages": self.profile.latency.num_stages,
            "limits": {name: getattr(scenario.node, name) for name in _LIMITS},
            "policy_options": dict(scenario.policy_options),
            "slo": {"ttft_ms": milliseconds(slo.ttft_s), "tpot_ms": milliseconds(slo.tpot_s)},
            "training": {
                "tokens_per_s": _finite(training.tokens_per_s),
                "backlog": training.tokens_per_s == math.inf,
                "batch": training.batch,
                "length": training.length,
                "accumulation": training.accumulation,
            },
            "busy_nodes": {
                "serving": _finite(self.demand.serving_nodes),
                "training": _finite(self.demand.training_nodes),
            },
            "noise": self.noise,
            "seeds": list(self.seeds),
        }


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if value < math.inf else None


def milliseconds(seconds: float | None) -> float | None:
    """The same time; None stays None."""
    return None if seconds is None else seconds * 1e3


def build(options: argparse.Namespace) -> Setting:
    """Read the files and check everything. Raises TraceError, ProfileError, ScenarioError; ValueError for traffic."""
    _check(options)
    source = _traffic(options)
    if options.profile is None:
        raise ScenarioError(_NO_PROFILE)
    profile = read_profile(options.profile, model=options.model, num_stages=options.stages)
    seeds = _seeds(options)
    asked = source.draw(seeds[0])
    traffic: Traffic = CutTraffic(source, options.max_tokens) if options.max_tokens else source
    rows = traffic.draw(seeds[0])
    policy_options = dict(options.policy_option)
    scenario = Scenario(
        num_nodes=getattr(options, "nodes", 1),
        node=Node(
            latency=profile.latency,
            max_batch=options.max_batch,
            max_prefill_tokens=options.max_prefill_tokens,
            kv_capacity_tokens=options.kv_tokens,
            max_context_tokens=options.max_context_tokens,
            prefix_cache_tokens=options.prefix_cache_tokens,
            max_training_parts=options.max_training_parts,
        ),
        traffic=traffic,
        slo=_slo(options, slo_of_units(options.slo_units, profile.latency, rows)),
        training=_training(options),
        policy=options.policy,
        policy_options=policy_options,
        noise=options.noise,
        max_tokens=options.max_tokens,
        horizon_s=options.horizon_s,
    )
    try:
        scenario.check(rows)
    except ScenarioError as error:
        file = {"profile": options.profile, "trace": options.trace}.get(error.about)
        if file is None:
            raise
        raise ScenarioError(error.reason, str(file)) from error
    cautions = tuple(of_input(options, scenario, profile, asked))
    return Setting(scenario, seeds, profile, demand(scenario, rows), _sample(options, rows), cautions)


def _check(options: argparse.Namespace) -> None:
    """Options that contradict each other, or a file that cannot be written: before anything is read or simulated."""
    if options.prefix_cache_tokens > options.kv_tokens:
        kept = f"--prefix-cache-tokens {options.prefix_cache_tokens}"
        raise ScenarioError(f"{kept} is more than --kv-tokens {options.kv_tokens}, of which it is a part")
    if options.policy in getattr(options, "compare", ()):
        raise ScenarioError(f"--compare names {options.policy} although it is --policy already")
    names = [name for name, _ in options.policy_option]
    if len(set(names)) < len(names):
        raise ScenarioError(f"--policy-option names {max(names, key=names.count)} twice")
    if options.json is not None:
        try:
            options.json.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ScenarioError(f"--json {options.json}: {error.strerror}") from error
        if options.json.is_dir():
            raise ScenarioError(f"--json {options.json}: Is a directory")


def _traffic(options: argparse.Namespace) -> RecordedTraffic | DrawnTraffic:
    described = options.prompt_tokens is not None or options.output_tokens is not None
    if (options.trace is not None) + (options.workload is not None) + described != 1:
        raise ScenarioError("name one of --trace FILE, --workload NAME, or --prompt-tokens with --output-tokens")
    if options.trace is not None:
        for name in ("rate", "burstiness", "duration_s"):
            if getattr(options, name) is not None:
                instead = "--limit takes its first requests, --speed plays it faster or slower"
                raise ScenarioError(f"--{name.replace('_', '-')} does not go with --trace; {instead}")
        rows = read_trace(options.trace, limit=options.limit)
        # From the first row on: times may be those of a clock.
        recorded = [row._replace(arrival_s=row.arrival_s - rows[0].arrival_s) for row in rows]
        return RecordedTraffic(recorded, options.speed or 1.0)
    for name in ("limit", "speed"):
        if getattr(options, name) is not None:
            raise ScenarioError(f"--{name} goes with --trace alone")
    if options.workload is not None:
        known = WORKLOADS[options.workload]
        shape, rate, cv = known.shape, options.rate or known.rate, options.burstiness or known.cv
    else:
        if options.prompt_tokens is None or options.output_tokens is None:
            raise ScenarioError("--prompt-tokens and --output-tokens go together")
        shape = Shape(options.prompt_tokens, options.output_tokens)
        rate, cv = options.rate, options.burstiness or 1.0
    if not rate:
        raise ScenarioError("--rate is missing: requests per second")
    return DrawnTraffic(shape, rate, options.duration_s or _DURATION_S, cv)


def _sample(options: argparse.Namespace, rows: Sequence[TraceRow]) -> TrafficSample:
    source = options.trace.name if options.trace is not None else options.workload or "lognormal lengths"
    span_s = rows[-1].arrival_s
    return TrafficSample(
        source,
        len(rows),
        len(rows) / span_s if span_s > 0.0 else 0.0,
        sum(row.prompt_tokens for row in rows) / len(rows),
        sum(row.output_tokens for row in rows) / len(rows),
    )


def _seeds(options: argparse.Namespace) -> tuple[int, ...]:
    if options.seed is not None and options.seeds is not None:
        raise ScenarioError("--seed and --seeds exclude each other")
    if options.seed is not None:
        return (options.seed,)
    default = (0,) if options.command == "simulate" else (0, 1, 2)
    return options.seeds or default


def _slo(options: argparse.Namespace, default: SloTarget) -> SloTarget:
    """What was promised: a part that is named alone, else the default; a question about p99 names both."""
    ttft_s, tpot_s = _seconds(options.slo_ttft_ms), _seconds(options.slo_tpot_ms)
    if ttft_s is None and options.command == "plan" and options.question == "most-training":
        return SloTarget(_seconds(options.p99_ttft_ms), tpot_s or _seconds(options.p99_tpot_ms) or default.tpot_s)
    return default if ttft_s is None and tpot_s is None else SloTarget(ttft_s, tpot_s)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _training(options: argparse.Namespace) -> Training:
    # How much fits is searched for from no training to all there is.
    endless = options.command == "plan" and options.question == "most-training"
    rate = math.inf if endless or options.training_backlog else options.training_tokens_per_s
    return Training(rate, options.train_batch, options.train_length, options.train_accumulation)
