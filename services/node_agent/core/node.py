"""The node core: decides which op each pipeline stage of one node runs next.

Pure and deterministic: the same events give the same commands. The node agent drives it with real ops, the simulator
with modelled ones, and the forecast fast-forwards a `fork()` of it, so what is predicted and simulated is what runs.

Prefill, decode, training forwards, optimizer steps and weight synchronisations enter at stage 0 and travel up; a
micro-batch's backward starts on the last stage when its forward left it and travels down.
"""

from dataclasses import replace
from functools import partial
from itertools import chain

from services.latency import DECODE, MOVES, OPTIMIZER_STEP, PREFILL, TRAIN_BACKWARD, TRAIN_FORWARD
from services.node_agent.core.batching import InferenceBatcher
from services.node_agent.core.entrance import Entrance, take
from services.node_agent.core.node_memory import NodeMemory, stages_until_use
from services.node_agent.core.stage_queue import Flight, StageQueue
from services.node_agent.core.training import TrainingQueue
from services.node_agent.core.types import (
    Cancelled,
    Command,
    Event,
    FreeKv,
    InferenceRequest,
    MicrobatchArrived,
    NodeCoreConfig,
    NodeSnapshot,
    Op,
    OpDone,
    RequestArrived,
    RunOp,
    SyncRequested,
    TaskDone,
    Tick,
    TrainingMicrobatch,
)


class NodeCore:
    """State of one node. Its size is bounded by the live tasks."""

    def __init__(self, config: NodeCoreConfig) -> None:
        self.config = config
        self._top = config.num_stages - 1
        self._inference = InferenceBatcher(config)
        self._memory: NodeMemory | None = None
        if config.memory is not None:
            running = self._inference.running
            self._memory = NodeMemory(config.memory, running, config.num_stages, config.kv_block_tokens)
        self._has_room = None if self._memory is None else self._memory.has_room
        self._training = TrainingQueue(config)
        self._stages = [StageQueue(config, stage) for stage in range(config.num_stages)]
        self._entrance = Entrance(config, self._inference, self._training, self._stages, self._memory)
        self._room_due_s: float | None = None

    # ------------------------------------------------------------- interface

    def step(self, now_s: float, event: Event) -> list[Command]:
        """Take one event and return what to do, in order.

        `now_s` must not go back. Raises ValueError when an OpDone names an op its stage does not run; nothing has
        changed then. Arrivals of live tasks and cancellations of unknown ones are ignored: delivery is at least once.
        """
        commands: list[Command]
        if isinstance(event, OpDone):
            commands = self._op_done(now_s, event)
        elif isinstance(event, RequestArrived):
            commands = self._refused(event.request) or self._inference.add(now_s, event.request)
        elif isinstance(event, MicrobatchArrived):
            commands = self._refused(event.microbatch)
            if not commands:
                self._training.add(now_s, event.microbatch)
        elif isinstance(event, Cancelled):
            commands = self._cancel(event.task_id)
        elif isinstance(event, SyncRequested):
            commands = []
            self._entrance.syncs.append((event, now_s))
        elif isinstance(event, Tick):
            commands = []
        else:
            raise TypeError(f"unknown event {event!r}")
        self._release(commands)
        self._start_ops(now_s, commands)
        return commands

    @property
    def next_wakeup_s(self) -> float | None:
        """When a Tick is due if no event comes before; None: no need."""
        wakeup_s = self._training.wakeup_s
        if self._memory is None or self._room_due_s is None:
            return wakeup_s
        return self._room_due_s if wakeup_s is None else min(wakeup_s, self._room_due_s)

    def tasks(self) -> tuple[str, ...]:
        """Ids of every live task: inference, then training."""
        return self._inference.task_ids() + self._training.task_ids()

    def snapshot(self) -> NodeSnapshot:
        """Counts for heartbeats."""
        running = self._inference.running
        return NodeSnapshot(
            waiting_requests=self._inference.num_waiting,
            running_requests=len(running),
            waiting_microbatches=self._training.num_waiting,
            inflight_microbatches=self._training.num_inflight,
            accumulated_microbatches=self._training.num_accumulated,
            pending_syncs=len(self._entrance.syncs),
            kv_used_tokens=running.kv.used_tokens,
            kv_capacity_tokens=running.kv.capacity_tokens,
            kv_kept_tokens=running.prefixes.used_tokens,
            preemptions=running.preemptions,
            versions=tuple(queue.version for queue in self._stages),
            queue_lengths=tuple(len(queue.ready) for queue in self._stages),
            running_ops=tuple(None if queue.running is None else queue.running.op for queue in self._stages),
            memory=None if self._memory is None else self._memory.snapshot(),
        )

    def fork(self) -> "NodeCore":
        """An independent copy, for forecasts; cost is O(live tasks)."""
        twin = NodeCore.__new__(NodeCore)
        twin.__dict__.update(self.__dict__)
        twin._inference = self._inference.fork()
        twin._training = self._training.fork()
        twin._stages = [queue.fork() for queue in self._stages]
        twin._memory = None if self._memory is None else self._memory.fork(twin._inference.running)
        twin._has_room = None if twin._memory is None else twin._memory.has_room
        twin._entrance = self._entrance.fork(twin._inference, twin._training, twin._stages, twin._memory)
        return twin

    def with_order(self, config: NodeCoreConfig) -> "NodeCore":
        """An idle core that goes on from this one's weights version with another order of its queues (`ordered`).

        Raises ValueError when there is work: its place in the queues depends on the order.
        """
        if self.tasks() or self._entrance.syncs or any(queue.running or queue.ready for queue in self._stages):
            raise ValueError("the queue order can only change while the node is idle")
        other = NodeCore(config)
        other._entrance.inherit(self._entrance)
        other._inference.inherit(self._inference)
        if other._memory is not None and self._memory is not None:
            other._memory.inherit(self._memory)
        for queue, mine in zip(other._stages, self._stages, strict=True):
            queue.version = mine.version
        return other

    def restore(self, now_s: float, version: int, decoding: list[tuple[InferenceRequest, int]]) -> None:
        """Give a new core the weights version of a node and its requests past their prefill, with their tokens so far;
        what else the node has then arrives."""
        for queue in self._stages:
            queue.version = version
        for request, generated_tokens in decoding:
            self._inference.running.resume(now_s, request, generated_tokens)

    # ------------------------------------------------------------- events

    def _cancel(self, task_id: str) -> list[Command]:
        if self._inference.holds(task_id):
            return self._inference.cancel(task_id)
        is_running = any(queue.is_running(task_id) for queue in self._stages)
        self._entrance.withdraw(task_id)
        for queue in self._stages:
            queue.withdraw(task_id)
        return self._training.cancel(task_id, is_running)

    def _op_done(self, now_s: float, event: OpDone) -> list[Command]:
        if not 0 <= event.stage <= self._top:
            raise ValueError(f"op {event.op_id} ended on stage {event.stage} of {self.config.num_stages}")
        flight = self._stages[event.stage].end(event.op_id, now_s)
        kind = flight.op.kind
        if kind is PREFILL or kind is DECODE:
            if event.failed:
                return self._inference.fail(flight.op)
            if event.stage == self._top:
                return self._inference.complete(now_s, flight.op, event.stopped)
        elif kind is TRAIN_FORWARD or kind is TRAIN_BACKWARD:
            return self._training_op_done(now_s, event, flight)
        elif kind is OPTIMIZER_STEP:
            self._travel_up(now_s, event.stage, flight)
            return self._training.step_ran(flight.op.group, event.failed)
        elif kind in MOVES:
            return self._fail_prepared(event.stage) if event.failed else []
        elif event.failed and not flight.op.changes_weights:
            return []
        self._travel_up(now_s, event.stage, flight)
        return []

    def _training_op_done(self, now_s: float, event: OpDone, flight: Flight) -> list[Command]:
        task_id = flight.op.task_ids[0]
        is_backward = flight.op.kind is TRAIN_BACKWARD
        if is_backward:
            self._training.backward_ran(task_id)
        ends_training = is_backward and event.stage == 0
        if event.failed or (self._training.is_cancelled(task_id) and not ends_training):
            return self._training.drop(task_id, failed=event.failed)
        if self._next_part(now_s, event.stage, flight):
            return []
        if is_backward:
            self._training.backward_left(task_id, event.stage)
            if self._memory is not None:
                self._memory.backward_left(task_id, event.stage)
        if ends_training:
            was_cancelled = self._training.is_cancelled(task_id)
            self._training.backward_done(task_id)
            return self._training.cancel(task_id, is_running=False) if was_cancelled else []
        if is_backward:
            self._stages[event.stage - 1].push(flight, now_s)
        elif event.stage < self._top:
            self._travel_up(now_s, event.stage, flight)
        else:
            op = flight.op
            self._training.turned(task_id)
            backward = op._replace(op_id=self._entrance.new_id(), kind=TRAIN_BACKWARD)
            self._stages[event.stage].push(Flight(backward, flight.claim), now_s)
        return []

    def _next_part(self, now_s: float, stage: int, flight: Flight) -> bool:
        """Queue the next piece of a cut op on the same stage; False when this was the last. Either way `flight` has
        what comes next: after the last piece the op is whole again for the next stage."""
        op = flight.op
        if op.parts == 1:
            return False
        is_last = op.part + 1 == op.parts
        flight.op = op._replace(part=0 if is_last else op.part + 1)
        if not is_last:
            self._stages[stage].push(flight, now_s)
        return not is_last

    def _travel_up(self, now_s: float, stage: int, flight: Flight) -> None:
        if stage < self._top:
            self._stages[stage + 1].push(flight, now_s)

    # ------------------------------------------------------------- memory

    def _refused(self, task: InferenceRequest | TrainingMicrobatch) -> list[Command]:
        """The end of a task that arrives and can never fit the memory of a stage."""
        if self._memory is None or self._inference.holds(task.task_id) or self._training.holds(task.task_id):
            return []
        detail = self._memory.arrived(task)
        return [TaskDone(task.task_id, "error", detail)] if detail else []

    def _release(self, commands: list[Command]) -> None:
        """What is freed is held no more."""
        if self._memory is not None:
            for command in commands:
                if isinstance(command, FreeKv):
                    self._memory.freed(command.task_id)

    def _start(self, now_s: float, queue: StageQueue, flight: Flight, memory: NodeMemory) -> list[Command]:
        """Run an op on its idle stage, or first what makes room for it, or end its tasks because there is none."""
        stage = queue.stage
        commands = self._make_way(stage, flight.op, memory)
        detail = memory.failure(stage, flight.op)
        if detail:
            # On stage 0 only: what fits there fits above, where no more is held.
            failed = self._fail(flight, detail)
            self._release(failed)
            self._entrance.refresh(now_s)
            return commands + failed
        move = memory.next_move(stage, flight.op, partial(stages_until_use, self._stages, stage))
        if move is None:
            memory.starts(now_s, stage, flight)
        else:
            queue.preparing = flight
            op = Op(self._entrance.new_id(), move.kind, move.task_ids, queue.version, num_bytes=move.num_bytes)
            flight = Flight(op, flight.claim)
        queue.start(flight)
        return [*commands, RunOp(stage, flight.op)]

    def _make_way(self, stage: int, op: Op, memory: NodeMemory) -> list[Command]:
        """Drop the kept KV caches that an op about to run needs the memory of."""
        dropped = memory.in_the_way(stage, op)
        if dropped:
            self._inference.running.prefixes.drop(dropped)
        commands: list[Command] = [FreeKv(task_id) for task_id in dropped]
        self._release(commands)
        return commands

    def _fail_prepared(self, stage: int) -> list[Command]:
        """The data of the op about to run could not be moved."""
        queue = self._stages[stage]
        flight, queue.preparing = queue.preparing, None
        return [] if flight is None else self._fail(flight, "")

    def _fail(self, flight: Flight, detail: str) -> list[Command]:
        """End the tasks of an op that cannot run."""
        op = flight.op
        if op.kind is TRAIN_FORWARD or op.kind is TRAIN_BACKWARD:
            commands = self._training.drop(op.task_ids[0], failed=True)
        else:
            commands = self._inference.fail(op)
        return [replace(c, detail=detail) if isinstance(c, TaskDone) and c.reason == "error" else c for c in commands]

    # ------------------------------------------------------------- choosing

    def _start_ops(self, now_s: float, commands: list[Command]) -> None:
        """Give every idle stage its next op."""
        if self._entrance.settles():
            self._training.close()
        self._entrance.refresh(now_s)
        for queue in self._stages:
            while queue.running is None and (flight := self._next(now_s, queue)) is not None:
                commands += self._inference.take_freed()
                if self._memory is None:
                    queue.start(flight)
                    commands.append(RunOp(queue.stage, flight.op))
                else:
                    commands += self._start(now_s, queue, flight, self._memory)
        commands += self._inference.take_freed()
        if self._memory is not None:
            waiting = chain(self._entrance.held(), *(queue.ready for queue in self._stages))
            self._room_due_s = self._memory.next_due_s(now_s, waiting)

    def _next(self, now_s: float, queue: StageQueue) -> Flight | None:
        if queue.preparing is not None:
            flight, queue.preparing = queue.preparing, None
            return flight
        return self._entrance.enter(now_s) if queue.stage == 0 else self._resume(now_s, queue)

    def _resume(self, now_s: float, queue: StageQueue) -> Flight | None:
        """Next op of an upper stage."""
        best = queue.best(now_s, self._training.may_run, self._has_room)
        return None if best is None else take(queue, self._training, best[1])
