"""Settings of the scheduler."""

from pydantic import Field

from services.runtime.config import ConfigError, ServiceSettings, Settings
from services.scheduler.core.config import CoreConfig, SyncChoice
from services.scheduler.core.tasks import SloTarget


class SloSettings(Settings):
    """Response-time promise; an absent part is not checked."""

    ttft_s: float | None = Field(default=None, gt=0.0)
    tpot_s: float | None = Field(default=None, gt=0.0)


_CORE = CoreConfig()


class CoreSettings(Settings):
    """Knobs of the scheduler core; see `CoreConfig` for their meanings and defaults."""

    policy: str = _CORE.policy
    policy_options: dict[str, float | int | str | bool] = Field(default_factory=dict)
    default_slo: SloSettings = SloSettings()
    slo_unit_s: float = _CORE.slo_unit_s
    max_waiting_inference: int = _CORE.max_waiting_inference
    max_waiting_training: int = _CORE.max_waiting_training
    max_inflight_training: int = _CORE.max_inflight_training
    max_hold_back_s: float = _CORE.max_hold_back_s
    max_sessions: int = _CORE.max_sessions
    initial_output_tokens: int = _CORE.initial_output_tokens
    drift_band: float = _CORE.drift_band
    hold_s: float = _CORE.hold_s
    #: How replicas are kept together: none, average, checkpoint, or policy (whichever of the last two the policy uses).
    sync: SyncChoice = _CORE.sync
    #: -1: derived from the newest job, max(1, min(100, examples // 2)).
    sync_every_steps: int = Field(default=_CORE.sync_every_steps, ge=-1)
    sync_timeout_s: float = _CORE.sync_timeout_s

    def to_core(self) -> CoreConfig:
        """The core's own form. Raises ConfigError naming the key whose value the core refuses."""
        self._check_sync()
        values = self.model_dump(exclude={"default_slo", "sync_every_steps"})
        slo = SloTarget(self.default_slo.ttft_s, self.default_slo.tpot_s)
        try:
            return CoreConfig(**values, default_slo=slo, sync_every_steps=max(0, self.sync_every_steps))
        except ValueError as error:
            raise ConfigError(f"core.{error}") from error

    def _check_sync(self) -> None:
        """An interval that is asked for must have something to do, and the other way round."""
        steps = self.sync_every_steps
        if self.sync is SyncChoice.NONE and steps != 0:
            raise ConfigError(f'core.sync_every_steps must be 0 with core.sync "none", got {steps}')
        if self.sync in (SyncChoice.AVERAGE, SyncChoice.CHECKPOINT) and steps == 0:
            raise ConfigError(
                f'core.sync "{self.sync}" needs core.sync_every_steps: at least 1, or -1 (from the newest job)'
            )


class SchedulerSettings(ServiceSettings):
    """Settings of `python -m services.scheduler` (`LEMIX_SCHEDULER_...`)."""

    listen: str = "127.0.0.1:50061"
    #: Ledger: redis://host:port/db, or memory://name for trials in one process.
    redis_url: str = "redis://127.0.0.1:6379/0"
    #: Longest ledger operation before it counts as failed, seconds.
    ledger_timeout_s: float = Field(2.0, gt=0.0)
    #: How long outcomes of requests are kept for idempotent retries, seconds.
    result_ttl_s: float = Field(3600.0, gt=0.0)
    #: How long files and ended jobs are kept, seconds.
    retention_s: float = Field(30 * 86400.0, gt=0.0)
    #: host:port of the profiler. Empty: none; then `profile_path` must name a stored profile.
    profiler_address: str = ""
    #: Profile (JSON) used for every node instead of asking the profiler.
    profile_path: str = ""
    #: Longest measurement of a new node, seconds.
    profile_timeout_s: float = Field(600.0, gt=0.0)
    #: A node whose operations are off their profile is measured again, between its operations, once it has had nothing
    #: to do for so long, seconds; needs `profiler_address`. 0: never.
    reprofile_idle_s: float = Field(0.0, ge=0.0)
    #: Longest such measurement, seconds.
    reprofile_budget_s: float = Field(60.0, gt=0.0)
    #: A node without a sign of life for this long is lost, seconds.
    node_lease_s: float = Field(5.0, gt=0.0)
    #: How long what a lost node has trained since its newest checkpoint, and was to train next, waits for it, seconds;
    #: then other nodes train it. Nodes without checkpoints are not waited for. 0: none is.
    node_return_s: float = Field(60.0, ge=0.0)
    #: Whether another node may go on from the newest checkpoint of a lost node that did not come back within
    #: `node_return_s`. Only with a checkpoint directory that all nodes share.
    checkpoint_failover: bool = False
    #: Longest wait for a node that saves, restores or exports a checkpoint, seconds.
    checkpoint_timeout_s: float = Field(120.0, gt=0.0)
    #: JSON lines of every event of the core and what came of it. Empty: none.
    event_log_path: str = ""
    #: Events waiting for the core; traces are dropped when half of it is taken.
    max_queued_events: int = Field(16384, ge=16)
    #: Messages waiting for one gateway or node; a slower one is disconnected.
    max_queued_messages: int = Field(8192, ge=16)
    #: Jobs that run at once. A node keeps the optimizer state of 8; more would push each other's out.
    max_running_jobs: int = Field(8, ge=1)
    #: Jobs that are paused at once.
    max_paused_jobs: int = Field(32, ge=1)
    #: Feedback examples not trained yet.
    max_feedback_backlog: int = Field(10_000, ge=1)
    #: Learning rate at which feedback is trained.
    feedback_learning_rate: float = Field(1e-4, gt=0.0, allow_inf_nan=False)
    #: Examples of one file.
    max_file_examples: int = Field(1_000_000, ge=1)
    #: Progress of jobs is stored at most this often, seconds.
    job_save_interval_s: float = Field(0.5, gt=0.0)
    core: CoreSettings = CoreSettings()
