"""Properties that hold under every policy, whatever happens in whatever order."""

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.latency import OpKind
from services.scheduler.core.commands import (
    ApplyWeights,
    Assign,
    CancelOnNode,
    Command,
    Drop,
    Reject,
    TakeBack,
    TakeSnapshot,
)
from services.scheduler.core.config import CoreConfig
from services.scheduler.core.events import (
    Event,
    JobCancelled,
    JobPaused,
    JobResumed,
    NodeJoined,
    NodeLost,
    OpFinished,
    SnapshotReady,
    SyncEnded,
    TaskArrived,
    TaskCancelled,
    TaskEnded,
    Tick,
)
from services.scheduler.core.policies import POLICIES
from services.scheduler.core.scheduler import SchedulerCore
from services.scheduler.core.tasks import InferenceTask, SloTarget, Task, TrainingTask
from tests.simulation.harness import spec

NODE_IDS = ("a", "b", "c")
MAX_INFLIGHT_INFERENCE, MAX_INFLIGHT_TRAINING = 3, 2
MAX_HOLD_BACK_S = 2.0
STEP_S = 0.05


class CoreMachine(RuleBasedStateMachine):
    """The driver's side: what it told the core and what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.next_id = 0
        self.nodes: set[str] = set()
        self.waiting: dict[str, Task] = {}
        self.held: dict[str, tuple[Task, str]] = {}
        self.cancelled: set[str] = set()
        self.paused: set[str] = set()
        self.backward_done: set[str] = set()
        self.syncs: list[tuple[str, str, str]] = []
        self.log: list[tuple[float, Event, list[Command]]] = []

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)), ttft_s=st.sampled_from([None, 0.01, 0.2]), k=st.integers(0, 3)
    )
    def start(self, policy: str, ttft_s: float | None, k: int) -> None:
        self.config = CoreConfig(
            policy=policy,
            default_slo=SloTarget(ttft_s=ttft_s),
            max_waiting_inference=4,
            max_waiting_training=4,
            max_inflight_training=MAX_INFLIGHT_TRAINING,
            max_hold_back_s=MAX_HOLD_BACK_S,
            sync_every_steps=k,
            sync_timeout_s=1.0,
        )
        self.core = SchedulerCore(self.config)

    # ------------------------------------------------------------- events

    @rule(node_id=st.sampled_from(NODE_IDS), num_stages=st.integers(1, 2), slowdown=st.sampled_from([1.0, 3.0]))
    def join(self, node_id: str, num_stages: int, slowdown: float) -> None:
        if node_id not in self.nodes:
            self.nodes.add(node_id)
            joined = spec(node_id, num_stages, slowdown=slowdown, max_inflight_inference=MAX_INFLIGHT_INFERENCE)
            self.tell(NodeJoined(joined))

    @precondition(lambda self: self.nodes)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        node_id = data.draw(st.sampled_from(sorted(self.nodes)))
        self.nodes.discard(node_id)
        for task_id, (task, holder) in list(self.held.items()):
            if holder == node_id:
                del self.held[task_id]
                self.waiting[task_id] = task
                self.backward_done.discard(task_id)
        self.tell(NodeLost(node_id))

    @rule(prompt_tokens=st.integers(1, 300), max_tokens=st.integers(1, 50), twice=st.booleans())
    def request(self, prompt_tokens: int, max_tokens: int, twice: bool) -> None:
        self.next_id += 1
        self.arrive(InferenceTask(f"r{self.next_id}", self.now_s, prompt_tokens, max_tokens), twice)

    @rule(job_id=st.sampled_from(["j", "k"]), length=st.integers(1, 4000), twice=st.booleans())
    def microbatch(self, job_id: str, length: int, twice: bool) -> None:
        self.next_id += 1
        self.arrive(TrainingTask(f"m{self.next_id}", self.now_s, job_id, 1, length), twice)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), ok=st.booleans())
    def end(self, data: st.DataObject, ok: bool) -> None:
        task_id = data.draw(st.sampled_from(sorted(self.held)))
        _, node_id = self.held.pop(task_id)
        self.tell(TaskEnded(task_id, node_id, ok=ok, output_tokens=3 if ok else 0))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), op=st.sampled_from(OpKind), stage=st.integers(0, 1))
    def trace(self, data: st.DataObject, op: OpKind, stage: int) -> None:
        task_id = data.draw(st.sampled_from(sorted(self.held)))
        task, node_id = self.held[task_id]
        if op is OpKind.TRAIN_BACKWARD and stage == 0 and isinstance(task, TrainingTask):
            self.backward_done.add(task_id)
        is_first = op is OpKind.PREFILL
        self.tell(
            OpFinished(node_id, stage, op, self.now_s, self.now_s + 0.01, (task_id,), 10, 10, first_token=is_first)
        )

    @precondition(lambda self: self.held or self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        task_id = data.draw(st.sampled_from(sorted({**self.held, **self.waiting})))
        self.tell(TaskCancelled(task_id))

    @rule(job_id=st.sampled_from(["j", "k"]))
    def cancel_job(self, job_id: str) -> None:
        self.paused -= {job_id}
        self.tell(JobCancelled(job_id))

    @rule(job_id=st.sampled_from(["j", "k"]), pause=st.booleans())
    def pause_job(self, job_id: str, pause: bool) -> None:
        self.paused = self.paused | {job_id} if pause else self.paused - {job_id}
        self.tell(JobPaused(job_id) if pause else JobResumed(job_id))

    @invariant()
    def nothing_of_a_paused_job_waits(self) -> None:
        assert not any(isinstance(task, TrainingTask) and task.job_id in self.paused for task in self.waiting.values())

    @precondition(lambda self: self.held)
    @rule(data=st.data(), node_id=st.sampled_from(NODE_IDS))
    def late_report(self, data: st.DataObject, node_id: str) -> None:
        task_id = data.draw(st.sampled_from(sorted(self.held)))
        if self.held[task_id][1] != node_id:
            assert not any(
                isinstance(command, Drop | Reject) for command in self.tell(TaskEnded(task_id, node_id, True))
            )

    @precondition(lambda self: self.syncs)
    @rule(ok=st.booleans())
    def answer_sync(self, ok: bool) -> None:
        phase, sync_id, node_id = self.syncs.pop(0)
        if phase == "snapshot" and ok:
            self.tell(SnapshotReady(sync_id, node_id))
        else:
            self.tell(SyncEnded(sync_id, node_id, ok=ok))

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        """Time passes; the driver sends a Tick whenever the core asked for one."""
        until_s = self.now_s + seconds
        for _ in range(1000):
            wakeup_s = self.core.next_wakeup_s()
            if wakeup_s is None or wakeup_s > until_s:
                break
            self.now_s = max(self.now_s, wakeup_s)
            self.tell(Tick(), advance_s=0.0)
        else:
            raise AssertionError("the core asks for ticks without end")
        self.now_s = until_s

    # ------------------------------------------------------------- checks

    @invariant()
    def bounds_hold(self) -> None:
        for node_id in self.nodes:
            held = [task for task, holder in self.held.values() if holder == node_id]
            assert sum(isinstance(task, InferenceTask) for task in held) <= MAX_INFLIGHT_INFERENCE
            outstanding = [
                task for task in held if isinstance(task, TrainingTask) and task.task_id not in self.backward_done
            ]
            assert len(outstanding) <= MAX_INFLIGHT_TRAINING

    @invariant()
    def core_and_driver_agree(self) -> None:
        if not hasattr(self, "core"):
            return
        snapshot = self.core.snapshot()
        assert {status.node_id for status in snapshot.nodes} == self.nodes
        assert snapshot.waiting_inference + snapshot.waiting_training == len(self.waiting)
        assert sum(status.inflight_inference + status.inflight_training for status in snapshot.nodes) == len(self.held)
        tasks = self.core._cluster.tasks
        assert set(tasks) == set(self.waiting) | set(self.held)

    @invariant()
    def training_is_not_starved(self) -> None:
        if not hasattr(self, "core"):
            return
        for status in self.core.snapshot().nodes:
            since_s = status.held_back_since_s
            assert since_s is None or self.log[-1][0] <= since_s + MAX_HOLD_BACK_S

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        core = SchedulerCore(self.config)
        for now_s, event, commands in self.log:
            assert core.step(now_s, event) == commands

    # ------------------------------------------------------------- the driver

    def arrive(self, task: Task, twice: bool) -> None:
        self.waiting[task.task_id] = task
        self.tell(TaskArrived(task))
        if twice and (task.task_id in self.waiting or task.task_id in self.held):
            commands = self.tell(TaskArrived(task), advance_s=0.0)
            # `perform` has checked that nothing is assigned twice.
            assert Reject not in {
                type(command) for command in commands if getattr(command, "task_id", "") == task.task_id
            }

    def tell(self, event: Event, *, advance_s: float = STEP_S) -> list[Command]:
        commands = self.core.step(self.now_s, event)
        self.log.append((self.now_s, event, commands))
        self.perform(commands)
        self.now_s += advance_s
        return commands

    def perform(self, commands: Iterable[Command]) -> None:
        for command in commands:
            match command:
                case Assign(task_id, node_id):
                    assert node_id in self.nodes
                    assert task_id not in self.cancelled
                    task = self.waiting[task_id]
                    assert not isinstance(task, TrainingTask) or task.job_id not in self.paused
                    # Exactly one live assignment: it waited until now.
                    self.held[task_id] = (self.waiting.pop(task_id), node_id)
                case Reject(task_id) | Drop(task_id) | TakeBack(task_id):
                    # Exactly one end: it waited until now and is gone.
                    del self.waiting[task_id]
                case CancelOnNode(task_id, node_id):
                    assert self.held[task_id][1] == node_id
                    assert task_id not in self.cancelled
                    self.cancelled.add(task_id)
                case TakeSnapshot(sync_id, node_id):
                    assert node_id in self.nodes
                    self.syncs.append(("snapshot", sync_id, node_id))
                case ApplyWeights(sync_id, node_id, _, sources):
                    assert node_id in self.nodes
                    assert sources
                    assert node_id not in sources
                    self.syncs.append(("apply", sync_id, node_id))


CoreMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)
TestCore = CoreMachine.TestCase
