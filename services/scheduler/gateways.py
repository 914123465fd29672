"""Sessions with gateways: requests come in, what becomes of them goes back."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.ledger import TaskRecord, TaskState
from services.scheduler.core.tasks import SloTarget
from services.scheduler.guard import LedgerGuard
from services.scheduler.inbox import CancelRequested, Inbox
from services.scheduler.nodes import NodeRegistry
from services.scheduler.outbox import Outbox
from services.scheduler.refusals import unavailable

_log = structlog.get_logger()

_HELLO_TIMEOUT_S = 10.0
_MAX_ID_CHARS = 128
#: A client's id, and the number of one of its choices.
_MAX_REQUEST_ID_CHARS = 132
#: Submits and cancels of one gateway in progress at once.
_MAX_CONCURRENT = 64
#: Requests whose gateway is remembered; the oldest are forgotten, and then only a repeated submit finds them.
_MAX_ROUTES = 200_000


@dataclass(slots=True, eq=False)
class _Session:
    gateway_id: str
    outbox: Outbox[pb.GatewaySessionResponse]
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_MAX_CONCURRENT))
    #: Submits in progress: a cancel waits for its own.
    submits: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    running: set[asyncio.Task[None]] = field(default_factory=set)


class GatewayRegistry:
    """Every connected gateway. News of a request go to the gateway that asked for it last.

    The end of a gateway's stream cancels nothing: it comes back and submits what it still waits for.
    """

    def __init__(
        self,
        *,
        inbox: Inbox,
        guard: LedgerGuard,
        nodes: NodeRegistry,
        default_slo: SloTarget,
        max_queued_messages: int,
    ) -> None:
        self._inbox = inbox
        self._guard = guard
        self._nodes = nodes
        self._default_slo = default_slo
        self._max_queued_messages = max_queued_messages
        self._sessions: dict[str, _Session] = {}
        self._routes: OrderedDict[str, str] = OrderedDict()
        self._closing = False

    # ------------------------------------------------------------- news for gateways

    def assigned(self, request_id: str, node_id: str) -> None:
        """The request went to a node."""
        address = self._nodes.address(node_id)
        if address:  # a node that has not come back yet: told when it does
            news = pb.InferenceAssigned(node_id=node_id, node_address=address)
            self._notify(request_id, pb.GatewaySessionResponse(request_id=request_id, assigned=news))

    def rejected(self, request_id: str, error: LemixError) -> None:
        """The request will not run."""
        self._notify(request_id, pb.GatewaySessionResponse(request_id=request_id, rejected=error.to_proto()))
        self._routes.pop(request_id, None)

    def finished(self, request_id: str, outcome: work_pb2.InferenceOutcome) -> None:
        """The request has ended. The node streams the same; this reaches a gateway whose node is gone, too."""
        self._notify(request_id, pb.GatewaySessionResponse(request_id=request_id, finished=outcome))
        self._routes.pop(request_id, None)

    def close(self) -> None:
        """End every session because this scheduler stops."""
        self._closing = True
        for session in self._sessions.values():
            session.outbox.close("the scheduler stops")

    def _notify(self, request_id: str, message: pb.GatewaySessionResponse) -> None:
        session = self._sessions.get(self._routes.get(request_id, ""))
        if session is not None:
            session.outbox.send(message)

    # ------------------------------------------------------------- a session

    async def session(
        self, requests: AsyncIterator[pb.GatewaySessionRequest]
    ) -> AsyncGenerator[pb.GatewaySessionResponse]:
        """One stream of a gateway.

        Raises INVALID_REQUEST without a hello, CONFLICT when the gateway opened another stream, OVERLOADED when it
        does not read its messages, UNAVAILABLE when the scheduler stops.
        """
        session = await self._open(requests)
        reader = asyncio.create_task(self._read(session, requests))
        try:
            async for message in session.outbox.messages():
                yield message
            if self._closing:
                raise unavailable("the scheduler stops")
            if not reader.done():
                code = ErrorCode.CONFLICT if self._is_replaced(session) else ErrorCode.OVERLOADED
                raise LemixError(code, f"session closed: {session.outbox.closed_reason}")
        finally:
            if not self._is_replaced(session):
                del self._sessions[session.gateway_id]
            tasks = [reader, *session.running]
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            if isinstance(results[0], Exception):
                raise results[0]

    def _is_replaced(self, session: _Session) -> bool:
        return self._sessions.get(session.gateway_id) is not session

    async def _open(self, requests: AsyncIterator[pb.GatewaySessionRequest]) -> _Session:
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                first = await anext(requests, None)
        except TimeoutError:
            first = None
        if first is None or not 0 < len(first.hello.gateway_id) <= _MAX_ID_CHARS:
            raise LemixError(ErrorCode.INVALID_REQUEST, "a session begins with a hello that names the gateway")
        session = _Session(first.hello.gateway_id, Outbox(self._max_queued_messages))
        earlier = self._sessions.get(session.gateway_id)
        self._sessions[session.gateway_id] = session
        if earlier is not None:
            earlier.outbox.close("the gateway has opened another session")
        slo = types_pb2.Slo(ttft_s=self._default_slo.ttft_s, tpot_s=self._default_slo.tpot_s)
        session.outbox.send(pb.GatewaySessionResponse(welcome=pb.GatewayWelcome(default_slo=slo)))
        return session

    async def _read(self, session: _Session, requests: AsyncIterator[pb.GatewaySessionRequest]) -> None:
        try:
            async for message in requests:
                match message.WhichOneof("message"):
                    case "submit":
                        task = await self._start(session, self._submit(session, message.submit))
                        self._remember(session, message.submit.request_id, task)
                    case "cancel":
                        await self._start(session, self._cancel(session, message.cancel.request_id))
                    case other:
                        raise LemixError(ErrorCode.INVALID_REQUEST, f"unexpected message {other}")
        finally:
            session.outbox.close("its stream ended")

    async def _start(self, session: _Session, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run beside others of this gateway, within its bound."""
        await session.slots.acquire()
        task = asyncio.create_task(work)
        session.running.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            session.slots.release()
            session.running.discard(done)
            if not done.cancelled() and done.exception() is not None:
                _log.error("request handling failed", exc_info=done.exception())

        task.add_done_callback(ended)
        return task

    def _remember(self, session: _Session, request_id: str, task: asyncio.Task[None]) -> None:
        session.submits[request_id] = task

        def forget(done: asyncio.Task[None]) -> None:
            if session.submits.get(request_id) is done:
                del session.submits[request_id]

        task.add_done_callback(forget)

    # ------------------------------------------------------------- requests

    async def _submit(self, session: _Session, submit: pb.SubmitInference) -> None:
        request_id = submit.request_id
        # Before it is accepted: the driver may tell about it at once.
        self._routes[request_id] = session.gateway_id
        self._routes.move_to_end(request_id)
        while len(self._routes) > _MAX_ROUTES:
            self._routes.popitem(last=False)
        try:
            _check(submit)
            item = work_pb2.WorkItem(task_id=request_id, inference=submit.work)
            record = await self._guard.once(lambda: self._guard.ledger.submit(item))
        except LemixError as error:
            self.rejected(request_id, error)
            return
        self._answer(request_id, record)

    def _answer(self, request_id: str, record: TaskRecord | None) -> None:
        if record is not None and record.state is TaskState.DONE:
            if record.outcome is not None and record.outcome.HasField("inference"):
                self.finished(request_id, record.outcome.inference)
            else:
                self.rejected(request_id, LemixError(ErrorCode.CONFLICT, "this id names no inference request"))
            return
        self._notify(request_id, pb.GatewaySessionResponse(request_id=request_id, accepted=pb.InferenceAccepted()))
        if record is not None and record.state is TaskState.ASSIGNED:
            self.assigned(request_id, record.node_id)

    async def _cancel(self, session: _Session, request_id: str) -> None:
        submit = session.submits.get(request_id)
        if submit is not None:
            await asyncio.wait([submit])
        await self._inbox.put(CancelRequested(request_id))


def _check(submit: pb.SubmitInference) -> None:
    if not 0 < len(submit.request_id) <= _MAX_REQUEST_ID_CHARS:
        message = f"request_id must have 1 to {_MAX_REQUEST_ID_CHARS} characters"
        raise LemixError(ErrorCode.INVALID_REQUEST, message, param="request_id")
    if not submit.work.prompt_token_ids:
        raise LemixError(ErrorCode.INVALID_REQUEST, "the prompt is empty", param="prompt")
    if submit.work.sampling.max_tokens < 1:
        raise LemixError(ErrorCode.INVALID_REQUEST, "max_tokens must be at least 1", param="max_tokens")
