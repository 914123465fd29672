"""What the demo runs: every knob with its default, checked before anything starts."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.live.errors import LiveError


class DemoError(LiveError):
    """The demo cannot go on."""


@dataclass(frozen=True, slots=True)
class PolicyRun:
    """One contestant: what the scheduler is told."""

    name: str
    title: str
    #: Policy of the scheduler.
    policy: str
    #: Scheduler's `sync_every_steps`: -1 derives k from the job, 0 never synchronises.
    sync_every_steps: int


POLICIES = {
    run.name: run
    for run in (
        PolicyRun("separate", "separate (weights copied every k steps)", "separate", -1),
        PolicyRun("round_robin", "round robin (averaged every k steps)", "round_robin", -1),
        PolicyRun("lemix", "lemix (averaged every k steps)", "lemix", -1),
        PolicyRun("lemix_no_sync", "lemix, replicas never averaged", "lemix", 0),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The model and its pre-training. Part of the key of the cached model.

    Large enough that computing, not the control plane on the same cores, is what a request costs; small enough to be
    pre-trained in well under a minute on 2 cores.
    """

    hidden: int = 256
    layers: int = 6
    pretrain_steps: int = 180
    pretrain_batch: int = 4
    pretrain_length: int = 256
    pretrain_learning_rate: float = 2e-3
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficConfig:
    """Open-loop traffic. Lengths are lognormal: `median * exp(sigma * normal)`, clipped to `min..max` tokens."""

    seconds: float = 40.0
    #: Mean request rate as a share of one node's capacity.
    load: float = 0.3
    #: Rate during the burst over the rate outside it.
    burst_factor: float = 2.0
    #: Burst as shares of the run.
    burst: tuple[float, float] = (0.2, 0.3)
    #: When prompts and training text switch from documentation to source code, as a share of the run.
    drift: float = 0.5
    prompt_median: float = 208.0
    prompt_sigma: float = 0.5
    prompt_limits: tuple[int, int] = (32, 384)
    output_median: float = 16.0
    output_sigma: float = 0.5
    output_limits: tuple[int, int] = (4, 64)
    #: True continuation whose loss is measured with each prompt, tokens.
    reference_tokens: int = 32
    warmup_requests: int = 8
    #: File with arrival_s,prompt_tokens,output_tokens to follow instead.
    trace: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """The online job: `batch_size` pieces of `piece_tokens` tokens per micro-batch, one optimizer step each."""

    piece_tokens: int = 128
    batch_size: int = 1
    learning_rate: float = 3e-4
    #: Passes over the file: large enough that the backlog never empties.
    num_epochs: int = 100
    #: Share of all tasks that is training: pieces come as feedback, with the requests. None: an endless backlog.
    share: float | None = None
    #: k of the policies that synchronise, when training comes as feedback and no job's length tells it.
    feedback_sync_every_steps: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """Shape of the local cluster."""

    nodes: int = 2
    stages: int = 1
    #: Most requests one node decodes together.
    max_batch: int = 4
    start_timeout_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Everything the demo does."""

    policies: tuple[str, ...] = tuple(POLICIES)
    repeat: int = 1
    seed: int = 0
    out: Path = Path("out/demo")
    #: Pre-trained models, the same wherever results go.
    cache: Path = Path("out/cache")
    #: SLO in units of the predicted time of the mean request alone on its node.
    slo_units: float = 5.0
    #: Time after the last planned arrival within which every answer must be there.
    drain_s: float = 60.0
    #: A node counts as held until it was idle for this long.
    hold_s: float = 10.0
    model: ModelConfig = field(default_factory=ModelConfig)
    traffic: TrafficConfig = field(default_factory=TrafficConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def to_json(self) -> dict[str, Any]:
        """Plain form for the summary; paths become strings relative to where the demo ran."""
        values = asdict(self)
        values["out"] = str(self.out)
        values["cache"] = str(self.cache)
        values["policies"] = list(self.policies)
        return values


def check(config: DemoConfig) -> None:
    """Raise DemoError naming the first option that makes no sense."""
    traffic, cluster, share = config.traffic, config.cluster, config.training.share
    rules = (
        (config.repeat >= 1, "--repeat must be at least 1"),
        (share is None or 0.0 < share < 1.0, "--training-share must be above 0 and below 1"),
        (cluster.nodes >= 1, "--nodes must be at least 1"),
        (1 <= cluster.stages <= config.model.layers, f"--stages must be between 1 and {config.model.layers}"),
        (5 <= traffic.seconds <= 3600, "--seconds must be between 5 and 3600"),
        (0 < traffic.load <= 1, "--load must be above 0 and at most 1"),
        (bool(config.policies), "--policies names no policy"),
        (len(set(config.policies)) == len(config.policies), "--policies names a policy twice"),
    )
    for holds, message in rules:
        if not holds:
            raise DemoError(message)
    for name in config.policies:
        if name not in POLICIES:
            raise DemoError(f"--policies: unknown policy {name!r}; known: {', '.join(POLICIES)}")
        if name == "separate" and cluster.nodes < 2:
            raise DemoError("--nodes: policy separate needs at least 2 nodes (one serves, one trains)")
