"""Configuration of the scheduler core."""

from dataclasses import dataclass, field
from enum import StrEnum

from services.scheduler.core.tasks import SloTarget


class SyncChoice(StrEnum):
    """How replicas are kept together: as the policy does it, not at all, by averaging, by copying from one trainer."""

    POLICY = "policy"
    NONE = "none"
    AVERAGE = "average"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreConfig:
    """Knobs of the core. Raises ValueError naming the field when a value makes no sense.

    Units are in the names; see `docs/scheduler.md` for the trade-offs.
    """

    policy: str = "lemix"
    #: Options of the policy by name (for example lambda_1, lambda_2, tau_s); an unknown name is a ValueError.
    policy_options: dict[str, float | int | str | bool] = field(default_factory=dict)
    default_slo: SloTarget = field(default_factory=SloTarget)
    #: Response-time unit of the paper: mean forward time per stage * stages. 0: derived from the profile.
    slo_unit_s: float = 0.0
    #: Most inference requests without a node; more are rejected with OVERLOADED.
    max_waiting_inference: int = 4096
    #: Most micro-batches offered to the core at once (the job's backlog stays in the ledger).
    max_waiting_training: int = 64
    #: A-PP window: micro-batches per node whose backward is not over. Those that wait for the optimizer step of their
    #: accumulation group do not count, or a group larger than the window could never fill.
    max_inflight_training: int = 4
    #: Longest time training may be held back while inference keeps arriving, seconds (starvation bound).
    max_hold_back_s: float = 5.0
    #: Sessions remembered with the node of their newest turn; the one used longest ago is forgotten first.
    max_sessions: int = 16384
    #: Output length assumed until enough requests of the cluster have ended, tokens.
    initial_output_tokens: int = 64
    #: How far operations may be off the profile, a fraction, before an alarm tells of it (where the profile's held-out
    #: error is larger, that far); 0: none does.
    drift_band: float = 0.12
    #: Seconds without activity after which a node no longer counts as held.
    hold_s: float = 10.0
    #: What is done every `sync_every_steps` optimizer steps of a node (0: never).
    sync: SyncChoice = SyncChoice.POLICY
    sync_every_steps: int = 0
    #: Give up on a synchronisation after this long, seconds.
    sync_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in (
            "max_waiting_inference",
            "max_waiting_training",
            "max_inflight_training",
            "max_sessions",
            "initial_output_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("slo_unit_s", "max_hold_back_s", "drift_band", "hold_s", "sync_every_steps", "sync_timeout_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
