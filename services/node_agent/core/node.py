"""The node core: decides which op each pipeline stage of one node runs next.

Pure and deterministic: the same events give the same commands. The node agent drives it with real ops, the simulator
with modelled ones, and the forecast fast-forwards a `fork()` of it, so what is predicted and simulated is what runs.

Prefill, decode, training forwards, optimizer steps and weight synchronisations enter at stage 0 and travel up; a
micro-batch's backward starts on the last stage when its forward left it and travels down.
"""

from dataclasses import replace
from functools import partial
from itertools import chain

from services.latency import MOVES, OpKind
from services.node_agent.core.batching import InferenceBatcher
from services.node_agent.core.node_memory import NodeMemory, stages_until_use
from services.node_agent.core.running import Claim, mixed_op, prefill_op
from services.node_agent.core.stage_queue import Flight, Rank, StageQueue, oldest_needed
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
    QueueOrder,
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
        self._drain = config.weight_handling == "drain"
        self._top = config.num_stages - 1
        memory = config.memory
        self._memory = None if memory is None else NodeMemory(memory, config.num_stages, config.kv_block_tokens)
        self._has_room = None if self._memory is None else self._memory.has_room
        #: Most context and new tokens of one inference op, in whole blocks.
        self._most_tokens = None if self._memory is None else self._memory.most_tokens
        #: Ops composed for stage 0 that wait for room in its memory, by kind. They are stamped when they start.
        self._held: dict[OpKind, Flight] = {}
        self._inference = InferenceBatcher(config)
        self._training = TrainingQueue(config)
        self._stages = [StageQueue(config, stage) for stage in range(config.num_stages)]
        #: With the time since when they wait.
        self._syncs: list[tuple[SyncRequested, float]] = []
        self._next_op_id = 1
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
            self._syncs.append((event, now_s))
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
        return NodeSnapshot(
            waiting_requests=self._inference.num_waiting,
            running_requests=self._inference.num_running,
            waiting_microbatches=self._training.num_waiting,
            inflight_microbatches=self._training.num_inflight,
            accumulated_microbatches=self._training.num_accumulated,
            pending_syncs=len(self._syncs),
            kv_used_tokens=self._inference.kv.used_tokens,
            kv_capacity_tokens=self._inference.kv.capacity_tokens,
            kv_kept_tokens=self._inference.prefixes.used_tokens,
            preemptions=self._inference.preemptions,
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
        twin._memory = None if self._memory is None else self._memory.fork()
        twin._has_room = None if twin._memory is None else twin._memory.has_room
        twin._held = {kind: replace(flight) for kind, flight in self._held.items()}
        twin._syncs = self._syncs.copy()
        return twin

    def with_queue_order(self, order: QueueOrder) -> "NodeCore":
        """An idle core that goes on from this one's weights version with another queue order.

        Raises ValueError when there is work: its place in the queues depends on the order.
        """
        if self.tasks() or self._syncs or any(queue.running or queue.ready for queue in self._stages):
            raise ValueError("the queue order can only change while the node is idle")
        other = NodeCore(replace(self.config, queue_order=order))
        other._next_op_id = self._next_op_id
        other._inference.inherit(self._inference)
        for queue, mine in zip(other._stages, self._stages, strict=True):
            queue.version = mine.version
        return other

    def restore(self, now_s: float, version: int, decoding: list[tuple[InferenceRequest, int]]) -> None:
        """Give a new core the weights version of a node and its requests past their prefill, with their tokens so far;
        what else the node has then arrives."""
        for queue in self._stages:
            queue.version = version
        for request, generated_tokens in decoding:
            self._inference.resume(now_s, request, generated_tokens)

    # ------------------------------------------------------------- events

    def _cancel(self, task_id: str) -> list[Command]:
        if self._inference.holds(task_id):
            return self._inference.cancel(task_id)
        is_running = any(queue.is_running(task_id) for queue in self._stages)
        held = self._held.get(OpKind.TRAIN_FORWARD)
        if held is not None and task_id in held.op.task_ids:
            del self._held[OpKind.TRAIN_FORWARD]
        for queue in self._stages:
            queue.withdraw(task_id)
        return self._training.cancel(task_id, is_running)

    def _op_done(self, now_s: float, event: OpDone) -> list[Command]:
        if not 0 <= event.stage <= self._top:
            raise ValueError(f"op {event.op_id} ended on stage {event.stage} of {self.config.num_stages}")
        flight = self._stages[event.stage].end(event.op_id, now_s)
        kind = flight.op.kind
        if kind is OpKind.PREFILL or kind is OpKind.DECODE:
            if event.failed:
                return self._inference.fail(flight.op)
            if event.stage == self._top:
                return self._inference.complete(now_s, flight.op, event.stopped)
        elif kind is OpKind.TRAIN_FORWARD or kind is OpKind.TRAIN_BACKWARD:
            return self._training_op_done(now_s, event, flight)
        elif kind is OpKind.OPTIMIZER_STEP:
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
        is_backward = flight.op.kind is OpKind.TRAIN_BACKWARD
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
            backward = op._replace(op_id=self._new_id(), kind=OpKind.TRAIN_BACKWARD)
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
        """Tasks that left hold nothing any more."""
        if self._memory is not None:
            for command in commands:
                if isinstance(command, FreeKv | TaskDone):
                    self._memory.ended(command.task_id)

    def _start(self, now_s: float, queue: StageQueue, flight: Flight, memory: NodeMemory) -> list[Command]:
        """Run an op on its idle stage, or first what makes room for it, or end its tasks because there is none."""
        stage = queue.stage
        detail = memory.failure(stage, flight.op)
        if detail:
            # On stage 0 only: what fits there fits above, where no more is held.
            commands = self._fail(flight, detail)
            self._release(commands)
            self._training.refresh(now_s, self._change_waits())
            return commands
        move = memory.next_move(stage, flight.op, partial(stages_until_use, self._stages, stage))
        if move is None:
            memory.starts(now_s, stage, flight)
        else:
            queue.preparing = flight
            op = Op(self._new_id(), move.kind, move.task_ids, queue.version, num_bytes=move.num_bytes)
            flight = Flight(op, flight.claim)
        queue.start(flight)
        return [RunOp(stage, flight.op)]

    def _fail_prepared(self, stage: int) -> list[Command]:
        """The data of the op about to run could not be moved."""
        queue = self._stages[stage]
        flight, queue.preparing = queue.preparing, None
        return [] if flight is None else self._fail(flight, "")

    def _fail(self, flight: Flight, detail: str) -> list[Command]:
        """End the tasks of an op that cannot run."""
        op = flight.op
        if op.kind is OpKind.TRAIN_FORWARD or op.kind is OpKind.TRAIN_BACKWARD:
            commands = self._training.drop(op.task_ids[0], failed=True)
        else:
            commands = self._inference.fail(op)
        return [replace(c, detail=detail) if isinstance(c, TaskDone) and c.reason == "error" else c for c in commands]

    # ------------------------------------------------------------- choosing

    def _start_ops(self, now_s: float, commands: list[Command]) -> None:
        """Give every idle stage its next op."""
        if self._settles():
            self._training.close()
        self._training.refresh(now_s, self._change_waits())
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
            waiting = chain(self._held.values(), *(queue.ready for queue in self._stages))
            self._room_due_s = self._memory.next_due_s(now_s, waiting)

    def _next(self, now_s: float, queue: StageQueue) -> Flight | None:
        if queue.preparing is not None:
            flight, queue.preparing = queue.preparing, None
            return flight
        return self._enter(now_s) if queue.stage == 0 else self._resume(now_s, queue)

    def _change_waits(self) -> bool:
        """Whether a weight change must wait for micro-batches between forward and backward."""
        return bool(self._syncs) and self._syncs[0][0].changes_weights and (self._drain or self._settles())

    def _settles(self) -> bool:
        """Whether a weight change is next that must meet no gradient of older weights."""
        return bool(self._syncs) and self._syncs[0][0].settles

    def _resume(self, now_s: float, queue: StageQueue) -> Flight | None:
        """Next op of an upper stage."""
        best = queue.best(now_s, self._training.may_run, self._has_room)
        return None if best is None else self._take(queue, best[1])

    def _take(self, queue: StageQueue, flight: Flight) -> Flight:
        """Take a ready op out of the queue, to run it."""
        queue.ready.remove(flight)
        if flight.op.kind is OpKind.TRAIN_BACKWARD:
            self._training.backward_starts(flight.op.group, queue.stage)
        elif flight.op.kind is OpKind.TRAIN_FORWARD:
            self._training.forward_starts(flight.op.task_ids[0], queue.stage)
        return flight

    def _enter(self, now_s: float) -> Flight | None:
        """Next op of stage 0: a backward, or an op that enters the pipeline and is composed now."""
        while (best := self._best_entry(now_s)) is not None:
            if isinstance(best, Flight):
                return self._take(self._stages[0], best)
            kind = best
            flight = self._held.pop(kind, None)
            if flight is not None:
                flight.op = flight.op._replace(version=self._stages[0].version)
                return flight
            flight = self._compose(now_s, kind)
            if flight is None:
                continue
            if self._has_room is None or self._has_room(now_s, 0, flight):
                return flight
            self._held[kind] = flight
        return None

    def _best_entry(self, now_s: float) -> Flight | OpKind | None:
        """The ready op that stage 0 should run now, or the kind of the one to compose."""
        queue = self._stages[0]
        best: tuple[Rank, Flight | OpKind] | None = queue.best(now_s, self._training.may_run, self._has_room)
        for kind, claim in self._entries(now_s):
            rank = queue.rank(kind, claim, now_s)
            if best is None or rank < best[0]:
                best = (rank, kind)
        return None if best is None else best[1]

    def _entries(self, now_s: float) -> list[tuple[OpKind, Claim]]:
        """Ops that could enter the pipeline now."""
        entries: list[tuple[OpKind, Claim]] = []
        is_between_parts = self._drain and self._is_between_parts()
        drains = self._training.num_inflight and self._change_waits()
        drains = drains or (self._settles() and self._training.owes_steps)
        if self._syncs and not (drains or is_between_parts):
            entries.append((OpKind.WEIGHT_SYNC, Claim(self._syncs[0][1], now_s, 1.0)))
        prefill = self._inference.prefill_claim(now_s)
        if prefill is not None:
            entries.append((OpKind.PREFILL, prefill))
        decode = self._inference.decode_claim()
        if decode is not None:
            entries.append((OpKind.DECODE, decode))
        if self._training.entry is not None and not is_between_parts:
            kind, ready_s = self._training.entry
            entries.append((kind, Claim(ready_s, ready_s, 1.0)))
        return self._with_held(now_s, entries) if self._held else entries

    def _with_held(self, now_s: float, entries: list[tuple[OpKind, Claim]]) -> list[tuple[OpKind, Claim]]:
        """No more ops of a kind while one of it waits for room; that one may enter when it has it."""
        entries = [entry for entry in entries if entry[0] not in self._held]
        for kind, flight in self._held.items():
            if self._has_room is None or self._has_room(now_s, 0, flight):
                entries.append((kind, flight.claim))
        return entries

    def _is_between_parts(self) -> bool:
        """Whether a training forward that is cut into pieces waits on stage 0 for its next one: all of them run at one
        version, so with "drain" no weight change may enter in between. (On later stages it queues up behind it.)"""
        return any(flight.op.part and flight.op.kind is OpKind.TRAIN_FORWARD for flight in self._stages[0].ready)

    # ------------------------------------------------------------- composing

    def _compose(self, now_s: float, kind: OpKind) -> Flight | None:
        """Make the op that enters stage 0, stamped with the version of stage 0; None when no prefill fits."""
        if self.config.max_batch_tokens and (kind is OpKind.PREFILL or kind is OpKind.DECODE):
            return self._compose_mixed(now_s, kind)
        if kind is OpKind.PREFILL:
            return self._compose_prefill(now_s)
        if kind is OpKind.DECODE:
            return self._compose_decode()
        version = self._stages[0].version
        claim = Claim(now_s, now_s, 1.0)
        if kind is OpKind.WEIGHT_SYNC:
            sync, _ = self._syncs.pop(0)
            op = Op(
                self._new_id(),
                kind,
                (),
                version,
                subject=sync.sync_id,
                changes_weights=sync.changes_weights,
                oldest_version=self._oldest_version(),
            )
            self._training.refresh(now_s, self._change_waits())
            return Flight(op, claim)
        if kind is OpKind.OPTIMIZER_STEP:
            group = self._training.take_step()
            op = Op(
                self._new_id(),
                kind,
                tuple(group.accumulated),
                version,
                subject=group.job_id,
                changes_weights=True,
                oldest_version=self._oldest_version(),
                group=group.group_id,
            )
        else:
            microbatch = self._training.take_forward()
            op = Op(
                self._new_id(),
                kind,
                (microbatch.task_id,),
                version,
                microbatch.batch * microbatch.length,
                subject=microbatch.job_id,
                batch=microbatch.batch,
                group=self._training.group_of(microbatch.task_id),
                parts=microbatch.parts,
            )
        self._training.refresh(now_s, self._change_waits())
        return Flight(op, claim)

    def _compose_prefill(self, now_s: float) -> Flight | None:
        claim = self._inference.prefill_claim(now_s)
        version = self._stages[0].version
        pieces = self._inference.take_prompts(now_s, version, self._most_tokens)
        if claim is None or not pieces:
            return None
        return Flight(prefill_op(self._new_id(), version, pieces), claim)

    def _compose_decode(self) -> Flight | None:
        claim = self._inference.decode_claim()
        if claim is None:
            return None
        task_ids, context = self._inference.take_decode(self._most_tokens)
        count = len(task_ids)
        if not count:
            return None
        version = self._stages[0].version
        op = Op(self._new_id(), OpKind.DECODE, task_ids, version, count, context, batch=count)
        return Flight(op, claim)

    def _compose_mixed(self, now_s: float, kind: OpKind) -> Flight | None:
        """Decoding requests, and pieces of prompts in what is left of the budget. kind: whose turn it is."""
        inference = self._inference
        prefill = inference.prefill_claim(now_s)
        decode = self._compose_decode()
        decoding = decode.op.task_ids if decode else ()
        most_tokens = None if self._most_tokens is None else self._most_tokens - inference.held_tokens(decoding)
        version = self._stages[0].version
        budget = self.config.max_batch_tokens - len(decoding)
        pieces = inference.take_pieces(now_s, version, budget, most_tokens) if prefill else []
        if not pieces or prefill is None:
            return decode
        op = mixed_op(self._new_id(), version, pieces, decode.op if decode else None)
        return Flight(op, decode.claim if decode and kind is OpKind.DECODE else prefill)

    def _oldest_version(self) -> int:
        """Oldest weights that an op on its way will still need when the ones of stage 0 change. With "drain" none: the
        change follows those ops up the pipeline."""
        newest = self._stages[0].version + 1
        return newest if self._drain else oldest_needed(self._stages, newest)

    def _new_id(self) -> int:
        op_id = self._next_op_id
        self._next_op_id += 1
        return op_id
