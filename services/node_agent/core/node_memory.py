"""Wait or offload (paper Algorithm 2): whether an op fits the memory of its stage, and what makes room for it.

Each stage has an account of the KV caches and saved activations on it, in bytes. An op that does not fit waits until
something was freed, at most `max_wait_s` (`max_forward_wait_s`); then the data of other tasks that is needed last goes
to host memory. What an op needs and is in host memory comes back before it. No op that can ever run is larger than the
budget, so in the end each has its way.

KV caches kept for sessions are on the account until they are freed, and the first that go: nothing waits, and nothing
else moves, while there are any.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from services.latency import OpKind
from services.node_agent.core.memory import whole_blocks
from services.node_agent.core.running_requests import RunningRequests
from services.node_agent.core.stage_account import StageAccount
from services.node_agent.core.stage_queue import Flight, StageQueue
from services.node_agent.core.types import InferenceRequest, MemoryConfig, MemoryCounters, Op, TrainingMicrobatch


class Move(NamedTuple):
    """Data that goes to host memory (OFFLOAD) or comes back (RELOAD)."""

    kind: OpKind
    task_ids: tuple[str, ...]
    num_bytes: int


class NodeMemory:
    """The stages of one node."""

    def __init__(
        self, config: MemoryConfig, running: RunningRequests, num_stages: int, kv_block_tokens: int = 1
    ) -> None:
        self.config = config
        self._running = running
        self._kv_block_tokens = kv_block_tokens
        self.budget_bytes = config.budget_bytes
        self._stages = [StageAccount() for _ in range(num_stages)]
        self._waits, self._waited_s, self._failures = 0, 0.0, 0
        #: Moves and bytes by kind.
        self._moves = {OpKind.OFFLOAD: [0, 0], OpKind.RELOAD: [0, 0]}

    # ------------------------------------------------------------- tasks

    @property
    def most_tokens(self) -> int:
        """Tokens of KV cache that fit a stage with nothing else on it."""
        block_bytes = self._kv_block_tokens * self.config.kv_bytes_per_token
        return self.budget_bytes // block_bytes * self._kv_block_tokens

    def arrived(self, task: InferenceRequest | TrainingMicrobatch) -> str:
        """A task came; returns why it can never run on a stage of this node, in numbers, or nothing when it can."""
        config = self.config
        if isinstance(task, InferenceRequest):
            need = self._kv_bytes(task.prompt_tokens + task.max_tokens)
        else:
            need = task.batch * task.length * config.activation_bytes_per_token
        if need > self.budget_bytes:
            self._failures += 1
            return f"needs {need} bytes on every stage, which may hold {self.budget_bytes}"
        return ""

    def freed(self, task_id: str) -> None:
        """What a task held is given up on every stage: it left, was kept long enough or is computed again."""
        for stage in self._stages:
            stage.release(task_id)

    def backward_left(self, task_id: str, stage: int) -> None:
        """A micro-batch's backward has used its activations on a stage."""
        self._stages[stage].release(task_id)

    # ------------------------------------------------------------- ops

    def in_the_way(self, stage: int, op: Op) -> list[str]:
        """Kept KV caches that must go for an op to fit, the one used longest ago first; all that there are if that is
        not enough."""
        lack = self._lack_bytes(stage, op)
        chosen: list[str] = []
        if lack > 0:
            device = self._stages[stage].device
            for task_id in self._running.prefixes.task_ids():
                if task_id in device:
                    chosen.append(task_id)
                    lack -= device[task_id]
                if lack <= 0:
                    break
        return chosen

    def has_room(self, now_s: float, stage: int, flight: Flight) -> bool:
        """Whether an op may be chosen: it fits, with kept KV caches out of its way if need be, has waited long enough,
        or may not wait at all."""
        if not self.config.wait_or_offload:
            return True
        lack = self._lack_bytes(stage, flight.op)
        if lack <= 0 or lack <= self._kept_bytes(stage):
            return True
        if flight.blocked_s is None:
            flight.blocked_s = now_s
            self._waits += 1
        return now_s >= flight.blocked_s + self._longest_wait_s(flight)

    def next_due_s(self, now_s: float, waiting: Iterable[Flight]) -> float | None:
        """When the next of these ops waits for room no longer; None: no such time is to come."""
        due_s = (f.blocked_s + self._longest_wait_s(f) for f in waiting if f.blocked_s is not None)
        return min((time_s for time_s in due_s if time_s > now_s), default=None)

    def failure(self, stage: int, op: Op) -> str:
        """Without wait-or-offload: why an op cannot run now, in numbers; empty: it can."""
        if self.config.wait_or_offload or self._lack_bytes(stage, op) <= 0:
            return ""
        self._failures += 1
        need, used = self._need_bytes(stage, op), self._stages[stage].used_bytes
        return f"{op.kind} needs {need} bytes on stage {stage}, which holds {used} of {self.budget_bytes}"

    def next_move(self, stage: int, op: Op, distance: Callable[[str], int]) -> Move | None:
        """What has to move before an op runs on an idle stage, taken as done; None: the op can run.

        distance: stages until a task's next op comes to this stage.
        """
        account = self._stages[stage]
        lack = self._lack_bytes(stage, op)
        if lack > 0:
            own = {*op.task_ids, *op.continued}
            # Of equals the one used last: what takes turns is needed again in the order in which it was used.
            order = sorted(
                (task_id for task_id in reversed(account.device) if task_id not in own), key=distance, reverse=True
            )
            moved: list[str] = []
            num_bytes = 0
            for task_id in order:
                if num_bytes >= lack:
                    break
                num_bytes += account.offload(task_id)
                moved.append(task_id)
            if num_bytes < lack:
                raise ValueError(f"op {op.op_id} cannot fit stage {stage}: {lack - num_bytes} bytes too many")
            return self._count(Move(OpKind.OFFLOAD, tuple(moved), num_bytes))
        back = tuple(task_id for task_id in (*op.continued, *op.task_ids) if task_id in account.host)
        if not back:
            return None
        return self._count(Move(OpKind.RELOAD, back, sum(account.reload(task_id) for task_id in back)))

    def starts(self, now_s: float, stage: int, flight: Flight) -> None:
        """An op runs: what it adds is held from now on."""
        if flight.blocked_s is not None:
            self._waited_s += now_s - flight.blocked_s
        account = self._stages[stage]
        op = flight.op
        if op.kind is OpKind.TRAIN_FORWARD and op.part == 0:
            account.hold(op.task_ids[0], self._activation_bytes(op))
        for task_id, earlier_id, tokens in self._kv_tokens_after(account, op):
            account.hold_kv(task_id, tokens, self._kv_bytes(tokens), earlier_id)

    def snapshot(self) -> MemoryCounters:
        """Counts for heartbeats and figures."""
        return MemoryCounters(
            used_bytes=tuple(account.used_bytes for account in self._stages),
            host_bytes=tuple(sum(account.host.values()) for account in self._stages),
            waits=self._waits,
            waited_s=self._waited_s,
            offloads=self._moves[OpKind.OFFLOAD][0],
            offloaded_bytes=self._moves[OpKind.OFFLOAD][1],
            reloads=self._moves[OpKind.RELOAD][0],
            reloaded_bytes=self._moves[OpKind.RELOAD][1],
            failures=self._failures,
        )

    def inherit(self, other: "NodeMemory") -> None:
        """Go on from the accounts of another node without tasks, whose kept KV caches stay."""
        self.__dict__.update(other.fork(self._running).__dict__)

    def fork(self, running: RunningRequests) -> "NodeMemory":
        """An independent copy, with copies of the requests."""
        twin = NodeMemory.__new__(NodeMemory)
        twin.__dict__.update(self.__dict__)
        twin._running = running
        twin._stages = [account.fork() for account in self._stages]
        twin._moves = {kind: counts.copy() for kind, counts in self._moves.items()}
        return twin

    # ------------------------------------------------------------- internals

    def _longest_wait_s(self, flight: Flight) -> float:
        is_forward = flight.op.kind is OpKind.TRAIN_FORWARD
        return self.config.max_forward_wait_s if is_forward else self.config.max_wait_s

    def _kv_tokens_after(self, account: StageAccount, op: Op) -> Iterator[tuple[str, str, int]]:
        """Requests whose KV cache an op makes longer, the ended ones whose KV cache they take over, and the tokens in
        it then."""
        if op.kind is OpKind.DECODE:
            yield from ((task_id, "", account.kv_tokens[task_id] + 1) for task_id in op.task_ids)
        elif op.kind is OpKind.PREFILL:
            for index in range(len(op.task_ids) - op.decodes):
                task_id = op.task_ids[index]
                end = op.end_tokens[index] if op.end_tokens else self._running[task_id].request.prompt_tokens
                yield task_id, op.continued[index] if op.continued else "", end
            yield from ((task_id, "", account.kv_tokens[task_id] + 1) for task_id in op.decode_ids)

    def _kv_bytes(self, tokens: int) -> int:
        return whole_blocks(tokens, self._kv_block_tokens) * self.config.kv_bytes_per_token

    def _activation_bytes(self, op: Op) -> int:
        return op.num_tokens * self.config.activation_bytes_per_token

    def _need_bytes(self, stage: int, op: Op) -> int:
        """Bytes an op brings to a stage: what it adds, and what must come back. (Where a prompt is shorter than what
        it goes on from, that must all come back before a part of it is dropped.)"""
        account = self._stages[stage]
        need = 0
        if account.host:
            need = sum(account.host.get(task_id, 0) for task_id in (*op.task_ids, *op.continued))
        if op.kind is OpKind.TRAIN_FORWARD:
            return need + (0 if op.part else self._activation_bytes(op))
        for task_id, earlier_id, tokens in self._kv_tokens_after(account, op):
            before = account.kv_tokens.get(earlier_id or task_id, 0)
            need += max(0, self._kv_bytes(tokens) - self._kv_bytes(before))
        return need

    def _lack_bytes(self, stage: int, op: Op) -> int:
        """Bytes that must be freed before an op fits; 0 or less: none."""
        need = self._need_bytes(stage, op)
        return need + self._stages[stage].used_bytes - self.budget_bytes if need else 0

    def _kept_bytes(self, stage: int) -> int:
        """Bytes of kept KV caches on a stage."""
        device = self._stages[stage].device
        return sum(device.get(task_id, 0) for task_id in self._running.prefixes.task_ids())

    def _count(self, move: Move) -> Move:
        counts = self._moves[move.kind]
        counts[0] += 1
        counts[1] += move.num_bytes
        return move


def stages_until_use(queues: Sequence[StageQueue], stage: int, task_id: str) -> int:
    """Stages until the next op of a task comes to a stage, which does not run it now."""
    places = ((queue.stage, f.op.kind) for queue in queues for f in queue.flights() if _uses(f.op, task_id))
    place, kind = next(places, (-1, OpKind.DECODE))
    top = len(queues) - 1
    if kind is OpKind.TRAIN_BACKWARD:
        return place - stage
    if place <= stage:
        return stage - place
    # Up, then down again or round to stage 0.
    return top - place + 1 + (top - stage if kind is OpKind.TRAIN_FORWARD else stage)


def _uses(op: Op, task_id: str) -> bool:
    return task_id in op.task_ids or task_id in op.continued
