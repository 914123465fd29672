"""The scheduler core: events in, commands out. Pure; the driver and the simulator are its only callers.

Work waits here in order of acceptance and leaves when a node may take it: requests up to the node's in-flight bound,
micro-batches up to `max_inflight_training` per node (the A-PP rule: one stream per node), or an accumulation group at a
time (S-PP). Where it goes is the policy's decision.
"""

import math
from dataclasses import replace

from services.latency import OPTIMIZER_STEP, NodeLatency
from services.scheduler.core import policies, traces
from services.scheduler.core.admission import deadline_s, refuse, refuse_overloaded, refuse_stale
from services.scheduler.core.assignment import Assigner
from services.scheduler.core.commands import CancelOnNode, Command, DriftAlarm, Drop, Reject, TakeBack
from services.scheduler.core.config import CoreConfig, SyncChoice
from services.scheduler.core.costs import NodeCosts, OpRecord
from services.scheduler.core.events import (
    AdaptersTold,
    Event,
    JobCancelled,
    JobEnded,
    JobPaused,
    JobResumed,
    NodeDraining,
    NodeJoined,
    NodeLost,
    NodeProfiled,
    OpFinished,
    SnapshotReady,
    SyncEnded,
    SyncIntervalSet,
    TaskArrived,
    TaskCancelled,
    TaskEnded,
    TaskRecovered,
    Tick,
    TrainingHeld,
    WeightsTold,
)
from services.scheduler.core.forecast import NodeForecast
from services.scheduler.core.held_time import HeldTime
from services.scheduler.core.node_spec import NodeRole, NodeSpec, QueueOrder
from services.scheduler.core.state import Cluster, LiveInference, LiveTask, LiveTraining, NodeState
from services.scheduler.core.status import CoreSnapshot, take_snapshot
from services.scheduler.core.synchronisation import Synchroniser, sync_mode
from services.scheduler.core.tasks import InferenceTask, Task, TrainingTask


class SchedulerCore:
    """Decides about work. `step` must see every event, in order.

    Raises ValueError at construction for an unknown policy or option.
    """

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        self._policy = policies.create(config.policy, config.policy_options)
        self._observer = self._policy if isinstance(self._policy, policies.Observer) else None
        self._cluster = Cluster(config)
        mode = sync_mode(config.sync, self._policy.sync_mode)
        self._sync = Synchroniser(mode, every_steps=config.sync_every_steps, timeout_s=config.sync_timeout_s)
        #: `Synchroniser.num_changes` when roles were given last.
        self._seen_sync_changes = 0
        self._now_s = -math.inf
        self._num_accepted = 0
        self._commands: list[Command] = []
        self._paused_jobs: set[str] = set()
        self._assigner = Assigner(config, self._policy, self._cluster)

    # ----------------------------------------------------------------- what callers use

    @property
    def queue_order(self) -> QueueOrder:
        """Order the nodes must give their stage queues under this policy."""
        return self._policy.queue_order

    def step(self, now_s: float, event: Event) -> list[Command]:
        """Take one event in and return what is to be done about it, in order."""
        # A clock that falls (two sources merged by the driver) must not make times negative.
        self._now_s = now_s = max(now_s, self._now_s)
        commands: list[Command] = []
        self._commands = self._assigner.commands = commands
        commands += self._sync.expire(now_s)
        self._handle(now_s, event)
        if self._observer is not None and self._observer.observe(now_s, event, self._cluster):
            self._set_roles()
            self._look_again()
        # Every turn but the last marks a node more as behind.
        while self._sync.num_changes != self._seen_sync_changes:
            self._set_roles()
            self._look_again()
        commands += self._sync.catch_up(now_s)
        self._assigner.assign(now_s)
        return commands

    def next_wakeup_s(self) -> float | None:
        """When a Tick is needed if nothing else happens; None: never."""
        wakeup_s = self._assigner.retry_s
        sync_s = self._sync.wakeup_s
        if sync_s is not None:
            wakeup_s = min(wakeup_s, sync_s)
        return wakeup_s if wakeup_s < math.inf else None

    def costs(self, node_id: str) -> NodeCosts | None:
        """What it predicts for the operations of a node as of the last step; None: there is no such node."""
        node = self._cluster.nodes.get(node_id)
        return None if node is None else node.costs

    def snapshot(self) -> CoreSnapshot:
        """State for status calls, as of the last step."""
        return take_snapshot(self._config.policy, self._cluster, self._now_s, self._sync.sync_id)

    def op_records(self) -> dict[str, list[OpRecord]]:
        """What was learnt of the operations of every node, by id."""
        return {node_id: self._cluster.nodes[node_id].costs.records() for node_id in sorted(self._cluster.nodes)}

    # ----------------------------------------------------------------- events

    def _handle(self, now_s: float, event: Event) -> None:  # noqa: C901 - one line per kind of event
        match event:
            case OpFinished():
                self._op_finished(now_s, event)
            case TaskArrived(task):
                self._task_arrived(now_s, task)
            case TaskEnded():
                self._task_ended(now_s, event)
            case TaskRecovered(task, node_id):
                self._task_recovered(now_s, task, node_id)
            case TaskCancelled(task_id):
                self._cancel(task_id)
            case JobCancelled(job_id):
                self._cancel_job(job_id)
                self._forget_job(job_id)
            case JobEnded(job_id):
                self._forget_job(job_id)
            case JobPaused(job_id):
                self._pause_job(job_id)
            case JobResumed(job_id):
                self._paused_jobs.discard(job_id)
            case TrainingHeld(node_id, held):
                self._cluster.hold_training(node_id, held)
            case NodeJoined(spec):
                self._node_joined(now_s, spec)
            case NodeLost(node_id):
                self._node_lost(now_s, node_id, keeps_training=event.keeps_training)
            case NodeDraining(node_id):
                self._node_draining(node_id)
            case SnapshotReady():
                self._commands += self._sync.snapshot_ready(event)
            case SyncEnded():
                self._sync_ended(now_s, event)
            case SyncIntervalSet(steps):
                self._sync.set_interval(steps)
            case WeightsTold(node_id, weight_step, trained_s):
                self._weights_told(node_id, weight_step, trained_s)
            case NodeProfiled(node_id, latency):
                self._node_profiled(node_id, latency)
            case AdaptersTold(node_id, adapter_ids):
                self._adapters_told(node_id, adapter_ids)
            case Tick():
                pass

    def _task_arrived(self, now_s: float, task: Task) -> None:
        if task.task_id in self._cluster.tasks:
            return  # delivered again
        if isinstance(task, TrainingTask) and task.job_id in self._paused_jobs:
            self._commands.append(TakeBack(task.task_id))
            return
        refusal = self._refusal(now_s, task)
        if refusal is not None:
            self._commands.append(refusal)
            return
        if isinstance(task, InferenceTask):
            self._cluster.arrivals.observe(now_s)
            self._cluster.prompts.observe(task.prompt_tokens)
        self._accept(task)

    def _refusal(self, now_s: float, task: Task) -> Reject | None:
        # A queue at its bound means that nothing could leave it in the last step, so the newcomer could not either.
        cluster = self._cluster
        if isinstance(task, TrainingTask):
            full = len(cluster.waiting_training) >= self._config.max_waiting_training
            return refuse_overloaded(task) if full else None
        if len(cluster.waiting_inference) >= self._config.max_waiting_inference:
            return refuse_overloaded(task)
        return refuse(task, cluster.may_serve) or refuse_stale(now_s, task, cluster.serving)

    def _accept(self, task: Task) -> LiveTask:
        cluster = self._cluster
        self._num_accepted += 1
        live: LiveTask
        if isinstance(task, InferenceTask):
            cluster.num_live_inference += 1
            live = LiveInference(task, self._num_accepted, deadline_s(task, self._config))
            cluster.waiting_inference[task.task_id] = live
            self._assigner.new_waiting.append(live)
        else:
            live = LiveTraining(task, self._num_accepted)
            cluster.waiting_training[task.task_id] = live
            cluster.expect_training(live)
        cluster.tasks[task.task_id] = live
        return live

    def _task_recovered(self, now_s: float, task: Task, node_id: str) -> None:
        if task.task_id in self._cluster.tasks:
            return
        live = self._accept(task)
        node = self._cluster.nodes.get(node_id)
        if node is not None:
            self._assigner.give(now_s, live, node)

    def _task_ended(self, now_s: float, event: TaskEnded) -> None:
        live = self._cluster.tasks.get(event.task_id)
        if live is None or live.node is None or live.node.spec.node_id != event.node_id:
            return  # a late report: the task ended before, or another node has it now
        node = live.node
        if isinstance(live, LiveInference):
            node.remove_inference(live)
            self._cluster.sessions.ended(live, node, event.output_tokens if event.ok else 0)
            if event.ok and event.output_tokens > 0:
                self._cluster.outputs.observe(live.task, event.output_tokens)
        else:
            node.remove_training(live)
        if node.forecast is not None:
            node.forecast.ended(event.task_id, now_s)
        if node.mirror is not None:
            node.mirror.ended(now_s, event.task_id, is_request=isinstance(live, LiveInference), ok=event.ok)
        node.held.ended(now_s, idle=not node.inference and not node.training)
        self._cluster.forget(live)

    def _op_finished(self, now_s: float, event: OpFinished) -> None:
        node = self._cluster.nodes.get(event.node_id)
        if node is None or not 0 <= event.stage < node.costs.num_stages:
            return
        traces.observe(event, node, self._cluster)
        if node.costs.changes:
            self._commands += [DriftAlarm(node.node_id, *change) for change in node.costs.changes]
            node.costs.changes.clear()
        if node.mirror is not None:
            node.mirror.ran(now_s, event)
        if event.op is OPTIMIZER_STEP and event.stage == node.costs.num_stages - 1:
            self._commands += self._sync.optimizer_step(now_s, event.node_id)

    def _weights_told(self, node_id: str, weight_step: int, trained_s: float | None) -> None:
        node = self._cluster.nodes.get(node_id)
        if node is not None:
            node.weights_told(weight_step, trained_s)
            if trained_s is not None:
                self._sync.trained(node_id)

    def _sync_ended(self, now_s: float, event: SyncEnded) -> None:
        node = self._cluster.nodes.get(event.node_id)
        if node is not None:
            node.weight_step = max(node.weight_step, event.weight_step)
        self._commands += self._sync.sync_ended(now_s, event)

    # ----------------------------------------------------------------- cancellation

    def _cancel(self, task_id: str) -> None:
        live = self._cluster.tasks.get(task_id)
        if live is None or live.cancelled:
            return
        live.cancelled = True
        if live.node is not None:
            if live.node.mirror is not None:
                live.node.mirror.cancelled(self._now_s, task_id)
            self._commands.append(CancelOnNode(task_id, live.node.node_id))
        else:
            self._drop(live)

    def _cancel_job(self, job_id: str) -> None:
        self._paused_jobs.discard(job_id)
        for live in self._cluster.of_job(job_id):
            self._cancel(live.task.task_id)

    def _pause_job(self, job_id: str) -> None:
        self._paused_jobs.add(job_id)
        for live in self._cluster.of_job(job_id):
            if live.node is None:
                self._take_back(live)

    def _take_back(self, live: LiveTraining) -> None:
        self._cluster.forget(live)
        self._commands.append(TakeBack(live.task.task_id))

    def _forget_job(self, job_id: str) -> None:
        for node in self._cluster.nodes.values():
            node.costs.forget_job(job_id)

    def _drop(self, live: LiveTask) -> None:
        self._cluster.forget(live)
        self._commands.append(Drop(live.task.task_id))

    # ----------------------------------------------------------------- nodes

    def _node_joined(self, now_s: float, spec: NodeSpec) -> None:
        cluster = self._cluster
        known = cluster.nodes.get(spec.node_id)
        if known is not None and known.spec.num_stages == spec.num_stages:
            # The same node with a new profile or new bounds: it still holds its work.
            self._predict_with(known, spec.latency)
            known.spec = spec
            known.is_draining = False
            known.adapter_ids = None
            self._commands += self._sync.joined(now_s, spec)
            self._set_roles()
            return
        if known is not None:
            self._node_lost(now_s, spec.node_id)
        cluster.nodes[spec.node_id] = NodeState(
            spec=spec,
            costs=NodeCosts(spec.latency, self._config.drift_band),
            held=HeldTime(self._config.hold_s),
            forecast=NodeForecast(spec.num_stages) if self._policy.uses_forecast else None,
        )
        self._commands += self._sync.joined(now_s, spec)
        self._set_roles()
        self._look_again()

    def _node_profiled(self, node_id: str, latency: NodeLatency) -> None:
        node = self._cluster.nodes.get(node_id)
        if node is not None and latency.num_stages == node.spec.num_stages:
            self._predict_with(node, latency)
            self._set_roles()

    def _predict_with(self, node: NodeState, latency: NodeLatency) -> None:
        """What was learnt about the old profile goes with it."""
        if node.spec.latency != latency:
            self._commands += _alarms_ended(node)
            node.costs = NodeCosts(latency, self._config.drift_band)
            node.spec = replace(node.spec, latency=latency)

    def _node_lost(self, now_s: float, node_id: str, *, keeps_training: bool = False) -> None:
        node = self._cluster.nodes.pop(node_id, None)
        if node is None:
            return
        self._cluster.sessions.node_lost(node)
        self._commands += self._sync.node_lost(now_s, node_id)
        self._set_roles()
        for kept in list(node.training.values()) if keeps_training else ():
            node.remove_training(kept)
            self._cluster.forget(kept)
        orphans: list[LiveTask] = [*node.inference.values(), *node.training.values()]
        self._cluster.wait_again(live for live in orphans if not live.cancelled)
        for live in orphans:
            if live.cancelled:
                self._drop(live)
            elif isinstance(live, LiveTraining) and live.task.job_id in self._paused_jobs:
                self._take_back(live)
        self._look_again()

    def _adapters_told(self, node_id: str, adapter_ids: tuple[str, ...]) -> None:
        node = self._cluster.nodes.get(node_id)
        if node is not None and node.adapter_ids != frozenset(adapter_ids):
            node.adapter_ids = frozenset(adapter_ids)
            self._look_again()

    def _node_draining(self, node_id: str) -> None:
        node = self._cluster.nodes.get(node_id)
        if node is not None and not node.is_draining:
            node.is_draining = True
            self._set_roles()
            self._look_again()

    def _set_roles(self) -> None:
        self._seen_sync_changes = self._sync.num_changes
        present = sorted(node.node_id for node in self._cluster.nodes.values() if not node.is_draining)
        usable = self._sync.usable(present)
        roles = self._sync.serving_only(self._policy.roles(usable))
        if self._config.sync is SyncChoice.CHECKPOINT:
            roles = self._sync.with_one_trainer(roles)
        held_out = set(present).difference(usable)
        roles |= dict.fromkeys(held_out, NodeRole.UNUSED)
        self._cluster.set_roles(roles, fastest_first=self._policy.fastest_first)
        self._cluster.held_out = tuple(self._cluster.nodes[node_id] for node_id in sorted(held_out))
        self._sync.set_roles(roles)

    def _look_again(self) -> None:
        """Nodes came or went: who waits may wait for another reason now, or may never fit again."""
        waiting = list(self._cluster.waiting_inference.values())
        self._assigner.new_waiting.clear()
        for live in waiting:
            refusal = refuse(live.task, self._cluster.may_serve)
            if refusal is None:
                self._assigner.new_waiting.append(live)
            else:
                self._cluster.forget(live)
                self._commands.append(refusal)


def _alarms_ended(node: NodeState) -> list[Command]:
    """A new profile: nothing is known to be off it."""
    return [
        DriftAlarm(node.node_id, record.stage, record.op, active=False, ratio=record.ratio)
        for record in node.costs.records()
        if record.drifting
    ]
