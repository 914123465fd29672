"""The entrance of the pipeline: what stage 0 runs next, composed in the moment it is taken.

Prefill, decode, training forwards, optimizer steps and weight synchronisations enter here, stamped with the weights
version of stage 0; training backwards come down to it.
"""

from collections.abc import Iterable
from dataclasses import replace

from services.latency import DECODE, OPTIMIZER_STEP, PREFILL, TRAIN_BACKWARD, TRAIN_FORWARD, WEIGHT_SYNC, OpKind
from services.node_agent.core.batching import InferenceBatcher
from services.node_agent.core.node_memory import NodeMemory
from services.node_agent.core.running import Claim, mixed_op, prefill_op
from services.node_agent.core.stage_queue import Flight, Rank, StageQueue, oldest_needed
from services.node_agent.core.training import TrainingQueue
from services.node_agent.core.types import NodeCoreConfig, Op, SyncRequested


class Entrance:
    """Chooses and composes ops for stage 0, from the waiting work of a node."""

    def __init__(
        self,
        config: NodeCoreConfig,
        inference: InferenceBatcher,
        training: TrainingQueue,
        stages: list[StageQueue],
        memory: NodeMemory | None,
    ) -> None:
        self._config = config
        self._drain = config.weight_handling == "drain"
        #: Weight operations that wait, with the time since when.
        self.syncs: list[tuple[SyncRequested, float]] = []
        #: Ops composed for stage 0 that wait for room in its memory, by kind. They are stamped when they start.
        self._held: dict[OpKind, Flight] = {}
        self._next_op_id = 1
        self._join(inference, training, stages, memory)

    def _join(
        self,
        inference: InferenceBatcher,
        training: TrainingQueue,
        stages: list[StageQueue],
        memory: NodeMemory | None,
    ) -> None:
        self._inference, self._training, self._stages = inference, training, stages
        self._memory = memory
        self._has_room = None if memory is None else memory.has_room
        #: Most context and new tokens of one inference op, in whole blocks.
        self._most_tokens = None if memory is None else memory.most_tokens

    def fork(
        self,
        inference: InferenceBatcher,
        training: TrainingQueue,
        stages: list[StageQueue],
        memory: NodeMemory | None,
    ) -> "Entrance":
        """An independent copy, in front of copies of the rest."""
        twin = Entrance.__new__(Entrance)
        twin.__dict__.update(self.__dict__)
        twin.syncs = self.syncs.copy()
        twin._held = {kind: replace(flight) for kind, flight in self._held.items()}
        twin._join(inference, training, stages, memory)
        return twin

    def inherit(self, other: "Entrance") -> None:
        """Go on counting ops where another one ended."""
        self._next_op_id = other._next_op_id

    def new_id(self) -> int:
        """Id of a new op."""
        op_id = self._next_op_id
        self._next_op_id += 1
        return op_id

    def held(self) -> Iterable[Flight]:
        """Ops that wait for room in the memory of stage 0."""
        return self._held.values()

    def withdraw(self, task_id: str) -> None:
        """Drop the forward of this micro-batch if it waits for room."""
        flight = self._held.get(TRAIN_FORWARD)
        if flight is not None and task_id in flight.op.task_ids:
            del self._held[TRAIN_FORWARD]

    def refresh(self, now_s: float) -> None:
        """Work out what training could enter, after anything changed."""
        self._training.refresh(now_s, self._change_waits())

    def _change_waits(self) -> bool:
        """Whether a weight change must wait for micro-batches between forward and backward."""
        return bool(self.syncs) and self.syncs[0][0].changes_weights and (self._drain or self.settles())

    def settles(self) -> bool:
        """Whether a weight change is next that must meet no gradient of older weights."""
        return bool(self.syncs) and self.syncs[0][0].settles

    # ------------------------------------------------------------- choosing

    def enter(self, now_s: float) -> Flight | None:
        """Next op of stage 0: a backward, or an op that enters the pipeline and is composed now."""
        while (best := self._best_entry(now_s)) is not None:
            if isinstance(best, Flight):
                return take(self._stages[0], self._training, best)
            kind = best
            flight = self._held.pop(kind, None)
            if flight is not None:
                flight.op = flight.op._replace(version=self._stages[0].version)
                return flight
            flight = self._compose(now_s, kind)
            if self._memory is not None:
                for task_id in self._inference.running.made_room:
                    self._memory.freed(task_id)
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
        drains = drains or (self.settles() and self._training.owes_steps)
        if self.syncs and not (drains or is_between_parts):
            entries.append((WEIGHT_SYNC, Claim(self.syncs[0][1], now_s, 1.0)))
        prefill = self._inference.prefill_claim(now_s)
        if prefill is not None:
            entries.append((PREFILL, prefill))
        decode = self._inference.running.decode_claim()
        if decode is not None:
            entries.append((DECODE, decode))
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
        return any(flight.op.part and flight.op.kind is TRAIN_FORWARD for flight in self._stages[0].ready)

    # ------------------------------------------------------------- composing

    def _compose(self, now_s: float, kind: OpKind) -> Flight | None:
        """Make the op that enters stage 0, stamped with the version of stage 0; None when no prefill fits."""
        if self._config.max_batch_tokens and (kind is PREFILL or kind is DECODE):
            return self._compose_mixed(now_s, kind)
        if kind is PREFILL:
            return self._compose_prefill(now_s)
        if kind is DECODE:
            return self._compose_decode()
        version = self._stages[0].version
        claim = Claim(now_s, now_s, 1.0)
        if kind is WEIGHT_SYNC:
            sync, _ = self.syncs.pop(0)
            op = Op(
                self.new_id(),
                kind,
                (),
                version,
                subject=sync.sync_id,
                changes_weights=sync.changes_weights,
                oldest_version=self._oldest_version(),
            )
            self.refresh(now_s)
            return Flight(op, claim)
        if kind is OPTIMIZER_STEP:
            group = self._training.take_step()
            op = Op(
                self.new_id(),
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
                self.new_id(),
                kind,
                (microbatch.task_id,),
                version,
                microbatch.batch * microbatch.length,
                subject=microbatch.job_id,
                batch=microbatch.batch,
                group=self._training.group_of(microbatch.task_id),
                parts=microbatch.parts,
            )
        self.refresh(now_s)
        return Flight(op, claim)

    def _compose_prefill(self, now_s: float) -> Flight | None:
        claim = self._inference.prefill_claim(now_s)
        version = self._stages[0].version
        pieces = self._inference.take_prompts(now_s, version, self._most_tokens)
        if claim is None or not pieces:
            return None
        return Flight(prefill_op(self.new_id(), version, pieces), claim)

    def _compose_decode(self) -> Flight | None:
        claim = self._inference.running.decode_claim()
        if claim is None:
            return None
        task_ids, context = self._inference.take_decode(self._most_tokens)
        count = len(task_ids)
        if not count:
            return None
        version = self._stages[0].version
        op = Op(self.new_id(), DECODE, task_ids, version, count, context, batch=count)
        return Flight(op, claim)

    def _compose_mixed(self, now_s: float, kind: OpKind) -> Flight | None:
        """Decoding requests, and pieces of prompts in what is left of the budget. kind: whose turn it is."""
        inference = self._inference
        prefill = inference.prefill_claim(now_s)
        decode = self._compose_decode()
        decoding = decode.op.task_ids if decode else ()
        most_tokens = None if self._most_tokens is None else self._most_tokens - inference.running.held_tokens(decoding)
        version = self._stages[0].version
        budget = self._config.max_batch_tokens - len(decoding)
        pieces = inference.take_pieces(now_s, version, budget, most_tokens) if prefill else []
        if not pieces or prefill is None:
            return decode
        op = mixed_op(self.new_id(), version, pieces, decode.op if decode else None)
        return Flight(op, decode.claim if decode and kind is DECODE else prefill)

    def _oldest_version(self) -> int:
        """Oldest weights that an op on its way will still need when the ones of stage 0 change. With "drain" none: the
        change follows those ops up the pipeline."""
        newest = self._stages[0].version + 1
        return newest if self._drain else oldest_needed(self._stages, newest)


def take(queue: StageQueue, training: TrainingQueue, flight: Flight) -> Flight:
    """Take a ready op out of the queue of a stage, to run it."""
    queue.ready.remove(flight)
    if flight.op.kind is TRAIN_BACKWARD:
        training.backward_starts(flight.op.group, queue.stage)
    elif flight.op.kind is TRAIN_FORWARD:
        training.forward_starts(flight.op.task_ids[0], queue.stage)
    return flight
