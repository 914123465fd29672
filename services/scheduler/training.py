"""Everything about training jobs, put together."""

from services.runtime.clock import Clock
from services.scheduler.adapters import AdapterDesk
from services.scheduler.checkpoints import CheckpointDesk
from services.scheduler.feedback import Feedback
from services.scheduler.guard import LedgerGuard
from services.scheduler.inbox import Inbox
from services.scheduler.job_calls import JobCalls
from services.scheduler.job_lifecycle import JobLifecycle
from services.scheduler.job_pausing import JobPausing
from services.scheduler.job_progress import JobProgress
from services.scheduler.jobs import JobRegistry


class Training:
    """The parts, each with one thing to do."""

    def __init__(
        self,
        *,
        guard: LedgerGuard,
        inbox: Inbox,
        clock: Clock,
        max_running: int,
        max_paused: int,
        max_feedback_backlog: int,
        feedback_learning_rate: float,
        derive_sync_interval: bool,
        save_interval_s: float,
        checkpoints: CheckpointDesk | None = None,
        adapters: AdapterDesk | None = None,
    ) -> None:
        checkpoints = checkpoints or CheckpointDesk()
        self.adapters = adapters or AdapterDesk()
        self.jobs = JobRegistry(guard=guard, clock=clock, save_interval_s=save_interval_s)
        self.adapters.find_job = self.jobs.find
        checkpoints.announce = self.jobs.announce
        self.lifecycle = JobLifecycle(
            jobs=self.jobs,
            guard=guard,
            inbox=inbox,
            clock=clock,
            checkpoints=checkpoints,
            adapters=self.adapters,
            max_running=max_running,
            derive_sync_interval=derive_sync_interval,
        )
        self.calls = JobCalls(
            jobs=self.jobs,
            lifecycle=self.lifecycle,
            guard=guard,
            clock=clock,
            checkpoints=checkpoints,
            adapters=self.adapters,
        )
        self.pausing = JobPausing(jobs=self.jobs, lifecycle=self.lifecycle, max_paused=max_paused)
        self.feedback = Feedback(
            jobs=self.jobs,
            lifecycle=self.lifecycle,
            guard=guard,
            clock=clock,
            max_backlog=max_feedback_backlog,
            learning_rate=feedback_learning_rate,
        )
        self.progress = JobProgress(jobs=self.jobs, lifecycle=self.lifecycle, checkpoints=checkpoints)
