"""Which training op may enter the pipeline next: micro-batches, accumulation groups and the optimizer step.

A group is the micro-batches of one job whose gradients one optimizer step applies. One group takes micro-batches at a
time; it closes when it is full, when its job says so (`last`), or when nothing came for `group_timeout_s`, so a job
never blocks another for ever. Gradients cannot be taken out of the engine's accumulators again: a cancelled or failed
micro-batch counts as one of its group's, and a group that touched any accumulator ends with a step.
"""

import math
from bisect import insort
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from services.latency import OPTIMIZER_STEP, TRAIN_BACKWARD, TRAIN_FORWARD, OpKind
from services.node_agent.core.types import (
    ASYNC,
    GPIPE,
    ONE_F_ONE_B,
    Command,
    FreeKv,
    NodeCoreConfig,
    Op,
    TaskDone,
    TrainingMicrobatch,
)


class _Waiting(NamedTuple):
    sequence: int
    arrival: int
    ready_s: float
    microbatch: TrainingMicrobatch


@dataclass(slots=True, eq=False)
class _InFlight:
    microbatch: TrainingMicrobatch
    group_id: int
    cancelled: bool = False
    #: Stages from stage 0 up on which its forward has begun and its backward has not ended.
    height: int = 1
    #: Its forward left the last stage.
    turned: bool = False


@dataclass(slots=True, eq=False)
class Group:
    """An accumulation group from its first forward until its step left the last stage."""

    group_id: int
    job_id: str
    size: int
    started: int = 0
    inflight: int = 0
    #: Takes no more micro-batches.
    closed: bool = False
    #: Some stage holds gradients of this group.
    has_gradients: bool = False
    #: Micro-batches whose backward is done and that wait for the step.
    accumulated: dict[str, None] = field(default_factory=dict)
    stepping: bool = False
    step_failed: bool = False
    #: Stages the step has run on.
    stages_stepped: int = 0


class TrainingQueue:
    """Training tasks of one node."""

    def __init__(self, config: NodeCoreConfig) -> None:
        self._config = config
        schedule = config.training_schedule
        self._is_gpipe, self._is_1f1b = schedule == GPIPE, schedule == ONE_F_ONE_B
        #: The next group's forwards follow the step of the group before up the pipeline.
        self._one_by_one = config.weight_handling == "drain" or schedule != ASYNC
        windows = {ASYNC: config.max_inflight_training, GPIPE: math.inf, ONE_F_ONE_B: config.num_stages}
        self._window = windows[schedule]
        self._hold_forwards = False
        # Jobs take turns group by group: the first one opens the next group.
        self._waiting: dict[str, list[_Waiting]] = {}
        self._waiting_jobs: dict[str, str] = {}
        self._arrivals = 0
        self._inflight: dict[str, _InFlight] = {}
        # In the order they were opened; only the newest may be open. Their steps run in the order they are complete.
        self._groups: list[Group] = []
        self._next_group_id = 1
        #: Whether a group may have become complete since the last look.
        self._may_be_complete = False
        #: Per stage the groups that hold a gradient buffer: from their first backward there until their step.
        self._holders: list[set[int]] = [set() for _ in range(config.num_stages)]
        self._gate_open_s: float | None = None
        self._step_ready_s: float | None = None
        self._open_group_idle_s: float | None = None
        #: Kind and ready time of the op that may enter stage 0 now.
        self.entry: tuple[OpKind, float] | None = None

    # ------------------------------------------------------------- state

    @property
    def num_waiting(self) -> int:
        """Micro-batches not started."""
        return len(self._waiting_jobs)

    @property
    def num_inflight(self) -> int:
        """Micro-batches between the start of their forward and the end of their backward."""
        return len(self._inflight)

    @property
    def num_accumulated(self) -> int:
        """Micro-batches that wait for the end of their optimizer step."""
        return sum(len(group.accumulated) for group in self._groups)

    @property
    def owes_steps(self) -> bool:
        """Whether a group has a step to come that has not entered stage 0."""
        return any(not group.stepping for group in self._groups)

    @property
    def wakeup_s(self) -> float | None:
        """When the open group times out if nothing happens before."""
        if self._open_group_idle_s is None:
            return None
        return self._open_group_idle_s + self._config.group_timeout_s

    def task_ids(self) -> tuple[str, ...]:
        """Every live micro-batch."""
        accumulated = (task_id for group in self._groups for task_id in group.accumulated)
        return (*self._waiting_jobs, *self._inflight, *accumulated)

    def holds(self, task_id: str) -> bool:
        """Whether this micro-batch is live."""
        if task_id in self._waiting_jobs or task_id in self._inflight:
            return True
        return any(task_id in group.accumulated for group in self._groups)

    def is_cancelled(self, task_id: str) -> bool:
        """Whether this micro-batch in flight has been cancelled."""
        return self._inflight[task_id].cancelled

    def group_of(self, task_id: str) -> int:
        """Id of the group of a micro-batch in flight."""
        return self._inflight[task_id].group_id

    def may_run(self, op: Op, stage: int) -> bool:
        """Whether schedule and gradient buffers let a stage run this forward or backward now."""
        if op.kind is TRAIN_BACKWARD:
            holders = self._holders[stage]
            if op.group not in holders and len(holders) >= self._config.gradient_buffers:
                return False
            starts = self._is_gpipe and stage + 1 == self._config.num_stages
            return not (starts and self._is_filling(op.group))
        if not self._is_1f1b:
            return True
        others = (s for task_id, s in self._inflight.items() if task_id != op.task_ids[0] and s.group_id == op.group)
        return sum(state.height > stage for state in others) < self._config.num_stages - stage

    def _is_filling(self, group_id: int) -> bool:
        """gpipe: whether forwards of this group are to come. Those a weight change holds up come after the backwards
        that it waits for."""
        is_open = not (self._group(group_id).closed or self._hold_forwards)
        return is_open or any(not state.turned for state in self._inflight.values() if state.group_id == group_id)

    def backward_starts(self, group_id: int, stage: int) -> None:
        """A stage takes a backward of this group: it holds a gradient buffer from now on. Every stage above does so
        already, so groups that wait for each other's buffers cannot form a circle."""
        for holders in self._holders[stage:]:
            holders.add(group_id)

    # ------------------------------------------------------------- arrival and cancellation

    def add(self, now_s: float, microbatch: TrainingMicrobatch) -> None:
        """Queue a micro-batch behind the earlier ones of its job. A live id is ignored (redelivery)."""
        if self.holds(microbatch.task_id):
            return
        self._arrivals += 1
        queue = self._waiting.setdefault(microbatch.job_id, [])
        insort(queue, _Waiting(microbatch.sequence, self._arrivals, now_s, microbatch))
        self._waiting_jobs[microbatch.task_id] = microbatch.job_id

    def cancel(self, task_id: str, is_running: bool) -> list[Command]:
        """End a micro-batch now; when a stage is running an op of it, at the end of that op.

        One whose step is under way is trained: too late to cancel.
        """
        job_id = self._waiting_jobs.pop(task_id, None)
        if job_id is not None:
            left = [waiting for waiting in self._waiting[job_id] if waiting.microbatch.task_id != task_id]
            self._waiting[job_id] = left
            if not left:
                del self._waiting[job_id]
            return [TaskDone(task_id, "cancelled")]
        if task_id in self._inflight:
            self._inflight[task_id].cancelled = True
            return [] if is_running else self.drop(task_id, failed=False)
        for group in self._groups:
            if task_id in group.accumulated and not group.stepping:
                del group.accumulated[task_id]
                return [TaskDone(task_id, "cancelled")]
        return []

    # ------------------------------------------------------------- progress

    def refresh(self, now_s: float, hold_forwards: bool) -> None:
        """Work out `entry` after anything changed. hold_forwards: a weight change waits for in-flight micro-batches."""
        self.entry = None
        self._hold_forwards = hold_forwards
        if not self._groups and not self._waiting:
            self._gate_open_s = self._step_ready_s = self._open_group_idle_s = None
            return
        self._close_idle_group(now_s)
        if self._complete_group() is not None:
            if self._step_ready_s is None:
                self._step_ready_s = now_s
            self.entry = (OPTIMIZER_STEP, self._step_ready_s)
        else:
            self._step_ready_s = None
        queue = None if hold_forwards else self._admitted_queue()
        if queue is None:
            self._gate_open_s = None
        else:
            if self._gate_open_s is None:
                self._gate_open_s = now_s
            if self.entry is None:
                self.entry = (TRAIN_FORWARD, max(queue[0].ready_s, self._gate_open_s))

    def take_forward(self) -> TrainingMicrobatch:
        """Start the forward that `entry` names."""
        queue = self._admitted_queue()
        if queue is None:
            raise ValueError("no training forward may start")
        microbatch = queue.pop(0).microbatch
        job_id = microbatch.job_id
        del self._waiting_jobs[microbatch.task_id]
        if not self._groups or self._groups[-1].closed:
            self._groups.append(Group(self._next_group_id, job_id, max(1, microbatch.accumulation)))
            self._next_group_id += 1
            # The job goes to the end of the line for the group after this one.
            self._waiting[job_id] = self._waiting.pop(job_id)
        if not queue:
            del self._waiting[job_id]
        group = self._groups[-1]
        group.started += 1
        group.inflight += 1
        group.closed = group.started >= group.size or microbatch.last
        self._inflight[microbatch.task_id] = _InFlight(microbatch, group.group_id)
        return microbatch

    def close(self) -> None:
        """The open group takes no more micro-batches and steps with what it has."""
        if self._groups and not self._groups[-1].closed:
            self._groups[-1].closed = self._may_be_complete = True

    def take_step(self) -> Group:
        """Start the optimizer step that `entry` names."""
        group = self._complete_group()
        if group is None:
            raise ValueError("no optimizer step is due")
        group.stepping = True
        return group

    def forward_starts(self, task_id: str, stage: int) -> None:
        """A stage takes this micro-batch's forward, or the next piece of it."""
        self._inflight[task_id].height = stage + 1

    def turned(self, task_id: str) -> None:
        """The forward left the last stage."""
        self._inflight[task_id].turned = True

    def backward_ran(self, task_id: str) -> None:
        """A stage ran (part of) this micro-batch's backward: its accumulators hold gradients."""
        self._group(self._inflight[task_id].group_id).has_gradients = True

    def backward_left(self, task_id: str, stage: int) -> None:
        """A stage is done with this micro-batch's backward."""
        self._inflight[task_id].height = stage

    def backward_done(self, task_id: str) -> None:
        """The backward left stage 0."""
        group = self._group(self._inflight.pop(task_id).group_id)
        group.inflight -= 1
        group.accumulated[task_id] = None
        self._may_be_complete = True

    def drop(self, task_id: str, *, failed: bool) -> list[Command]:
        """End a micro-batch in flight whose op failed or that was cancelled; its group goes on."""
        state = self._inflight.pop(task_id)
        self._group(state.group_id).inflight -= 1
        self._may_be_complete = True
        return [FreeKv(task_id), TaskDone(task_id, "error" if failed and not state.cancelled else "cancelled")]

    def step_ran(self, group_id: int, failed: bool) -> list[Command]:
        """The step ran on one more stage; after the last one the group's tasks end."""
        group = self._group(group_id)
        group.step_failed |= failed
        self._holders[group.stages_stepped].discard(group_id)
        group.stages_stepped += 1
        if group.stages_stepped < self._config.num_stages:
            return []
        self._groups.remove(group)
        reason = "error" if group.step_failed else "trained"
        return [TaskDone(task_id, reason) for task_id in group.accumulated]

    def fork(self) -> "TrainingQueue":
        """An independent copy."""
        twin = TrainingQueue.__new__(TrainingQueue)
        twin.__dict__.update(self.__dict__)
        twin._waiting = {job_id: queue.copy() for job_id, queue in self._waiting.items()}
        twin._waiting_jobs = self._waiting_jobs.copy()
        twin._inflight = {task_id: replace(state) for task_id, state in self._inflight.items()}
        twin._holders = [holders.copy() for holders in self._holders]
        twin._groups = [replace(group, accumulated=group.accumulated.copy()) for group in self._groups]
        return twin

    # ------------------------------------------------------------- internals

    def _group(self, group_id: int) -> Group:
        for group in self._groups:
            if group.group_id == group_id:
                return group
        raise ValueError(f"no accumulation group {group_id}")

    def _complete_group(self) -> Group | None:
        """The oldest group whose gradients are complete on all stages and whose step has not been released. Groups
        that ended without any gradient go away."""
        if not self._may_be_complete:
            return None
        for group in [g for g in self._groups if g.closed and not g.inflight and not g.stepping]:
            if group.has_gradients:
                return group
            self._groups.remove(group)
            for holders in self._holders:
                holders.discard(group.group_id)
        self._may_be_complete = False
        return None

    def _admitted_queue(self) -> list[_Waiting] | None:
        """Queue of the job whose next forward may enter stage 0; None when there is none."""
        if not self._waiting or len(self._inflight) >= self._window:
            return None
        newest = self._groups[-1] if self._groups else None
        if newest is not None and not newest.closed:
            return self._waiting.get(newest.job_id)
        if newest is not None and self._one_by_one and newest.stages_stepped == 0:
            return None
        return next(iter(self._waiting.values()))

    def _close_idle_group(self, now_s: float) -> None:
        """Close the open group when its job has brought nothing for too long, or nobody in it is left."""
        group = self._groups[-1] if self._groups else None
        if group is None or group.closed or group.job_id in self._waiting or self._is_busy(group):
            self._open_group_idle_s = None
            return
        if self._open_group_idle_s is None:
            self._open_group_idle_s = now_s
        if not (group.accumulated or group.inflight) or now_s >= self._open_group_idle_s + self._config.group_timeout_s:
            group.closed = self._may_be_complete = True
            self._open_group_idle_s = None

    def _is_busy(self, group: Group) -> bool:
        """Whether something of an open group is on its way that does not wait for the group to be closed."""
        if not self._is_gpipe:
            return group.inflight > 0
        return any(not state.turned for state in self._inflight.values() if state.group_id == group.group_id)
