"""A checker of every promise of the node core.

It knows the rules only from the outside: from the events it is shown and the commands that come back.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from services.latency import MOVES, OpKind
from services.node_agent.core.types import (
    Command,
    Event,
    FreeKv,
    InferenceRequest,
    MicrobatchArrived,
    NodeCoreConfig,
    Op,
    OpDone,
    RequestArrived,
    RunOp,
    SyncRequested,
    TaskDone,
)
from tests.unit.node_core.memory_checker import MemoryChecker

FORWARD_TYPES = (OpKind.PREFILL, OpKind.DECODE, OpKind.TRAIN_FORWARD)


TRAINING = (OpKind.TRAIN_FORWARD, OpKind.TRAIN_BACKWARD, OpKind.OPTIMIZER_STEP)


class Checker:
    """Asserts the core's invariants from events and commands alone."""

    def __init__(self, config: NodeCoreConfig) -> None:
        self.config = config
        self.running: dict[int, Op] = {}
        self.ended: Counter[str] = Counter()
        self.freed: Counter[str] = Counter()
        self.live: set[str] = set()
        self._requests: dict[str, InferenceRequest] = {}
        self._holding: dict[str, int] = {}
        self._ending: set[str] = set()
        #: How often a request gave up its blocks.
        self.preempted: Counter[str] = Counter()
        self._generated: Counter[str] = Counter()
        #: Prompt tokens computed, or in an op on its way.
        self.filled: dict[str, int] = {}
        #: Session and tokens of the KV caches kept between two turns, by the request that left them.
        self.kept: dict[str, tuple[str, int]] = {}
        self._versions = [0] * config.num_stages
        #: "stash": the oldest weights that a stage still has.
        self._kept_from = [0] * config.num_stages
        # Forward-type ops in the pipeline: op id -> (version, next stage to run on).
        self._travelling: dict[int, tuple[int, int]] = {}
        self._forward_of: dict[str, int] = {}
        self._tasks_of: dict[int, tuple[str, ...]] = {}
        self._inflight: set[str] = set()
        #: Weight changes that must meet no gradient of older weights; groups with gradients whose step has not begun.
        self._settling: set[str] = set()
        self._owed: set[int] = set()
        #: Next piece of a cut op, by stage and op id.
        self._expected_part: dict[tuple[int, int], int] = {}
        self.memory = MemoryChecker(config.memory, config.num_stages, config.kv_block_tokens) if config.memory else None
        #: S-PP: per stage the micro-batches between forward and backward, and those that have gone on from it upwards.
        self._ahead: list[dict[str, int]] = [{} for _ in range(config.num_stages)]
        self._turned: set[str] = set()

    def before(self, event: Event) -> None:
        """Take note of an event about to be given to the core."""
        if isinstance(event, RequestArrived) and event.request.task_id not in self.live:
            self._requests[event.request.task_id] = event.request
            if self.memory:
                self.memory.prompts[event.request.task_id] = event.request.prompt_tokens
            self.live.add(event.request.task_id)
        elif isinstance(event, MicrobatchArrived):
            self.live.add(event.microbatch.task_id)
        elif isinstance(event, SyncRequested) and event.settles:
            self._settling.add(event.sync_id)
        elif isinstance(event, OpDone):
            op = self.running.pop(event.stage)
            if op.kind not in MOVES:
                self._op_ended(op, event)

    def _op_ended(self, op: Op, event: OpDone) -> None:
        if op.changes_weights:
            self._versions[event.stage] += 1
        last = event.stage == self.config.num_stages - 1
        if last and op.kind in (OpKind.PREFILL, OpKind.DECODE) and not event.failed:
            self._generated.update(with_new_tokens(op))
        if op.part + 1 < op.parts and not event.failed:
            self._expected_part[event.stage, op.op_id] = op.part + 1
            return
        if op.kind is OpKind.TRAIN_FORWARD and last:
            self._turned.add(op.task_ids[0])
        elif op.kind is OpKind.TRAIN_BACKWARD:
            self._backward_ended(op, event)
        if op.op_id in self._travelling:
            if last or event.failed:
                del self._travelling[op.op_id]
            else:
                self._travelling[op.op_id] = (op.version, event.stage + 1)

    def _backward_ended(self, op: Op, event: OpDone) -> None:
        task_id = op.task_ids[0]
        if event.stage == 0:
            self._inflight.discard(task_id)
        self._ahead[event.stage].pop(task_id, None)
        if self.memory and not event.failed:
            self.memory.free(task_id, [event.stage])

    def after(self, commands: Iterable[Command]) -> None:
        """Check what the core said."""
        commands = list(commands)
        self._ending = {command.task_id for command in commands if isinstance(command, TaskDone)}
        for command in commands:
            if isinstance(command, RunOp):
                self._ran(command.stage, command.op)
            elif isinstance(command, FreeKv):
                if self._gave_up_blocks(command.task_id):
                    continue
                self.freed[command.task_id] += 1
                assert self.freed[command.task_id] == 1, f"{command.task_id} freed twice"
                stages = range(self.config.num_stages)
                for stage, op in self.running.items():
                    assert command.task_id not in op.task_ids or op.kind in MOVES, f"runs on {stage}"
                for ahead in self._ahead:
                    ahead.pop(command.task_id, None)
                if self.memory:
                    self.memory.free(command.task_id, stages)
                self._holding.pop(command.task_id, None)
                self.kept.pop(command.task_id, None)
                self._inflight.discard(command.task_id)
            elif isinstance(command, TaskDone):
                assert command.task_id in self.live, f"{command.task_id} ended but is not live"
                self.live.discard(command.task_id)
                self.ended[command.task_id] += 1
                assert self.ended[command.task_id] == 1
                if command.task_id in self._holding:
                    self._keep(command)
                # A micro-batch that ended takes its forward out of the pipeline.
                self._travelling.pop(self._forward_of.pop(command.task_id, -1), None)
                # An op for which there is no memory ends its requests without running.
                for op_id in [
                    i for i in self._travelling if self._tasks_of[i] and not self.live & {*self._tasks_of[i]}
                ]:
                    del self._travelling[op_id]

        assert self.kept_tokens <= self.config.prefix_cache_tokens
        assert self.kept_tokens + sum(self._holding.values()) <= self.config.kv_capacity_tokens
        assert len({session_id for session_id, _ in self.kept.values()}) == len(self.kept)

    def _gave_up_blocks(self, task_id: str) -> bool:
        """Whether a request that goes on was freed: it waits again, with its output behind its prompt."""
        if not self.config.expected_output_tokens or task_id not in self._holding:
            return False
        ends = task_id in self._ending
        if ends:
            return False
        self.preempted[task_id] += 1
        if self.memory:
            self.memory.free(task_id, range(self.config.num_stages))
        assert self.preempted[task_id] <= self.config.max_preemptions
        assert all(task_id not in op.task_ids for op in self.running.values())
        request, generated = self._requests[task_id], self._generated.pop(task_id, 0)
        self._requests[task_id] = replace(
            request,
            prompt_tokens=request.prompt_tokens + generated,
            max_tokens=request.max_tokens - generated,
            reference_tokens=0 if generated else request.reference_tokens,
        )
        if self.memory:
            self.memory.prompts[task_id] += generated
        del self._holding[task_id]
        del self.filled[task_id]
        return True

    def _keep(self, done: TaskDone) -> None:
        """A request ended and its KV cache was not freed."""
        request = self._requests[done.task_id]
        assert request.session_id, f"{done.task_id} ended with its KV cache held"
        assert done.reason in ("stop", "length")
        del self._holding[done.task_id]
        tokens = request.prompt_tokens + self._generated[done.task_id] - 1
        self.kept[done.task_id] = (request.session_id, tokens)

    @property
    def kept_tokens(self) -> int:
        """Tokens of whole blocks kept for sessions."""
        return sum(self._whole_blocks(tokens) for _, tokens in self.kept.values())

    def _whole_blocks(self, tokens: int) -> int:
        return math.ceil(tokens / self.config.kv_block_tokens) * self.config.kv_block_tokens

    def _prefilled(self, op: Op) -> None:
        """A prefill enters stage 0: it computes what no kept KV cache holds."""
        num_tokens = 0
        for index, task_id in enumerate(op.first_ids + op.partial_ids):
            request = self._requests[task_id]
            output = 0 if self.config.expected_output_tokens else request.max_tokens
            self._holding[task_id] = self._whole_blocks(request.prompt_tokens + output)
            if op.shares and op.shares[index]:
                self._shares(op, index, request)
                continue
            start = op.cached_tokens[index] if op.cached_tokens else 0
            end = op.end_tokens[index] if op.end_tokens else request.prompt_tokens
            if op.continued and op.continued[index]:
                session_id, tokens = self.kept.pop(op.continued[index])
                assert session_id == request.session_id
                assert task_id not in self.filled
                assert start == min(tokens, request.prompt_tokens - 1)
            else:
                assert start == self.filled.get(task_id, 0)
            assert start < end <= request.prompt_tokens
            assert (end == request.prompt_tokens) == (task_id in op.first_ids)
            self.filled[task_id] = end
            num_tokens += end - start + (request.reference_tokens if task_id in op.first_ids else 0)
        assert op.num_tokens == num_tokens
        shared = sum(map(bool, op.shares))
        assert op.context_tokens == sum(c for i, c in enumerate(op.cached_tokens) if not (shared and op.shares[i]))
        assert op.batch == len(op.task_ids) - op.decodes - shared
        self._grow(op.decode_ids)
        contexts = [self._requests[i].prompt_tokens + self._generated[i] for i in op.decode_ids]
        assert op.decode_context_tokens == sum(contexts)
        assert all(self.filled[i] == self._requests[i].prompt_tokens for i in op.decode_ids)

    def _shares(self, op: Op, index: int, request: InferenceRequest) -> None:
        """A choice has the prompt of another one, which ends in this op."""
        first = self._requests[op.shares[index]]
        assert op.shares[index] in op.first_ids[:index]
        assert op.task_ids[index] in op.first_ids
        assert request.group == first.group
        assert request.prompt_tokens == first.prompt_tokens == op.cached_tokens[index]
        assert not op.end_tokens or op.end_tokens[index] == request.prompt_tokens
        self.filled[request.task_id] = request.prompt_tokens

    def _grow(self, task_ids: Iterable[str]) -> None:
        """Requests get their next token; with admission by expectation that may take another block."""
        if self.config.expected_output_tokens:
            for task_id in task_ids:
                tokens = self._requests[task_id].prompt_tokens + self._generated[task_id]
                self._holding[task_id] = self._whole_blocks(tokens)

    def _ran(self, stage: int, op: Op) -> None:
        assert stage not in self.running, f"stage {stage} got two ops"
        self.running[stage] = op
        if self.memory:
            self.memory.ran(stage, op)
        if op.kind in MOVES:
            return
        self._check_schedule(stage, op)
        self._check_settled(stage, op)
        assert op.part == self._expected_part.pop((stage, op.op_id), 0), "pieces out of order"
        version = self._versions[stage]
        stash = self.config.weight_handling == "stash"
        if op.kind is OpKind.TRAIN_BACKWARD:
            assert op.version == version or (stash and op.version < version), "weights changed before the backward"
        elif stash and not op.changes_weights:
            assert self._kept_from[stage] <= op.version <= version, f"no weights {op.version} on stage {stage}"
        else:
            assert op.version == version, f"op stamped {op.version} ran at {version}"
        if op.kind in FORWARD_TYPES or (op.kind is OpKind.WEIGHT_SYNC and not op.changes_weights):
            self._travelling.setdefault(op.op_id, (op.version, 0))
            self._tasks_of[op.op_id] = op.task_ids
        if op.changes_weights:
            self._check_change(stage, op, stash=stash)
        if op.kind is OpKind.TRAIN_FORWARD and stage == 0:
            self._inflight.add(op.task_ids[0])
            self._forward_of[op.task_ids[0]] = op.op_id
            if self.config.training_schedule == "async":
                assert len(self._inflight) <= self.config.max_inflight_training
        if op.kind in (OpKind.PREFILL, OpKind.DECODE):
            self._check_batch(stage, op)

    def _check_change(self, stage: int, op: Op, *, stash: bool) -> None:
        self._kept_from[stage] = max(self._kept_from[stage], op.oldest_version)
        for op_id, (stamp, next_stage) in self._travelling.items():
            if not stash:
                assert not (stamp <= op.version and next_stage <= stage), f"{op.op_id} overtook {op_id} on {stage}"
        if not stash and stage == 0:
            assert not self._inflight, "weights changed between a forward and its backward"

    def _check_batch(self, stage: int, op: Op) -> None:
        if op.kind is OpKind.PREFILL and stage == 0:
            self._prefilled(op)
            assert sum(self._holding.values()) <= self.config.kv_capacity_tokens
            references = sum(self._requests[i].reference_tokens for i in op.first_ids)
            if self.config.max_batch_tokens:
                assert op.num_tokens - references + op.decodes <= self.config.max_batch_tokens
            else:
                assert len(op.task_ids) == 1 or op.num_tokens <= self.config.max_prefill_tokens
                assert (op.end_tokens, op.partials, op.decodes) == ((), 0, 0)
        if op.kind is OpKind.DECODE and stage == 0:
            self._grow(op.task_ids)
            assert sum(self._holding.values()) <= self.config.kv_capacity_tokens
        assert op.decodes <= self.config.max_batch
        assert 1 <= len(op.task_ids) - op.decodes <= self.config.max_batch
        assert len(set(op.task_ids)) == len(op.task_ids)
        others = [other for other in self.running.values() if other.op_id != op.op_id and other.kind not in MOVES]
        assert all(not set(other.task_ids) & set(op.task_ids) for other in others)

    def _check_settled(self, stage: int, op: Op) -> None:
        """No gradient of the weights before is left when a change that settles begins."""
        if op.kind is OpKind.TRAIN_BACKWARD:
            self._owed.add(op.group)
        elif op.kind is OpKind.OPTIMIZER_STEP and stage == 0:
            self._owed.remove(op.group)
        elif op.kind is OpKind.WEIGHT_SYNC and stage == 0 and op.subject in self._settling:
            assert not self._owed
            assert not self._inflight

    def _check_schedule(self, stage: int, op: Op) -> None:
        schedule, ahead = self.config.training_schedule, self._ahead[stage]
        if schedule == "async" or op.kind not in (OpKind.TRAIN_FORWARD, OpKind.TRAIN_BACKWARD):
            return
        assert set(ahead.values()) <= {op.group}, "two mini-batches at once"
        if op.kind is OpKind.TRAIN_FORWARD:
            ahead[op.task_ids[0]] = op.group
            if schedule == "1f1b":
                assert len(ahead) <= self.config.num_stages - stage
        elif schedule == "gpipe" and stage == self.config.num_stages - 1:
            assert ahead.keys() <= self._turned, "a backward before the last forward"


def with_new_tokens(op: Op) -> tuple[str, ...]:
    """Requests that get a token from an inference op."""
    return op.task_ids if op.kind is OpKind.DECODE else op.first_ids + op.decode_ids
