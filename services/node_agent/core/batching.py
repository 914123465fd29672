"""Iteration-level (continuous) batching: which requests form the next prefill or decode op.

A batch is composed when stage 0 takes it, not before, so a late request can still join. A request is admitted, that is
its KV cache reserved, when its prefill starts.
"""

from bisect import bisect_left, insort
from collections.abc import Container, Iterable
from dataclasses import replace
from itertools import accumulate, chain, islice

from services.latency import OpKind
from services.node_agent.core.memory import KvLedger
from services.node_agent.core.prefix import Prefix, PrefixCache
from services.node_agent.core.running import Claim, Piece, RunningRequest
from services.node_agent.core.types import (
    Command,
    FreeKv,
    InferenceRequest,
    NodeCoreConfig,
    Op,
    QueueOrder,
    TaskDone,
)

#: A promise shorter than this is no promise; keeps urgency finite.
_SHORTEST_ALLOWANCE_S = 1e-3


class InferenceBatcher:
    """Waiting and running requests of one node."""

    def __init__(self, config: NodeCoreConfig) -> None:
        self._config = config
        self._by_deadline = config.queue_order is QueueOrder.INFERENCE_FIRST
        self.kv = KvLedger(config.kv_capacity_tokens, config.kv_block_tokens)
        self.prefixes = PrefixCache(config.prefix_cache_tokens, config.kv_block_tokens)
        # Requests whose kept KV cache had to make room for the op that is composed.
        self._made_room: list[str] = []
        # Sorted by (deadline, arrival order); fifo: (0, arrival order). The entry time is kept for fifo ranks.
        self._waiting: list[tuple[float, int, float, InferenceRequest]] = []
        self._waiting_keys: dict[str, tuple[float, int]] = {}
        self._bypassed: dict[str, int] = {}
        self._arrivals = 0
        self._running: dict[str, RunningRequest] = {}
        # Running requests that no op holds, the one that waits longest first.
        self._idle: dict[str, None] = {}
        # Those that no op holds and whose prompt is not at its end.
        self._filling: dict[str, None] = {}
        self._decodes_in_flight = 0
        # How often live requests gave up their blocks, and all requests so far.
        self._preempted: dict[str, int] = {}
        self.preemptions = 0
        # Set when no idle request finds a block for its next token: one must come back or leave first.
        self._stalled = False
        # Set when nothing that waits can be admitted: no use in looking again before something arrives or leaves.
        self._blocked = False

    # ------------------------------------------------------------- arrival and cancellation

    @property
    def num_waiting(self) -> int:
        """Requests not admitted yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Admitted requests."""
        return len(self._running)

    def task_ids(self) -> tuple[str, ...]:
        """Every live request."""
        return (*self._waiting_keys, *self._running)

    def holds(self, task_id: str) -> bool:
        """Whether this request is live."""
        return task_id in self._waiting_keys or task_id in self._running

    def add(self, now_s: float, request: InferenceRequest) -> list[Command]:
        """Queue a request; one that can never fit the KV cache ends at once. A live id is ignored (redelivery)."""
        if self.holds(request.task_id):
            return []
        need = self.kv.need(request.prompt_tokens + request.max_tokens)
        if need > self.kv.capacity_tokens:
            detail = f"needs {need} KV tokens, the node holds {self.kv.capacity_tokens}"
            return [TaskDone(request.task_id, "error", detail)]
        self._enqueue(now_s, request)
        return []

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

    def cancel(self, task_id: str) -> list[Command]:
        """End a request now, or when the op that holds it ends."""
        key = self._waiting_keys.get(task_id)
        if key is not None:
            self._remove_waiting(bisect_left(self._waiting, key))
            self._preempted.pop(task_id, None)
            self._blocked = False
            return [TaskDone(task_id, "cancelled")]
        if task_id in self._idle or task_id in self._filling:
            return self._leave(task_id, "cancelled")
        self._running[task_id].cancelled = True
        return []

    # ------------------------------------------------------------- composing ops

    def prefill_claim(self, now_s: float) -> Claim | None:
        """Claim of the next prefill, None when no prompt is begun and nobody waits or can be admitted now."""
        if self._filling:
            running = self._running[next(iter(self._filling))]
            return self._prompt_claim(now_s, self._deadline_s(running.request), running.last_token_s, running.request)
        if self._blocked or not self._waiting or len(self._running) >= self._max_running():
            return None
        deadline_s, _, ready_s, request = self._waiting[next(iter(self._admission_order(now_s)))]
        return self._prompt_claim(now_s, deadline_s, ready_s, request)

    def _prompt_claim(self, now_s: float, deadline_s: float, ready_s: float, request: InferenceRequest) -> Claim:
        if not self._by_deadline:
            return Claim(ready_s, request.arrival_s, _SHORTEST_ALLOWANCE_S)
        if now_s - self._config.max_demotion_s < deadline_s < now_s:
            # Its promise is broken: as urgent as a token that is due just now, not more.
            return Claim(ready_s, now_s - self._config.default_ttft_s, self._config.default_ttft_s)
        return Claim(ready_s, request.arrival_s, max(deadline_s - request.arrival_s, _SHORTEST_ALLOWANCE_S))

    def take_pieces(
        self, now_s: float, version: int, budget_tokens: int, most_tokens: int | None = None
    ) -> list[Piece]:
        """Pieces of prompts for an op, with `budget_tokens` new tokens at most but for references, and with most_tokens
        in their contexts (None: any number): of prompts that are begun, then of those admitted for it."""
        pieces: list[Piece] = []
        for task_id in tuple(self._filling):
            piece = self._next_piece(self._running[task_id], budget_tokens, most_tokens)
            if piece is None:
                break
            del self._filling[task_id]
            pieces.append(piece)
            budget_tokens -= piece.new_tokens
            most_tokens = None if most_tokens is None else most_tokens - self.kv.need(piece.end)
        room = self._config.max_batch - len(pieces)
        if budget_tokens < 1 or room < 1 or (most_tokens is not None and most_tokens < 1):
            return pieces
        for running in self._admit_fitting(now_s, version, budget_tokens, room):
            piece = self._next_piece(running, budget_tokens, most_tokens)
            if piece is None:
                self._filling[running.request.task_id] = None
                continue
            pieces.append(piece)
            budget_tokens -= piece.new_tokens
            most_tokens = None if most_tokens is None else most_tokens - self.kv.need(piece.end)
        return pieces

    def _next_piece(self, running: RunningRequest, budget_tokens: int, most_tokens: int | None) -> Piece | None:
        start = running.filled_tokens
        end = min(running.request.prompt_tokens, start + budget_tokens)
        if most_tokens is not None:
            end = min(end, most_tokens)
        if end <= start:
            return None
        running.filled_tokens = end
        return Piece(running, start, end)

    def take_prompts(self, now_s: float, version: int, most_tokens: int | None = None) -> list[Piece]:
        """Whole prompts for a prefill op, with most_tokens in their KV caches (None: any number); empty when none fits
        (there is no claim then until that changes)."""
        most_tokens = self.kv.capacity_tokens if most_tokens is None else most_tokens
        admitted = self._admit_fitting(
            now_s, version, self._config.max_prefill_tokens, self._config.max_batch, most_tokens
        )
        pieces = []
        for running in admitted:
            pieces.append(Piece(running, running.filled_tokens, running.request.prompt_tokens))
            running.filled_tokens = running.request.prompt_tokens
        return pieces

    def _admit_fitting(
        self, now_s: float, version: int, budget_tokens: int, room: int, most_tokens: int | None = None
    ) -> list[RunningRequest]:
        """Admit the requests of the next prefill op.

        version: weights it will run with. A request that does not fit is passed over at most `max_bypass` times, then
        nobody is admitted before it. most_tokens: what whole prompts take of the KV cache at most; None: they are cut.
        """
        config = self._config
        epoch = version // config.epoch_steps
        self._made_room += self.prefixes.enter(epoch)
        room = min(room, self._max_running() - len(self._running))
        if room < 1:
            return []
        tokens = held_tokens = 0
        chosen: list[int] = []
        continued: set[str] = set()
        passed: list[str] = []
        free_tokens = self.kv.capacity_tokens - self.kv.used_tokens
        for index in self._admission_order(now_s):
            request = self._waiting[index][3]
            need = self.kv.need(self._reservation(request))
            if need > free_tokens:
                passed.append(request.task_id)
                if len(passed) > config.max_bypass or self._must_be_next(passed):
                    break
                continue
            new_tokens = request.prompt_tokens + request.reference_tokens
            if request.session_id not in continued:
                new_tokens -= self._cached_tokens(request, self.prefixes.tokens_of(request.session_id))
            held_tokens += self.kv.need(request.prompt_tokens)
            if (
                chosen
                and most_tokens is not None
                and (tokens + new_tokens > budget_tokens or held_tokens > most_tokens)
            ):
                break
            chosen.append(index)
            continued.add(request.session_id)
            tokens += new_tokens
            free_tokens -= need
            for task_id in passed:
                self._bypassed[task_id] = self._bypassed.get(task_id, 0) + 1
            if len(chosen) >= room or tokens >= budget_tokens or self._must_be_next(passed):
                break
        self._blocked = not chosen
        return self._admit(now_s, chosen, epoch)

    def take_freed(self) -> list[Command]:
        """KV caches to be freed before the composed op runs: kept prefixes that made room for it."""
        freed: list[Command] = [FreeKv(task_id) for task_id in self._made_room]
        self._made_room.clear()
        return freed

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

    # ------------------------------------------------------------- ends of ops

    def complete(self, now_s: float, op: Op, stopped: tuple[str, ...]) -> list[Command]:
        """The op left the last stage: its requests got one token each, but those whose prompt is not at its end; those
        that are finished leave."""
        self._stalled = False
        if op.kind is OpKind.DECODE or op.decodes:
            self._decodes_in_flight -= 1
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
                self._filling[task_id] = None
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
        self._stalled = False
        if op.kind is OpKind.DECODE or op.decodes:
            self._decodes_in_flight -= 1
        commands: list[Command] = []
        for task_id in op.task_ids:
            running = self._running[task_id]
            if running.continued:
                # Later stages have not handed it over.
                commands.append(FreeKv(running.continued))
            commands += self._leave(task_id, "cancelled" if running.cancelled else "error")
        return commands

    def inherit(self, other: "InferenceBatcher") -> None:
        """Take over the kept prefixes of a batcher without requests."""
        self.prefixes = other.prefixes.fork()
        self._made_room = other._made_room.copy()

    def fork(self) -> "InferenceBatcher":
        """An independent copy."""
        twin = InferenceBatcher.__new__(InferenceBatcher)
        twin.__dict__.update(self.__dict__)
        twin.kv = self.kv.fork()
        twin.prefixes = self.prefixes.fork()
        twin._made_room = self._made_room.copy()
        twin._waiting = self._waiting.copy()
        twin._waiting_keys = self._waiting_keys.copy()
        twin._bypassed = self._bypassed.copy()
        twin._running = {task_id: replace(running) for task_id, running in self._running.items()}
        twin._idle = self._idle.copy()
        twin._filling = self._filling.copy()
        twin._preempted = self._preempted.copy()
        return twin

    # ------------------------------------------------------------- internals

    def _max_running(self) -> int:
        return self._config.num_stages * self._config.max_batch

    def _deadline_s(self, request: InferenceRequest) -> float:
        return request.arrival_s + self._config.default_ttft_s if request.deadline_s is None else request.deadline_s

    def _tpot_s(self, request: InferenceRequest) -> float:
        tpot_s = self._config.default_tpot_s if request.tpot_s is None else request.tpot_s
        return max(tpot_s, _SHORTEST_ALLOWANCE_S)

    def _admission_order(self, now_s: float) -> Iterable[int]:
        """Indices of waiting requests: far too late ones, those that can keep their deadline, those just too late."""
        count = len(self._waiting)
        if not self._by_deadline:
            return range(count)
        overdue = bisect_left(self._waiting, (now_s - self._config.max_demotion_s,))
        late = bisect_left(self._waiting, (now_s,), overdue)
        if late == overdue:
            return range(count)
        return chain(range(overdue), range(late, count), range(overdue, late))

    def _must_be_next(self, passed: list[str]) -> bool:
        """Whether one of these requests has been overtaken often enough."""
        return any(self._bypassed.get(task_id, 0) >= self._config.max_bypass for task_id in passed)

    def _admit(self, now_s: float, chosen: list[int], epoch: int) -> list[RunningRequest]:
        admitted = []
        for request in [self._waiting[index][3] for index in chosen]:
            running = RunningRequest(request, self._tpot_s(request), request.prompt_tokens, now_s, epoch=epoch)
            prefix = self.prefixes.take(request.session_id)
            if prefix is not None:
                running.cached_tokens = self._cached_tokens(request, prefix.tokens)
                running.continued = prefix.task_id
            running.filled_tokens = running.cached_tokens
            admitted.append(running)
        for index in sorted(chosen, reverse=True):
            self._remove_waiting(index)
        for running in admitted:
            request = running.request
            self.kv.reserve(request.task_id, self._reservation(request))
            self._running[request.task_id] = running
        self._made_room += self.prefixes.shrink(self.kv.capacity_tokens - self.kv.used_tokens)
        return admitted

    # ------------------------------------------------------------- giving up blocks

    def _reservation(self, request: InferenceRequest) -> int:
        """Tokens that a request is admitted for."""
        config = self._config
        output = request.max_tokens
        if config.expected_output_tokens and self._preempted.get(request.task_id, 0) < config.max_preemptions:
            output = min(output, config.expected_output_tokens)
        return request.prompt_tokens + output

    def _with_room(self) -> tuple[str, ...]:
        """Idle requests that have, or get, a block for their next token, at most `max_batch`. All are looked at: only
        one behind those without room may be the one that can go on."""
        chosen: dict[str, None] = {}
        for task_id in tuple(self._idle):
            if len(chosen) == self._config.max_batch:
                break
            if task_id in self._running and self._make_room(task_id, chosen):
                chosen[task_id] = None
        self._made_room += self.prefixes.shrink(self.kv.capacity_tokens - self.kv.used_tokens)
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
            is_free = later in self._idle or later in self._filling
            if is_free and later not in chosen and self._preempted.get(later, 0) < self._config.max_preemptions:
                return later
        return None

    def _preempt(self, task_id: str) -> None:
        """Take a request's blocks. It waits again, with its output so far behind its prompt."""
        running = self._running.pop(task_id)
        self._idle.pop(task_id, None)
        self._filling.pop(task_id, None)
        self.kv.release(task_id)
        self._made_room.append(task_id)
        self._preempted[task_id] = self._preempted.get(task_id, 0) + 1
        self.preemptions += 1
        request, generated = running.request, running.generated_tokens
        self._enqueue(
            running.last_token_s,
            replace(
                request,
                prompt_tokens=request.prompt_tokens + generated,
                max_tokens=request.max_tokens - generated,
                reference_tokens=0 if generated else request.reference_tokens,
            ),
        )

    def _enqueue(self, now_s: float, request: InferenceRequest) -> None:
        self._arrivals += 1
        key = (self._deadline_s(request) if self._by_deadline else 0.0, self._arrivals)
        insort(self._waiting, (*key, now_s, request))
        self._waiting_keys[request.task_id] = key
        self._blocked = False

    def _cached_tokens(self, request: InferenceRequest, kept_tokens: int) -> int:
        """Prompt tokens that need not be computed: the last one has to be, for it yields the first new token."""
        return min(kept_tokens, request.prompt_tokens - 1)

    def _remove_waiting(self, index: int) -> None:
        task_id = self._waiting.pop(index)[3].task_id
        del self._waiting_keys[task_id]
        self._bypassed.pop(task_id, None)

    def _leave(self, task_id: str, reason: str) -> list[Command]:
        running = self._running.pop(task_id)
        self._idle.pop(task_id, None)
        self._filling.pop(task_id, None)
        self.kv.release(task_id)
        self._preempted.pop(task_id, None)
        self._blocked = self._stalled = False
        freed = [task_id]
        if running.request.session_id and reason in ("stop", "length"):
            freed = self._keep(running)
        return [*(FreeKv(freed_id) for freed_id in freed), TaskDone(task_id, reason)]

    def _keep(self, running: RunningRequest) -> list[str]:
        """Keep the KV cache of a turn that ended: all tokens but the newest, which no op has read yet."""
        request = running.request
        prefix = Prefix(request.task_id, running.context_tokens - 1)
        room_tokens = self.kv.capacity_tokens - self.kv.used_tokens
        return self.prefixes.put(request.session_id, prefix, running.epoch, room_tokens)
