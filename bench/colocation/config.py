"""What is measured: the clusters, their traffic and training, and the promise, fixed before any policy runs."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.machine import usable_cores
from services.scheduler.core.policies import POLICIES

SUBJECT = "lemix"
BASELINES = ("separate", "round_robin", "paper_additive")
PROFILE = Path("deploy/profiles/a100-llama-2-7b.json")
LARGE_PROFILE = Path("deploy/profiles/a100-llama-2-7b-4-stages.json")
FAST_PROFILE = Path("deploy/profiles/h100-llama-2-7b.json")
#: Attainment with training off up to which a rate counts as served.
CAPACITY_ATTAINMENT = 0.99
#: Share of capacity at which the claims are judged.
HALF = 0.5
#: Rates of the cluster of two speeds, as shares of its capacity; the claim is judged at the last one, with training.
SPEED_SHARES = (0.75, 1.0)
#: Promised TTFT and TPOT: so many times what the mean request takes alone on an idle node. The paper's unit.
PROMISE_UNITS = 5.0


class ColocationError(ValueError):
    """An option that makes no sense; one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Settings of every node agent.

    kv_capacity_tokens: what 80 GB leave on a stage beside the weights, gradients and optimizer state of half a
    Llama-2-7B (54 GB) and the activations of the micro-batches in flight: 16 GB, at 256 KiB per token.
    max_training_parts: its layers.
    """

    max_batch: int = 32
    max_prefill_tokens: int = 2048
    kv_capacity_tokens: int = 65_536
    kv_block_tokens: int = 16
    expected_output_tokens: int = 256
    max_inflight_training: int = 8
    weight_handling: str = "stash"
    gradient_buffers: int = 2
    max_inflight_inference: int = 128
    max_training_parts: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A backlog without end: micro-batches of batch x length tokens, an optimizer step after `accumulation` of them.

    sync_every_steps, transfer_s: the cluster's; a replica's 13.5 GB take half a second over 25 GB/s.
    """

    batch: int = 1
    length: int = 512
    accumulation: int = 8
    sync_every_steps: int = 100
    transfer_s: float = 0.54

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.batch * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveConfig:
    """Runs on emulated clusters with all services, `time_scale` times as slow (None: the smallest that keeps time).

    real_seconds: of traffic, as the clock on the wall goes; clock_real_seconds: of every run that tries a time scale.
    policies: those that run; none: nothing is run live. large_nodes, large_profile, large_real_seconds,
    large_time_scale: a larger cluster under the first of them, at the same rate per node.
    """

    policies: tuple[str, ...] = (SUBJECT,)
    time_scale: float | None = None
    clock_real_seconds: float = 40.0
    real_seconds: float = 90.0
    large_nodes: int = 8
    large_profile: Path = LARGE_PROFILE
    large_real_seconds: float = 40.0
    large_time_scale: float = 8.0

    def __post_init__(self) -> None:
        for name in ("time_scale", "large_time_scale"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= 1000.0:
                raise ColocationError(f"--{name.replace('_', '-')} must be above 0 and at most 1000")


@dataclass(frozen=True, slots=True, kw_only=True)
class ColocationConfig:
    """shares: rates, as shares of capacity. seconds: length of the traffic of one simulation.

    trace: requests to follow instead of the published statistics, faster or slower as a rate asks for; with every seed
    another stretch of it, from its beginning again after its end. is_quick: too little is run for a verdict.
    """

    is_quick: bool = False
    profile: Path = PROFILE
    fast_profile: Path = FAST_PROFILE
    policies: tuple[str, ...] = (*BASELINES, SUBJECT)
    nodes: int = 4
    shares: tuple[float, ...] = (0.25, HALF, 0.75, 1.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: float = 100.0
    max_tokens: int = 1024
    trace: Path | None = None
    limits: Limits = Limits()
    training: Training = Training()
    live: LiveConfig = LiveConfig()
    #: A capacity is found to within this share of it.
    tolerance: float = 0.03
    processes: int = 0
    out: Path = Path("out/colocation")

    def __post_init__(self) -> None:
        for name in self.policies:
            if name not in POLICIES:
                raise ColocationError(f"--policies: unknown policy {name!r}; known: {', '.join(sorted(POLICIES))}")
        rules = (
            (SUBJECT in self.policies, f"--policies must name {SUBJECT}, which is judged"),
            (len(set(self.policies)) == len(self.policies), "--policies names a policy twice"),
            (bool(self.seeds), "--seeds names no seed"),
            (len(set(self.seeds)) == len(self.seeds), "--seeds names a seed twice"),
            (self.nodes >= 2, "--nodes must be at least 2: one side of separate clusters each"),
            (self.seconds > 0.0, "--seconds must be positive"),
            (self.processes >= 0, "--processes must not be negative"),
        )
        for holds, message in rules:
            if not holds:
                raise ColocationError(message)

    @property
    def num_processes(self) -> int:
        """Simulations at a time; by default one per core."""
        return self.processes or usable_cores()

    def to_json(self) -> dict[str, Any]:
        """Plain form for the summary."""
        plain = {**_plain(asdict(self)), "live": _plain(asdict(self.live))}
        return {**plain, "promise_units": PROMISE_UNITS, "capacity_attainment": CAPACITY_ATTAINMENT}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
