"""Iteration-level (continuous) batching: which requests form the next prefill or decode op.

A batch is composed when stage 0 takes it, not before, so a late request can still join. A request is admitted, that is
its KV cache reserved, when its prefill starts.
"""

import math
from dataclasses import dataclass
from itertools import islice

from services.node_agent.core.running import Claim, Piece, RunningRequest
from services.node_agent.core.running_requests import RunningRequests
from services.node_agent.core.types import Command, FreeKv, InferenceRequest, NodeCoreConfig, Op, TaskDone
from services.node_agent.core.waiting import WaitingRequests


@dataclass(slots=True)
class _Left:
    """What an op may still take: new tokens, and tokens in contexts (None: any number)."""

    new_tokens: int
    context_tokens: int | None

    @property
    def is_nothing(self) -> bool:
        return self.new_tokens < 1 or (self.context_tokens is not None and self.context_tokens < 1)

    def take(self, new_tokens: int, context_tokens: int) -> None:
        self.new_tokens -= new_tokens
        if self.context_tokens is not None:
            self.context_tokens -= context_tokens


class InferenceBatcher:
    """Waiting and running requests of one node."""

    def __init__(self, config: NodeCoreConfig) -> None:
        self._config = config
        self._waiting = WaitingRequests(config)
        self.running = RunningRequests(config)
        # Set when nothing that waits can be admitted: no use in looking again before something arrives or leaves.
        self._blocked = False

    # ------------------------------------------------------------- arrival and cancellation

    @property
    def num_waiting(self) -> int:
        """Requests not admitted yet."""
        return len(self._waiting)

    def task_ids(self) -> tuple[str, ...]:
        """Every live request."""
        return (*self._waiting.task_ids(), *self.running)

    def holds(self, task_id: str) -> bool:
        """Whether this request is live."""
        return task_id in self._waiting or task_id in self.running

    def add(self, now_s: float, request: InferenceRequest) -> list[Command]:
        """Queue a request; one that can never fit the KV cache ends at once. A live id is ignored (redelivery)."""
        if self.holds(request.task_id):
            return []
        kv = self.running.kv
        need = kv.need(request.prompt_tokens + request.max_tokens)
        if need > kv.capacity_tokens:
            detail = f"needs {need} KV tokens, the node holds {kv.capacity_tokens}"
            return [TaskDone(request.task_id, "error", detail)]
        self._waiting.add(now_s, request)
        self._blocked = False
        return []

    def cancel(self, task_id: str) -> list[Command]:
        """End a request now, or when the op that holds it ends."""
        if task_id in self._waiting:
            self._waiting.remove(task_id)
            self.running.forget(task_id)
            self._blocked = False
            return [TaskDone(task_id, "cancelled")]
        return self._left(self.running.cancel(task_id))

    # ------------------------------------------------------------- composing ops

    def prefill_claim(self, now_s: float) -> Claim | None:
        """Claim of the next prefill, None when no prompt is begun and nobody waits or can be admitted now."""
        if self.running.filling:
            running = self.running[next(iter(self.running.filling))]
            return self._waiting.prompt_claim(now_s, running.last_token_s, running.request)
        if self._blocked or not self._waiting or self.running.room < 1:
            return None
        return self._waiting.claim(now_s)

    def take_pieces(
        self, now_s: float, version: int, budget_tokens: int, most_tokens: int | None = None
    ) -> list[Piece]:
        """Pieces of prompts for an op, with `budget_tokens` new tokens at most but for references, and with most_tokens
        in their contexts (None: any number): of prompts that are begun, then of those admitted for it, and the choices
        that share what ends there."""
        left = _Left(budget_tokens, most_tokens)
        pieces = self._pieces(now_s, version, left)
        return pieces + self._sharing(now_s, version, pieces, left.context_tokens)

    def _pieces(self, now_s: float, version: int, left: _Left) -> list[Piece]:
        pieces: list[Piece] = []
        for task_id in tuple(islice(self.running.filling, self._config.max_batch)):
            piece = self._next_piece(self.running[task_id], left)
            if piece is None:
                break
            del self.running.filling[task_id]
            pieces.append(piece)
        room = self._config.max_batch - len(pieces)
        if left.is_nothing or room < 1:
            return pieces
        begun = {piece.running.request.group for piece in pieces}
        for running in self._admit_fitting(now_s, version, left.new_tokens, room, groups=begun):
            piece = self._next_piece(running, left)
            if piece is None:
                self.running.filling[running.request.task_id] = None
            else:
                pieces.append(piece)
        return pieces

    def _next_piece(self, running: RunningRequest, left: _Left) -> Piece | None:
        """As much of a prompt as is left room for, taken from it; None: nothing."""
        start = running.filled_tokens
        end = min(running.request.prompt_tokens, start + left.new_tokens)
        if left.context_tokens is not None:
            end = min(end, left.context_tokens)
        held_tokens = self._held_tokens(running, end)
        if end <= start or (left.context_tokens is not None and held_tokens > left.context_tokens):
            return None
        running.filled_tokens = end
        piece = Piece(running, start, end)
        left.take(piece.new_tokens, held_tokens)
        return piece

    def _held_tokens(self, running: RunningRequest, end: int) -> int:
        """What a prompt computed to `end` takes, in whole blocks, or what it goes on from, if that is longer."""
        return self.running.kv.need(max(end, running.kept_tokens if running.continued else 0))

    def take_prompts(self, now_s: float, version: int, most_tokens: int | None = None) -> list[Piece]:
        """Whole prompts for a prefill op, with most_tokens in their KV caches (None: any number); empty when none fits
        (there is no claim then until that changes)."""
        bound = math.inf if most_tokens is None else most_tokens
        admitted = self._admit_fitting(
            now_s, version, self._config.max_prefill_tokens, self._config.max_batch, bound, groups=set()
        )
        pieces = []
        for running in admitted:
            pieces.append(Piece(running, running.filled_tokens, running.request.prompt_tokens))
            running.filled_tokens = running.request.prompt_tokens
            bound -= self._held_tokens(running, running.filled_tokens)
        return pieces + self._sharing(now_s, version, pieces, bound)

    def _sharing(self, now_s: float, version: int, pieces: list[Piece], most_tokens: float | None) -> list[Piece]:
        """Admit waiting choices of the prompts that end in an op: they get copies of what it computes, and a token
        each. Those for which there is no room are computed later, again together."""
        running = self.running
        room = min(self._config.max_batch - len(pieces), running.room)
        free_tokens = running.kv.capacity_tokens - running.kv.used_tokens
        room_tokens = math.inf if most_tokens is None else most_tokens
        chosen: dict[str, InferenceRequest] = {}
        leaders: list[str] = []
        for first in [piece.running.request for piece in pieces if piece.is_last]:
            for request in self._waiting.choices(first.group):
                need, held = running.kv.need(running.reservation(request)), running.kv.need(request.prompt_tokens)
                fits = len(chosen) < room and need <= free_tokens and held <= room_tokens
                if not fits or request.prompt_tokens != first.prompt_tokens or request.reference_tokens:
                    # It has waited for this one to end.
                    self._blocked = False
                elif request.task_id not in chosen:
                    chosen[request.task_id] = request
                    leaders.append(first.task_id)
                    free_tokens -= need
                    room_tokens -= held
        for task_id in chosen:
            self._waiting.remove(task_id)
        shared = []
        epoch = version // self._config.epoch_steps
        for admitted, leader in zip(running.admit(now_s, chosen.values(), epoch), leaders, strict=True):
            admitted.filled_tokens = end = admitted.request.prompt_tokens
            shared.append(Piece(admitted, end, end, leader))
        return shared

    def _admit_fitting(
        self,
        now_s: float,
        version: int,
        budget_tokens: int,
        room: int,
        most_tokens: float | None = None,
        *,
        groups: set[str],
    ) -> list[RunningRequest]:
        """Admit the requests of the next prefill op.

        version: weights it will run with. A request that does not fit is passed over at most `max_bypass` times, then
        nobody is admitted before it. most_tokens: what whole prompts take of the KV cache at most; None: they are cut.
        groups: prompts in the op already; those in it afterwards are added.
        """
        config, admitted = self._config, self.running
        epoch = version // config.epoch_steps
        admitted.made_room += admitted.prefixes.enter(epoch)
        room = min(room, admitted.room)
        if room < 1:
            return []
        tokens = held_tokens = 0
        chosen: list[int] = []
        continued: set[str] = set()
        passed: list[str] = []
        free_tokens = admitted.kv.capacity_tokens - admitted.kv.used_tokens
        for index in self._waiting.admission_order(now_s):
            request = self._waiting[index]
            if request.choice_of and (request.choice_of in groups or admitted.is_computing(request.choice_of)):
                continue  # it shares what is computed, when that ends
            need = admitted.kv.need(admitted.reservation(request))
            if need > free_tokens:
                passed.append(request.task_id)
                if len(passed) > config.max_bypass or self._waiting.must_be_next(passed):
                    break
                continue
            new_tokens = request.prompt_tokens + request.reference_tokens
            kept_tokens = 0
            if request.session_id not in continued:
                kept_tokens = admitted.prefixes.tokens_of(request.session_id)
                new_tokens -= admitted.cached_tokens(request, kept_tokens)
            held_tokens += admitted.kv.need(max(request.prompt_tokens, kept_tokens))
            if (
                chosen
                and most_tokens is not None
                and (tokens + new_tokens > budget_tokens or held_tokens > most_tokens)
            ):
                break
            chosen.append(index)
            continued.add(request.session_id)
            groups.add(request.group)
            tokens += new_tokens
            free_tokens -= need
            self._waiting.overtaken(passed)
            if len(chosen) >= room or tokens >= budget_tokens or self._waiting.must_be_next(passed):
                break
        self._blocked = not chosen
        requests = [self._waiting[index] for index in chosen]
        for request in requests:
            self._waiting.remove(request.task_id)
        return admitted.admit(now_s, requests, epoch)

    def take_decode(self, most_tokens: int | None = None) -> tuple[tuple[str, ...], int]:
        """See RunningRequests.take_decode; those that gave up their blocks for it wait again."""
        taken = self.running.take_decode(most_tokens)
        for ready_s, request in self.running.take_given_up():
            self._waiting.add(ready_s, request)
            self._blocked = False
        return taken

    def take_freed(self) -> list[Command]:
        """KV caches to be freed before the composed op runs: they made room for it."""
        if not self.running.made_room:
            return []  # as after nearly every operation
        freed: list[Command] = [FreeKv(task_id) for task_id in self.running.made_room]
        self.running.made_room.clear()
        return freed

    # ------------------------------------------------------------- ends of ops

    def complete(self, now_s: float, op: Op, stopped: tuple[str, ...]) -> list[Command]:
        """The op left the last stage."""
        return self._left(self.running.complete(now_s, op, stopped))

    def fail(self, op: Op) -> list[Command]:
        """The op raised: its requests end."""
        return self._left(self.running.fail(op))

    def _left(self, commands: list[Command]) -> list[Command]:
        """What comes of it when requests may have left."""
        if commands:
            self._blocked = False
        return commands

    def inherit(self, other: "InferenceBatcher") -> None:
        """Take over the kept prefixes of a batcher without requests."""
        self.running.inherit(other.running)

    def fork(self) -> "InferenceBatcher":
        """An independent copy."""
        twin = InferenceBatcher.__new__(InferenceBatcher)
        twin.__dict__.update(self.__dict__)
        twin._waiting = self._waiting.fork()
        twin.running = self.running.fork()
        return twin
