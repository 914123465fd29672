"""What the study runs: every knob with its default, checked before anything starts."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.demo.config import ModelConfig


class StudyError(RuntimeError):
    """The study cannot go on for a reason its user can mend; one line, no traceback."""


@dataclass(frozen=True, slots=True)
class SyncPolicy:
    """How replicas are kept together: `sync` (none, average, checkpoint) every `every_steps` steps of a replica."""

    name: str
    title: str
    sync: str
    every_steps: int = 0


#: All examples on one replica: what the others are held against.
REFERENCE = SyncPolicy("one_trainer", "one trainer", "none")
POLICIES = {
    policy.name: policy
    for policy in (
        SyncPolicy("none", "none", "none"),
        SyncPolicy("average_1", "average(1)", "average", 1),
        SyncPolicy("average_10", "average(10)", "average", 10),
        SyncPolicy("average_100", "average(100)", "average", 100),
        SyncPolicy("checkpoint_100", "checkpoint(100)", "checkpoint", 100),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """The study. Every run makes `updates` optimizer steps in all, each on the same piece of text."""

    updates: int = 2000
    seeds: int = 3
    replicas: tuple[int, ...] = (2, 4)
    policies: tuple[str, ...] = tuple(POLICIES)
    #: Tokens of a piece of text: one micro-batch, one optimizer step.
    piece_tokens: int = 128
    learning_rate: float = 5e-4
    #: Held-out text: so many windows of `piece_tokens`, measured every `evaluate_every` updates.
    held_out_windows: int = 16
    evaluate_every: int = 200
    model: ModelConfig = field(default_factory=lambda: ModelConfig(hidden=128, layers=5, pretrain_steps=300))
    processes: int = 0
    out: Path = Path("out/convergence")
    #: Pre-trained models, the same as the demo's.
    cache: Path = Path("out/cache")

    def to_json(self) -> dict[str, Any]:
        """Plain form for the summary."""
        return {**asdict(self), "out": str(self.out), "cache": str(self.cache)}


@dataclass(frozen=True, slots=True)
class Run:
    """One training run."""

    policy: SyncPolicy
    replicas: int
    seed: int

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.policy.title}, {self.replicas} replica{'s' if self.replicas > 1 else ''}, seed {self.seed}"

    @property
    def num_trainers(self) -> int:
        """Replicas that train; with checkpoints the first one does it for all."""
        return 1 if self.policy.sync == "checkpoint" else self.replicas


def runs(config: StudyConfig) -> list[Run]:
    """Every run of the study; the reference first."""
    found = []
    for seed in range(config.seeds):
        found.append(Run(REFERENCE, 1, seed))
        found += [Run(POLICIES[name], count, seed) for count in config.replicas for name in config.policies]
    return found


def check(config: StudyConfig) -> None:
    """Raise StudyError naming the first option that makes no sense."""
    for name in config.policies:
        if name not in POLICIES:
            raise StudyError(f"--policies: unknown policy {name!r}; known: {', '.join(POLICIES)}")
    rules = (
        (bool(config.policies), "--policies names no policy"),
        (len(set(config.policies)) == len(config.policies), "--policies names a policy twice"),
        (config.seeds >= 1, "--seeds must be at least 1"),
        (bool(config.replicas) and min(config.replicas) >= 2, "--replicas must name numbers of at least 2"),
        (len(set(config.replicas)) == len(config.replicas), "--replicas names a number twice"),
        (config.processes >= 0, "--processes must not be negative"),
        (
            config.updates >= config.evaluate_every and config.updates % config.evaluate_every == 0,
            f"--updates must be a multiple of {config.evaluate_every}",
        ),
    )
    for holds, message in rules:
        if not holds:
            raise StudyError(message)
    for count in config.replicas:
        if config.evaluate_every % count:
            raise StudyError(f"--replicas: {config.evaluate_every} updates cannot be shared by {count} replicas")
