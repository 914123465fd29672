"""One stage of the pipeline: what is ready on it, what runs, and which op it takes next.

Version rule (LeMix design, "one iteration, one version"): a forward-type op runs on every stage with exactly the
weights it was stamped with. With "drain" an op that changes the weights to v + 1 runs after every op stamped v has left
the stage; ops reach a stage in the order of their versions, so looking at the stage's own queue is enough. With "stash"
it need not wait: the stage keeps the older weights for ops stamped with them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from services.latency import DECODE, OPTIMIZER_STEP, PREFILL, TRAIN_BACKWARD, TRAIN_FORWARD, WEIGHT_SYNC, OpKind
from services.node_agent.core.running import Claim
from services.node_agent.core.types import ONE_F_ONE_B, NodeCoreConfig, Op, QueueOrder

#: Smaller goes first.
Rank = tuple[float, float, float]

_INFERENCE = frozenset((PREFILL, DECODE))
_MICROBATCH = frozenset((TRAIN_FORWARD, TRAIN_BACKWARD))
#: A step ends tasks and frees a gradient buffer; backwards free activations and end what was begun.
_TRAINING_ORDER = {OPTIMIZER_STEP: 0, TRAIN_BACKWARD: 1, TRAIN_FORWARD: 2}
#: 1f1b, after a backward.
_FORWARD_NEXT = 0.5
_SYNC_CLASS, _TRAINING_TURN_CLASS, _INFERENCE_CLASS, _TRAINING_CLASS = 0, 1, 2, 3


@dataclass(slots=True, eq=False)
class Flight:
    """An op on its way. `claim.ready_s` is renewed at every stage.

    blocked_s: since when it has had no room in the memory of its stage.
    """

    op: Op
    claim: Claim
    blocked_s: float | None = None


class StageQueue:
    """Ready ops, running op and weights version of one stage."""

    __slots__ = (
        "_alternates",
        "_fifo",
        "_keeps_older",
        "_max_training_wait_s",
        "forward_next",
        "preparing",
        "ready",
        "running",
        "stage",
        "training_turn_s",
        "version",
    )

    def __init__(self, config: NodeCoreConfig, stage: int) -> None:
        self._fifo = config.queue_order is QueueOrder.FIFO
        self._keeps_older = config.weight_handling == "stash"
        self._alternates = config.training_schedule == ONE_F_ONE_B
        self._max_training_wait_s = config.max_training_wait_s
        self.stage = stage
        self.version = 0
        self.running: Flight | None = None
        #: In the order in which they became ready.
        self.ready: list[Flight] = []
        #: The op that runs as soon as its data is here and there is room for it.
        self.preparing: Flight | None = None
        #: When a training op last ended here.
        self.training_turn_s = float("-inf")
        #: 1f1b: the last micro-batch's op here was a backward.
        self.forward_next = False

    def push(self, flight: Flight, now_s: float) -> None:
        """An op became ready here."""
        claim = flight.claim
        flight.claim = Claim(now_s, claim.origin_s, claim.allowance_s)
        flight.blocked_s = None
        self.ready.append(flight)

    def rank(self, kind: OpKind, claim: Claim, now_s: float) -> Rank:
        """Place of an op in the stage's order.

        fifo: by ready time. inference_first: weight synchronisations (short, and peers wait) and steps that come up
        (what entered after them waits); training when its turn is due; inference by urgency, the share of its allowance
        used up, so that a prefill waiting for its first-token deadline and a decode waiting for its next-token deadline
        compare; training. Training is due when an op of it is ready and none has run here for `max_training_wait_s`.
        """
        if self._fifo:
            return (claim.ready_s, 0.0, 0.0)
        if kind in _INFERENCE:
            return (_INFERENCE_CLASS, (claim.origin_s - now_s) / claim.allowance_s, claim.ready_s)
        if kind is WEIGHT_SYNC or (kind is OPTIMIZER_STEP and self.stage):
            return (_SYNC_CLASS, claim.ready_s, 0.0)
        waited_s = now_s - max(claim.ready_s, self.training_turn_s)
        is_due = waited_s >= self._max_training_wait_s
        order: float = _TRAINING_ORDER[kind]
        if self.forward_next and kind is TRAIN_FORWARD:
            order = _FORWARD_NEXT
        return (_TRAINING_TURN_CLASS if is_due else _TRAINING_CLASS, order, claim.ready_s)

    def best(
        self, now_s: float, may_train: Callable[[Op, int], bool], has_room: Callable[[float, int, Flight], bool] | None
    ) -> tuple[Rank, Flight] | None:
        """The ready op to run next and its rank; None when none may run.

        may_train: asked for micro-batches, has_room for whatever else would let an op run.
        """
        if not self.ready:
            return None
        stamped_here = not self._keeps_older and self._stamped_here()
        chosen: tuple[Rank, Flight] | None = None
        outranked: list[OpKind] = []
        for flight in self.ready:
            op = flight.op
            kind = op.kind
            if kind in outranked:
                continue
            if kind in _MICROBATCH and not may_train(op, self.stage):
                continue
            if kind is TRAIN_BACKWARD:
                pass
            elif op.changes_weights:
                if op.version != self.version or stamped_here:
                    continue
            elif op.version > self.version or (op.version < self.version and not self._keeps_older):
                continue
            if has_room is not None and not has_room(now_s, self.stage, flight):
                continue
            rank = self.rank(kind, flight.claim, now_s)
            if chosen is None or rank < chosen[0]:
                chosen = (rank, flight)
            if has_room is None and kind not in _INFERENCE:
                # Its rank depends on the ready time alone. (has_room is to hear of every op that waits.)
                outranked.append(kind)
        return chosen

    def _stamped_here(self) -> bool:
        """Whether an op that must run before the version rises is ready."""
        for flight in self.ready:
            op = flight.op
            if op.version == self.version and op.kind is not TRAIN_BACKWARD and not op.changes_weights:
                return True
        return False

    def start(self, flight: Flight) -> None:
        """Run a ready op, or one that enters the pipeline here; raises ValueError when the stage is busy."""
        if self.running is not None:
            raise ValueError(f"stage {self.stage} is busy with op {self.running.op.op_id}")
        self.running = flight

    def end(self, op_id: int, now_s: float) -> Flight:
        """The running op ended; raises ValueError when it is another one."""
        flight = self.running
        if flight is None or flight.op.op_id != op_id:
            running = "nothing" if flight is None else f"op {flight.op.op_id}"
            raise ValueError(f"op {op_id} ended on stage {self.stage}, which runs {running}")
        self.running = None
        if flight.op.changes_weights:
            self.version += 1
        if flight.op.kind in _TRAINING_ORDER:
            self.training_turn_s = now_s
            self.forward_next = self._alternates and flight.op.kind is TRAIN_BACKWARD
        return flight

    def withdraw(self, task_id: str) -> None:
        """Take a micro-batch's ready forward or backward out of the queue; its step runs for others too, and stays."""
        self.ready = [f for f in self.ready if f.op.kind not in _MICROBATCH or task_id not in f.op.task_ids]

    def is_running(self, task_id: str) -> bool:
        """Whether the running op, or the one about to run, contains this task."""
        return any(task_id in flight.op.task_ids for flight in self._chosen())

    def flights(self) -> Iterator[Flight]:
        """Every op here that goes through the pipeline: running, about to run, ready."""
        yield from self._chosen()
        yield from self.ready

    def _chosen(self) -> Iterator[Flight]:
        if self.preparing is not None:
            # What runs now moves data, which belongs to whom it belongs.
            yield self.preparing
        elif self.running is not None:
            yield self.running

    def fork(self) -> "StageQueue":
        """An independent copy."""
        twin = StageQueue.__new__(StageQueue)
        twin._fifo = self._fifo
        twin._keeps_older = self._keeps_older
        twin._alternates = self._alternates
        twin._max_training_wait_s = self._max_training_wait_s
        twin.stage = self.stage
        twin.version = self.version
        twin.running = None if self.running is None else replace(self.running)
        twin.preparing = None if self.preparing is None else replace(self.preparing)
        twin.ready = [replace(flight) for flight in self.ready]
        twin.forward_next = self.forward_next
        twin.training_turn_s = self.training_turn_s
        return twin


def oldest_needed(queues: Iterable[StageQueue], newest: int) -> int:
    """Oldest weights that ops on their way are stamped with, `newest` if there is none."""
    ops = (flight.op for queue in queues for flight in queue.flights())
    kept = (op.version for op in ops if op.kind is not TRAIN_BACKWARD and not op.changes_weights)
    return min(kept, default=newest)
