"""Sessions with node agents: who is there, what they report, what they are told."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass

import structlog

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.v1 import types_pb2
from services.runtime.clock import Clock
from services.scheduler.adapters import AdapterDesk
from services.scheduler.checkpoints import CheckpointDesk
from services.scheduler.convert import ops_from_traces, spec_from_hello
from services.scheduler.core.events import AdaptersTold, NodeDraining, SnapshotReady, SyncEnded, WeightsTold
from services.scheduler.core.node_spec import NodeSpec, QueueOrder
from services.scheduler.core.tasks import SloTarget
from services.scheduler.inbox import Ended, Inbox, NodeArrived, NodeGone, Told, Traced, Trained
from services.scheduler.outbox import Outbox
from services.scheduler.profiles import ProfileSource
from services.scheduler.refusals import unavailable

_log = structlog.get_logger()

_MAX_ID_CHARS = 128
#: Times of optimizer steps that differ by less count as one.
_SAME_TIME_S = 0.01


@dataclass(slots=True, eq=False)
class _Connection:
    """One stream of a node."""

    hello: pb.NodeHello
    outbox: Outbox[pb.NodeSessionResponse]
    #: Smallest seen difference between our clock at receipt and the node's at sending: offset plus shortest delay.
    offset_s: float
    #: What the core was told last of the node's weights: their step, and when they were trained, on our clock.
    weights: tuple[int, float | None] | None = None
    is_draining: bool = False
    lost_reason: str = ""
    #: Since when its next message is awaited, on the event loop's clock; infinity while one is being taken in.
    silent_since_s: float = math.inf


class NodeRegistry:
    """Every connected node. A node that connects again takes over its session; the older stream is closed."""

    def __init__(
        self,
        *,
        inbox: Inbox,
        profiles: ProfileSource,
        clock: Clock,
        queue_order: QueueOrder,
        default_slo: SloTarget,
        lease_s: float,
        max_queued_messages: int,
        checkpoints: CheckpointDesk | None = None,
        adapters: AdapterDesk | None = None,
    ) -> None:
        self._inbox = inbox
        self._profiles = profiles
        self._clock = clock
        self._token = 0
        self._queue_order = queue_order
        self._default_slo = types_pb2.Slo(ttft_s=default_slo.ttft_s, tpot_s=default_slo.tpot_s)
        self._lease_s = lease_s
        self._max_queued_messages = max_queued_messages
        self._checkpoints = checkpoints or CheckpointDesk()
        self.adapters = adapters or AdapterDesk()
        self._connections: dict[str, _Connection] = {}
        #: Nodes that said hello and have no latency models yet.
        self._joining: set[str] = set()
        self._closing = False
        #: Nodes that said they keep checkpoints when they last joined.
        self._keepers: set[str] = set()

    # ------------------------------------------------------------- asked by the rest of the scheduler

    @property
    def models(self) -> set[str]:
        """Models that connected nodes serve."""
        return {connection.hello.model for connection in self._connections.values()}

    def projections(self, model: str) -> frozenset[str]:
        """What LoRA can adapt on all nodes that serve the model ("": any) and tell; empty: none of them tells."""
        hellos = [connection.hello for connection in self._connections.values()]
        told = [hello.projections for hello in hellos if hello.projections and model in ("", hello.model)]
        return frozenset(told[0]).intersection(*told[1:]) if told else frozenset()

    @property
    def joining(self) -> list[str]:
        """Nodes that are being profiled."""
        return sorted(self._joining)

    def is_connected(self, node_id: str) -> bool:
        """Whether the node has an open session."""
        return node_id in self._connections

    def address(self, node_id: str) -> str:
        """host:port of a connected node's gRPC server, else empty."""
        connection = self._connections.get(node_id)
        return "" if connection is None else connection.hello.address

    def send(self, node_id: str, message: pb.NodeSessionResponse) -> bool:
        """Tell a node something. False when it is not connected."""
        connection = self._connections.get(node_id)
        self._checkpoints.lineage.sent(node_id, message)
        return connection is not None and connection.outbox.send(message)

    def lead(self, token: int) -> None:
        """From now on nodes may join, under this fencing token."""
        self._token = token

    def close(self) -> None:
        """End every session because this scheduler stops; the nodes keep their work."""
        self._closing = True
        for connection in self._connections.values():
            connection.outbox.close("the scheduler stops")

    # ------------------------------------------------------------- a session

    async def session(self, requests: AsyncIterator[pb.NodeSessionRequest]) -> AsyncGenerator[pb.NodeSessionResponse]:
        """One stream of a node, from its hello to its end.

        Raises INVALID_REQUEST without a proper hello, the profiler's error without a profile, UNAVAILABLE after the
        lease ran out or when the scheduler starts or stops, CONFLICT when the node has opened another stream.
        """
        if not self._token:
            raise unavailable("the scheduler is starting")
        connection, spec = await self._prepare(requests)
        node_id = connection.hello.node_id
        earlier = self._connections.get(node_id)
        self._connections[node_id] = connection
        (self._keepers.add if connection.hello.keeps_checkpoints else self._keepers.discard)(node_id)
        self._checkpoints.joined(connection.hello)
        self.adapters.joined(node_id, connection.hello.model)
        if earlier is not None:
            earlier.outbox.close("taken over")
        _log.info("node joined", node=node_id, address=connection.hello.address, again=earlier is not None)
        reader = asyncio.create_task(self._read(connection, spec, requests))
        watcher = asyncio.create_task(self._watch_lease(connection))
        try:
            async for message in connection.outbox.messages():
                yield message
            if self._connections.get(node_id) is not connection:
                raise LemixError(ErrorCode.CONFLICT, f"node {node_id} has opened another session")
            raise unavailable(connection.lost_reason or connection.outbox.closed_reason)
        finally:
            reader.cancel()
            watcher.cancel()
            await self._leave(connection)
            results = await asyncio.gather(reader, watcher, return_exceptions=True)
            if isinstance(results[0], Exception):
                raise results[0]

    def keeps_checkpoints(self, node_id: str) -> bool:
        """Whether the node, connected or lost, saves checkpoints that it can come back from."""
        return node_id in self._keepers

    async def _prepare(self, requests: AsyncIterator[pb.NodeSessionRequest]) -> tuple[_Connection, NodeSpec]:
        hello = await self._hello(requests)
        connection = _Connection(
            hello, Outbox(self._max_queued_messages), self._clock.monotonic_s() - hello.sent_monotonic_s
        )
        self._joining.add(hello.node_id)
        try:
            latency = await self._profiles.latency(hello)
            spec = spec_from_hello(hello, latency, connection.offset_s)
        except ValueError as error:
            raise LemixError(ErrorCode.CONFLICT, str(error)) from error
        finally:
            self._joining.discard(hello.node_id)
        return connection, spec

    async def _hello(self, requests: AsyncIterator[pb.NodeSessionRequest]) -> pb.NodeHello:
        try:
            async with asyncio.timeout(self._lease_s):
                first = await anext(requests, None)
        except TimeoutError:
            first = None
        if first is None or not first.HasField("hello"):
            raise LemixError(ErrorCode.INVALID_REQUEST, "a session begins with a hello", param="hello")
        hello = first.hello
        if not 0 < len(hello.node_id) <= _MAX_ID_CHARS:
            message = f"node_id must have 1 to {_MAX_ID_CHARS} characters"
            raise LemixError(ErrorCode.INVALID_REQUEST, message, param="hello.node_id")
        if not hello.address:
            raise LemixError(ErrorCode.INVALID_REQUEST, "address is missing", param="hello.address")
        return hello

    async def _read(
        self, connection: _Connection, spec: NodeSpec, requests: AsyncIterator[pb.NodeSessionRequest]
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            await self._inbox.put(NodeArrived(spec))
            await self._observe_adapters(connection, connection.hello)
            welcome = pb.NodeWelcome(
                fencing_token=self._token,
                queue_order=self._queue_order.value,
                lease_s=self._lease_s,
                default_slo=self._default_slo,
            )
            connection.outbox.send(pb.NodeSessionResponse(welcome=welcome))
            connection.silent_since_s = loop.time()
            async for message in requests:
                connection.silent_since_s = math.inf
                await self._take(connection, message)
                connection.silent_since_s = loop.time()
        finally:
            self._lose(connection, "its stream ended")

    async def _watch_lease(self, connection: _Connection) -> None:
        """End the session of a node that is silent for too long. One timer per lease, none per message."""
        loop = asyncio.get_running_loop()
        while (left_s := connection.silent_since_s + self._lease_s - loop.time()) > 0.0:  # noqa: ASYNC110  it moves
            await asyncio.sleep(min(left_s, self._lease_s))
        self._lose(connection, f"no sign of life for {self._lease_s:g} s")

    def _lose(self, connection: _Connection, reason: str) -> None:
        connection.lost_reason = connection.lost_reason or reason
        connection.outbox.close(reason)

    async def _leave(self, connection: _Connection) -> None:
        node_id = connection.hello.node_id
        if self._connections.get(node_id) is not connection:
            return  # taken over
        del self._connections[node_id]
        if self._closing:
            return
        reason = connection.lost_reason or connection.outbox.closed_reason or "its stream was cut"
        _log.warning("node lost", node=node_id, reason=reason)
        self._checkpoints.left(node_id)
        self.adapters.left(node_id)
        await self._inbox.put(NodeGone(node_id, reason, may_return=self.keeps_checkpoints(node_id)))

    # ------------------------------------------------------------- reports

    async def _take(self, connection: _Connection, message: pb.NodeSessionRequest) -> None:
        if message.HasField("traces"):
            node_id = connection.hello.node_id
            self._inbox.put_trace(Traced(ops_from_traces(node_id, message.traces.ops, connection.offset_s)))
        match message.WhichOneof("message"):
            case None if message.HasField("traces"):
                pass
            case "heartbeat":
                self._observe_clock(connection, message.heartbeat.sent_monotonic_s)
                await self._observe_weights(connection, message.heartbeat)
                await self._observe_adapters(connection, message.heartbeat)
                if message.heartbeat.draining and not connection.is_draining:
                    connection.is_draining = True
                    _log.info("node drains", node=connection.hello.node_id)
                    await self._inbox.put(Told(NodeDraining(connection.hello.node_id)))
            case "outcome":
                if message.outcome.HasField("training") and not message.outcome.training.HasField("error"):
                    self._checkpoints.lineage.trained(connection.hello.node_id)
                await self._inbox.put(Ended(message.outcome))
            case "trained":
                self._checkpoints.lineage.trained(connection.hello.node_id)
                await self._inbox.put(Trained(message.trained))
            case "checkpoint":
                self._checkpoints.reported(connection.hello.node_id, message.checkpoint)
            case "evaluation":
                self._checkpoints.evaluated(message.evaluation)
            case "sync_finished":
                self._checkpoints.sync_finished(connection.hello.node_id, message.sync_finished)
                await self._inbox.put(Told(_sync_event(connection.hello.node_id, message.sync_finished)))
            case other:
                raise LemixError(ErrorCode.INVALID_REQUEST, f"unexpected message {other}")

    def _observe_clock(self, connection: _Connection, sent_monotonic_s: float) -> None:
        connection.offset_s = min(connection.offset_s, self._clock.monotonic_s() - sent_monotonic_s)

    async def _observe_adapters(self, connection: _Connection, told: pb.NodeHello | pb.NodeHeartbeat) -> None:
        node_id = connection.hello.node_id
        if self._connections.get(node_id) is not connection:
            return  # taken over
        serving = await self.adapters.told(node_id, told.adapters, weights_changed=told.weights_changed)
        if serving is not None:
            await self._inbox.put(Told(AdaptersTold(node_id, serving)))

    async def _observe_weights(self, connection: _Connection, heartbeat: pb.NodeHeartbeat) -> None:
        """Tell the core when there is news: the time of the newest step wavers with the estimate of the clock."""
        trained_s = None
        if heartbeat.HasField("weights_age_s"):
            trained_s = heartbeat.sent_monotonic_s + connection.offset_s - heartbeat.weights_age_s
        if connection.weights is not None:
            step, known_s = connection.weights
            is_same_time = trained_s == known_s or (
                trained_s is not None and known_s is not None and abs(trained_s - known_s) < _SAME_TIME_S
            )
            if step == heartbeat.weight_step and is_same_time:
                return
        connection.weights = heartbeat.weight_step, trained_s
        await self._inbox.put(Told(WeightsTold(connection.hello.node_id, heartbeat.weight_step, trained_s)))


def _sync_event(node_id: str, finished: pb.SyncFinished) -> SnapshotReady | SyncEnded:
    if finished.HasField("error"):
        _log.warning("synchronisation failed", node=node_id, sync=finished.sync_id, error=finished.error.message)
        return SyncEnded(finished.sync_id, node_id, ok=False)
    if finished.snapshot_only:
        return SnapshotReady(finished.sync_id, node_id)
    return SyncEnded(finished.sync_id, node_id, ok=True, weight_step=finished.weight_step)
