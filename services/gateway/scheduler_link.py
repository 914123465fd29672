"""The gateway's one long-lived session with the scheduler: submits, cancels, and what becomes of them."""

import asyncio
from collections.abc import Iterable, Sequence

import grpc.aio
import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import scheduler_service_pb2_grpc as pb_grpc
from lemix.internal.v1 import work_pb2
from services.gateway.pending import PendingRequest, Stage
from services.gateway.reconnecting import ReconnectingStream
from services.gateway.token_streams import TokenStreams

_log = structlog.get_logger()

_RETRY_AFTER_S = 1.0
#: The cancellation of an earlier attempt under way, and one that a node remembered, can each end a request once.
_MAX_RESTARTS = 2


class SchedulerLink:
    """Tracks every request between submit and end.

    A lost session loses nothing: submits are idempotent, so each unfinished request is submitted again on the next one
    and the scheduler answers with where it stands. Cancels whose effect was not seen are told again.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        gateway_id: str,
        streams: TokenStreams,
        *,
        max_requests: int,
        max_backoff_s: float = 2.0,
    ) -> None:
        """max_requests: most requests tracked at once, and most messages queued beyond that."""
        self._gateway_id = gateway_id
        self._streams = streams
        self._max_requests = max_requests
        self._pending: dict[str, PendingRequest] = {}
        #: Cancels whose effect the scheduler has not told: they may have been lost with a session.
        self._cancels: dict[str, None] = {}
        self._connected = asyncio.Event()
        stub = pb_grpc.SchedulerServiceStub(channel)
        self._session: ReconnectingStream[pb.GatewaySessionRequest, pb.GatewaySessionResponse] = ReconnectingStream(
            "scheduler session",
            lambda: stub.GatewaySession(),
            greeting=self._greeting,
            receive=self._receive,
            on_lost=self._on_lost,
            max_backoff_s=max_backoff_s,
        )

    @property
    def connected(self) -> bool:
        """Whether the scheduler has welcomed this session."""
        return self._connected.is_set()

    @property
    def num_pending(self) -> int:
        """Requests submitted and not released."""
        return len(self._pending)

    async def run(self) -> None:
        """Keep the session open until cancelled."""
        await self._session.run()

    async def wait_connected(self) -> None:
        """Return when the session stands."""
        await self._connected.wait()

    def submit(self, requests: Sequence[PendingRequest]) -> None:
        """Hand requests over, all or none. Release each with `release`, whatever happens.

        Raises UNAVAILABLE without a session, OVERLOADED at the bound, CONFLICT when an id is in flight here.
        """
        if not self.connected:
            raise LemixError(
                ErrorCode.UNAVAILABLE, "the scheduler is not reachable right now", retry_after_s=_RETRY_AFTER_S
            )
        for pending in requests:
            if pending.request_id in self._pending:
                raise LemixError(
                    ErrorCode.CONFLICT,
                    f"request {pending.request_id} is already in progress",
                    param="request_id",
                    retry_after_s=_RETRY_AFTER_S,
                )
        num_pending = len(self._pending) + len(requests)
        if num_pending > self._max_requests or self._session.backlog >= 2 * self._max_requests:
            raise LemixError(
                ErrorCode.OVERLOADED,
                f"{self._max_requests} requests are in progress already",
                retry_after_s=_RETRY_AFTER_S,
            )
        for pending in requests:
            self._pending[pending.request_id] = pending
            self._cancels.pop(pending.request_id, None)
            self._session.send(_submit(pending))

    def cancel(self, pending: PendingRequest) -> None:
        """Tell the scheduler that nobody waits for this request. Does nothing when it has ended or knows already."""
        if pending.finished or pending.cancel_sent or pending.request_id not in self._pending:
            return
        pending.cancel_sent = True
        self._cancels[pending.request_id] = None
        while len(self._cancels) > self._max_requests:
            del self._cancels[next(iter(self._cancels))]
        if self.connected:
            self._session.send(_cancel(pending.request_id))

    def release(self, pending: PendingRequest) -> None:
        """Stop tracking a request."""
        if self._pending.get(pending.request_id) is pending:
            del self._pending[pending.request_id]
        self._streams.detach(pending.request_id)

    def _greeting(self) -> Iterable[pb.GatewaySessionRequest]:
        yield pb.GatewaySessionRequest(hello=pb.GatewayHello(gateway_id=self._gateway_id))
        for pending in self._pending.values():
            if not (pending.finished or pending.cancel_sent):
                yield _submit(pending)

    def _on_lost(self, unsent: list[pb.GatewaySessionRequest]) -> None:
        self._connected.clear()
        self._cancels.update((message.cancel.request_id, None) for message in unsent if message.HasField("cancel"))

    def _on_welcome(self) -> None:
        self._connected.set()
        # Once more each, and only once: the scheduler is silent about a cancel of what had ended.
        carried, self._cancels = self._cancels, {}
        for request_id in carried:
            self._session.send(_cancel(request_id))
        _log.info("scheduler session open", gateway_id=self._gateway_id)

    def _receive(self, message: pb.GatewaySessionResponse) -> None:
        kind = message.WhichOneof("message")
        if kind == "welcome":
            self._on_welcome()
            return
        if kind in ("rejected", "finished"):
            self._cancels.pop(message.request_id, None)
        pending = self._pending.get(message.request_id)
        if pending is None:
            return  # released meanwhile
        if kind == "accepted":
            pending.on_accepted()
        elif kind == "assigned":
            pending.on_assigned(message.assigned.node_id, message.assigned.node_address)
            if not pending.finished:
                self._streams.attach(pending)
        elif kind == "rejected":
            self._on_rejected(pending, LemixError.from_proto(message.rejected))
        elif kind == "finished":
            self._on_finished(pending, message.finished)

    def _on_rejected(self, pending: PendingRequest, error: LemixError) -> None:
        """A request that was accepted is durable: when the scheduler cannot say where it stands, it goes on all the
        same, and is asked for again until its deadline."""
        if error.code is not ErrorCode.UNAVAILABLE or pending.stage is Stage.SUBMITTED:
            pending.on_failed(error)
            return
        delay_s = error.retry_after_s or _RETRY_AFTER_S
        asyncio.get_running_loop().call_later(delay_s, self._ask_again, pending)

    def _ask_again(self, pending: PendingRequest) -> None:
        is_wanted = self._pending.get(pending.request_id) is pending and not (pending.finished or pending.cancel_sent)
        if is_wanted and self.connected:  # else the next session's greeting asks
            self._session.send(_submit(pending))

    def _on_finished(self, pending: PendingRequest, outcome: work_pb2.InferenceOutcome) -> None:
        if pending.is_foreign_cancel(outcome) and pending.num_restarts < _MAX_RESTARTS:
            pending.on_restart()
            self._session.send(_submit(pending))
        else:
            pending.on_finished(outcome)


def _submit(pending: PendingRequest) -> pb.GatewaySessionRequest:
    return pb.GatewaySessionRequest(submit=pb.SubmitInference(request_id=pending.request_id, work=pending.work))


def _cancel(request_id: str) -> pb.GatewaySessionRequest:
    return pb.GatewaySessionRequest(cancel=pb.CancelInference(request_id=request_id))
