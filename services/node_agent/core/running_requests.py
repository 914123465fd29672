"""Requests past their admission: their decode iterations, the KV cache they hold or give up, and how they end."""

from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from itertools import accumulate, islice

from services.latency import DECODE
from services.node_agent.core.memory import KvLedger
from services.node_agent.core.prefix import Prefix, PrefixCache
from services.node_agent.core.running import Claim, RunningRequest
from services.node_agent.core.types import Command, FreeKv, InferenceRequest, NodeCoreConfig, Op, TaskDone
from services.node_agent.core.waiting import SHORTEST_ALLOWANCE_S


class RunningRequests:
    """Admitted requests of one node, and the account of its KV cache."""

    def __init__(self, config: NodeCoreConfig) -> None:
        self._config = config
        self.kv = KvLedger(config.kv_capacity_tokens, config.kv_block_tokens)
        self.prefixes = PrefixCache(config.prefix_cache_tokens, config.kv_block_tokens)
        #: Requests whose KV cache, kept or their own, had to make room for the op that is composed.
        self.made_room: list[str] = []
        self._running: dict[str, RunningRequest] = {}
        # Running requests that no op holds, the one that waits longest first.
        self._idle: dict[str, None] = {}
        # Those that no op holds and whose prompt is not at its end.
        self.filling: dict[str, None] = {}
        self._decodes_in_flight = 0
        # How often live requests gave up their blocks, and all requests so far.
        self._preempted: dict[str, int] = {}
        self.preemptions = 0
        # Since when they wait, and what they are now.
        self._gave_up: list[tuple[float, InferenceRequest]] = []
        # Set when no idle request finds a block for its next token: one must come back or leave first.
        self._stalled = False

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._running

    def __getitem__(self, task_id: str) -> RunningRequest:
        return self._running[task_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._running)

    @property
    def room(self) -> int:
        """Requests that may still be admitted."""
        return self._config.num_stages * self._config.max_batch - len(self._running)

    # ------------------------------------------------------------- admission

    def reservation(self, request: InferenceRequest) -> int:
        """Tokens that a request is admitted for."""
        config = self._config
        output = request.max_tokens
        if config.expected_output_tokens and self._preempted.get(request.task_id, 0) < config.max_preemptions:
            output = min(output, config.expected_output_tokens)
        return request.prompt_tokens + output

    def is_computing(self, group: str) -> bool:
        """Whether a choice of this prompt has begun to compute it and is not at its end."""
        return any(
            running.request.group == group and running.filled_tokens < running.request.prompt_tokens
            for running in self._running.values()
        )

    def cached_tokens(self, request: InferenceRequest, kept_tokens: int) -> int:
        """Prompt tokens that need not be computed: the last one has to be, for it yields the first new token."""
        return min(kept_tokens, request.prompt_tokens - 1)

    def admit(self, now_s: float, requests: Iterable[InferenceRequest], epoch: int) -> list[RunningRequest]:
        """Reserve for requests that fit, and let them go on from what is kept of their sessions."""
        admitted = []
        for request in requests:
            running = RunningRequest(request, self._tpot_s(request), request.prompt_tokens, now_s, epoch=epoch)
            prefix = self.prefixes.take(request.session_id)
            if prefix is not None:
                running.cached_tokens = self.cached_tokens(request, prefix.tokens)
                running.continued, running.kept_tokens = prefix
            running.filled_tokens = running.cached_tokens
            admitted.append(running)
        for running in admitted:
            request = running.request
            self.kv.reserve(request.task_id, self.reservation(request))
            self._running[request.task_id] = running
        self._shrink_kept()
        return admitted

    def resume(self, now_s: float, request: InferenceRequest, generated_tokens: int) -> None:
        """Take in a request that is past its prefill, with `generated_tokens` so far; no operation holds it. Without
        room for it nothing happens: then it cannot have been running."""
        if not self.kv.fits(request.prompt_tokens + request.max_tokens):
            return
        running = RunningRequest(request, self._tpot_s(request), request.prompt_tokens + generated_tokens, now_s)
        running.generated_tokens = generated_tokens
        self.kv.reserve(request.task_id, request.prompt_tokens + request.max_tokens)
        self._running[request.task_id] = running
        self._idle[request.task_id] = None

    # ------------------------------------------------------------- decoding

    def decode_claim(self) -> Claim | None:
        """Claim of the next decode iteration, None when no running request is free.

        At most one decode op per stage is in flight. While others are, one smaller than half its even share waits for
        them to come back: stragglers merge instead of travelling alone for ever.
        """
        if not self._idle or self._stalled:
            return None
        flying = self._decodes_in_flight
        stages = self._config.num_stages
        if flying and (flying >= stages or 2 * stages * len(self._idle) < len(self._running)):
            return None
        running = self._running
        first = running[next(iter(self._idle))]
        due_s = first.last_token_s + first.tpot_s
        most = first
        for task_id in self._idle:
            request = running[task_id]
            if request.last_token_s + request.tpot_s < due_s:
                due_s = request.last_token_s + request.tpot_s
                most = request
        return Claim(first.last_token_s, most.last_token_s, most.tpot_s)

    def take_decode(self, most_tokens: int | None = None) -> tuple[tuple[str, ...], int]:
        """Task ids of the next decode op, at most `max_batch`, and the sum of their contexts in tokens.

        most_tokens: who would bring the contexts above it waits for the next op; None: no bound.
        """
        idle = self._idle
        running = self._running
        if self._config.expected_output_tokens:
            task_ids = self._with_room()
            if not task_ids:
                self._stalled = True
                return (), 0
        else:
            task_ids = tuple(islice(idle, self._config.max_batch))
        if most_tokens is not None:
            sums = accumulate(self.kv.need(running[task_id].context_tokens) for task_id in task_ids)
            task_ids = task_ids[: max(1, sum(tokens <= most_tokens for tokens in sums))]
        if len(task_ids) == len(idle):
            idle.clear()
        else:
            for task_id in task_ids:
                del idle[task_id]
        self._decodes_in_flight += 1
        context_tokens = 0
        for task_id in task_ids:
            context_tokens += running[task_id].context_tokens
        return task_ids, context_tokens

    def held_tokens(self, task_ids: Iterable[str]) -> int:
        """Tokens of whole blocks that running requests hold once their newest token is there."""
        return sum(self.kv.need(self._running[task_id].context_tokens) for task_id in task_ids)

    # ------------------------------------------------------------- giving up blocks

    def take_given_up(self) -> list[tuple[float, InferenceRequest]]:
        """Requests that gave up their blocks and wait again, each with the time since when."""
        gave_up, self._gave_up = self._gave_up, []
        return gave_up

    def _with_room(self) -> tuple[str, ...]:
        """Idle requests that have, or get, a block for their next token, at most `max_batch`. All are looked at: only
        one behind those without room may be the one that can go on."""
        chosen: dict[str, None] = {}
        for task_id in tuple(self._idle):
            if len(chosen) == self._config.max_batch:
                break
            if task_id in self._running and self._make_room(task_id, chosen):
                chosen[task_id] = None
        self._shrink_kept()
        return tuple(chosen)

    def _make_room(self, task_id: str, chosen: Container[str]) -> bool:
        """Whether a request has room now: requests admitted after it that nobody runs may have to go for it."""
        lack = self.kv.lack(task_id, self._running[task_id].context_tokens)
        while self.kv.used_tokens + lack > self.kv.capacity_tokens:
            victim = self._victim(task_id, chosen)
            if victim is None:
                return False
            self._preempt(victim)
        self.kv.grow(task_id, lack)
        return True

    def _victim(self, task_id: str, chosen: Container[str]) -> str | None:
        """The request admitted last that can go, if that was after this one: the first of all always has its way."""
        for later in reversed(self._running):
            if later == task_id:
                break
            is_free = later in self._idle or later in self.filling
            if is_free and later not in chosen and self._preempted.get(later, 0) < self._config.max_preemptions:
                return later
        return None

    def _preempt(self, task_id: str) -> None:
        """Take a request's blocks. It waits again, with its output so far behind its prompt."""
        running = self._remove(task_id)
        self.made_room += _held_by(running)
        self._preempted[task_id] = self._preempted.get(task_id, 0) + 1
        self.preemptions += 1
        request, generated = running.request, running.generated_tokens
        again = replace(
            request,
            prompt_tokens=request.prompt_tokens + generated,
            max_tokens=request.max_tokens - generated,
            reference_tokens=0 if generated else request.reference_tokens,
            # Its output is its own.
            choice_of="" if generated else request.choice_of,
        )
        self._gave_up.append((running.last_token_s, again))

    def _shrink_kept(self) -> None:
        """Kept prefixes take what nobody has reserved, at most."""
        self.made_room += self.prefixes.shrink(self.kv.capacity_tokens - self.kv.used_tokens)

    # ------------------------------------------------------------- ends

    def complete(self, now_s: float, op: Op, stopped: tuple[str, ...]) -> list[Command]:
        """The op left the last stage: its requests got one token each, but those whose prompt is not at its end; those
        that are finished leave."""
        self._op_ended(op)
        commands: list[Command] = []
        partial_ids = op.partial_ids if op.partials else ()
        for task_id in op.task_ids:
            running = self._running[task_id]
            running.continued = ""
            if running.cancelled:
                commands += self._leave(task_id, "cancelled")
                continue
            running.last_token_s = now_s
            if task_id in partial_ids:
                self.filling[task_id] = None
                continue
            running.generated_tokens += 1
            running.context_tokens += 1
            if task_id in stopped:
                commands += self._leave(task_id, "stop")
            elif running.generated_tokens >= running.request.max_tokens:
                commands += self._leave(task_id, "length")
            else:
                self._idle[task_id] = None
        return commands

    def fail(self, op: Op) -> list[Command]:
        """The op raised: its requests end."""
        self._op_ended(op)
        commands: list[Command] = []
        for task_id in op.task_ids:
            commands += self._leave(task_id, "cancelled" if self._running[task_id].cancelled else "error")
        return commands

    def cancel(self, task_id: str) -> list[Command]:
        """End a request now, or when the op that holds it ends."""
        if task_id in self._idle or task_id in self.filling:
            return self._leave(task_id, "cancelled")
        self._running[task_id].cancelled = True
        return []

    def forget(self, task_id: str) -> None:
        """A request that is not admitted ended."""
        self._preempted.pop(task_id, None)

    def inherit(self, other: "RunningRequests") -> None:
        """Take over the kept prefixes of a node without requests."""
        self.prefixes = other.prefixes.fork()
        self.made_room = other.made_room.copy()

    def fork(self) -> "RunningRequests":
        """An independent copy."""
        twin = RunningRequests.__new__(RunningRequests)
        twin.__dict__.update(self.__dict__)
        twin.kv = self.kv.fork()
        twin.prefixes = self.prefixes.fork()
        twin.made_room = self.made_room.copy()
        twin._running = {task_id: replace(running) for task_id, running in self._running.items()}
        twin._idle = self._idle.copy()
        twin.filling = self.filling.copy()
        twin._preempted = self._preempted.copy()
        twin._gave_up = self._gave_up.copy()
        return twin

    # ------------------------------------------------------------- internals

    def _tpot_s(self, request: InferenceRequest) -> float:
        tpot_s = self._config.default_tpot_s if request.tpot_s is None else request.tpot_s
        return max(tpot_s, SHORTEST_ALLOWANCE_S)

    def _op_ended(self, op: Op) -> None:
        self._stalled = False
        if op.kind is DECODE or op.decodes:
            self._decodes_in_flight -= 1

    def _remove(self, task_id: str) -> RunningRequest:
        self._idle.pop(task_id, None)
        self.filling.pop(task_id, None)
        self.kv.release(task_id)
        return self._running.pop(task_id)

    def _leave(self, task_id: str, reason: str) -> list[Command]:
        running = self._remove(task_id)
        self._preempted.pop(task_id, None)
        self._stalled = False
        freed = _held_by(running)
        if running.request.session_id and reason in ("stop", "length"):
            freed = self._keep(running)
        return [*(FreeKv(freed_id) for freed_id in freed), TaskDone(task_id, reason)]

    def _keep(self, running: RunningRequest) -> list[str]:
        """Keep the KV cache of a turn that ended: all tokens but the newest, which no op has read yet."""
        request = running.request
        prefix = Prefix(request.task_id, running.context_tokens - 1)
        room_tokens = self.kv.capacity_tokens - self.kv.used_tokens
        return self.prefixes.put(request.session_id, prefix, running.epoch, room_tokens)


def _held_by(running: RunningRequest) -> list[str]:
    """Requests whose KV cache is this one's: not every stage may have handed over what it goes on from."""
    task_id = running.request.task_id
    return [running.continued, task_id] if running.continued else [task_id]
