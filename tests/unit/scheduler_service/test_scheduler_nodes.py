"""Sessions with nodes, without gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import profile_pb2
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.v1 import types_pb2
from services.latency import LatencyModel, NodeLatency, OpKind
from services.runtime.clock import FakeClock
from services.scheduler.core.events import AdaptersTold, SyncEnded, WeightsTold
from services.scheduler.core.node_spec import QueueOrder
from services.scheduler.core.tasks import SloTarget
from services.scheduler.inbox import Inbox, NodeArrived, NodeGone, Told, Traced
from services.scheduler.nodes import NodeRegistry


class FixedProfile:
    """The same models for every node."""

    async def latency(self, hello: pb.NodeHello) -> NodeLatency:
        del hello
        return NodeLatency(({OpKind.PREFILL: LatencyModel("constant", (0.1,))},))

    async def close(self) -> None:
        """Nothing to release."""


class Stream:
    """The requests of one node, fed by the test."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[pb.NodeSessionRequest | None] = asyncio.Queue()

    def put(self, message: pb.NodeSessionRequest | None) -> None:
        self._queue.put_nowait(message)

    async def __aiter__(self) -> AsyncIterator[pb.NodeSessionRequest]:
        while (message := await self._queue.get()) is not None:
            yield message


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(1000.0)


@pytest.fixture
def inbox() -> Inbox:
    return Inbox(64)


@pytest.fixture
def registry(clock: FakeClock, inbox: Inbox) -> NodeRegistry:
    registry = NodeRegistry(
        inbox=inbox,
        profiles=FixedProfile(),
        clock=clock,
        queue_order=QueueOrder.FIFO,
        default_slo=SloTarget(ttft_s=0.4),
        lease_s=5.0,
        max_queued_messages=2,
    )
    registry.lead(7)
    return registry


def hello(sent_s: float = 0.0) -> pb.NodeSessionRequest:
    message = pb.NodeHello(node_id="n", address="h:1", num_stages=1, sent_monotonic_s=sent_s, model="m")
    return pb.NodeSessionRequest(hello=message)


def beat(sent_s: float) -> pb.NodeSessionRequest:
    return pb.NodeSessionRequest(heartbeat=pb.NodeHeartbeat(sent_monotonic_s=sent_s))


def trace(begin_s: float) -> pb.NodeSessionRequest:
    op = pb.OpTrace(op=profile_pb2.OP_KIND_DECODE, begin_monotonic_s=begin_s, duration_s=0.5)
    return pb.NodeSessionRequest(traces=pb.TraceBatch(ops=[op]))


async def joined(inbox: Inbox) -> NodeArrived:
    """What the scheduler is told when a node joins, which holds no adapters."""
    arrived = await inbox.get(1.0)
    assert isinstance(arrived, NodeArrived)
    assert await inbox.get(1.0) == Told(AdaptersTold("n", ()))
    return arrived


async def test_a_node_is_welcomed_and_announced(registry: NodeRegistry, inbox: Inbox) -> None:
    stream = Stream()
    stream.put(hello())
    async with aclosing(registry.session(aiter(stream))) as session:
        welcome = (await anext(session)).welcome
        assert (welcome.fencing_token, welcome.queue_order, welcome.lease_s) == (7, "fifo", 5.0)
        assert welcome.default_slo == types_pb2.Slo(ttft_s=0.4)
        arrived = await joined(inbox)
        assert arrived.spec.node_id == "n"
        assert (registry.address("n"), registry.models) == ("h:1", {"m"})
    assert await inbox.get(1.0) == NodeGone("n", "its stream was cut")
    assert (registry.address("n"), registry.is_connected("n")) == ("", False)


async def test_the_smallest_delay_sets_the_clock_offset(registry: NodeRegistry, inbox: Inbox, clock: FakeClock) -> None:
    stream = Stream()
    stream.put(hello(sent_s=10.0))  # offset 990 and its delay
    async with aclosing(registry.session(aiter(stream))) as session:
        await anext(session)
        await joined(inbox)
        for sent_s in (10.4, 10.1):
            stream.put(beat(sent_s))
        stream.put(trace(20.0))
        assert await inbox.get(1.0) == Told(WeightsTold("n", 0, None))
        traced = await inbox.get(1.0)
    assert isinstance(traced, Traced)
    assert traced.ops[0].begin_s == pytest.approx(20.0 + 989.6)
    assert traced.ops[0].end_s == pytest.approx(20.5 + 989.6)


async def test_news_of_the_weights_are_told_on_the_schedulers_clock(registry: NodeRegistry, inbox: Inbox) -> None:
    def told(step: int, age_s: float | None) -> pb.NodeSessionRequest:
        beat = pb.NodeHeartbeat(sent_monotonic_s=10.0, weight_step=step, weights_age_s=age_s)
        return pb.NodeSessionRequest(heartbeat=beat)

    stream = Stream()
    stream.put(hello(sent_s=10.0))
    # Never trained; a step 2 s old; the same, but for the clock; newer weights of a peer; back to older ones.
    for message in (told(0, None), told(1, 2.0), told(1, 2.001), told(1, 1.0), told(1, 9.0)):
        stream.put(message)
    async with aclosing(registry.session(aiter(stream))) as session:
        await anext(session)
        await joined(inbox)
        found = [await inbox.get(1.0) for _ in range(4)]
    expected = ((0, None), (1, 998.0), (1, 999.0), (1, 991.0))
    assert found == [Told(WeightsTold("n", step, trained_s)) for step, trained_s in expected]


async def test_a_failed_synchronisation_is_told(registry: NodeRegistry, inbox: Inbox) -> None:
    stream = Stream()
    stream.put(hello())
    error = LemixError(ErrorCode.INTERNAL, "x").to_proto()
    finished = pb.SyncFinished(sync_id="s", snapshot_only=True, error=error)
    stream.put(pb.NodeSessionRequest(sync_finished=finished))
    async with aclosing(registry.session(aiter(stream))) as session:
        await anext(session)
        await joined(inbox)
        assert await inbox.get(1.0) == Told(SyncEnded("s", "n", ok=False))


async def test_the_end_of_the_stream_is_the_end_of_the_node(registry: NodeRegistry, inbox: Inbox) -> None:
    stream = Stream()
    stream.put(hello())
    stream.put(None)
    async with aclosing(registry.session(aiter(stream))) as session:
        await anext(session)
        with pytest.raises(LemixError):
            await anext(session)
    await joined(inbox)
    assert await inbox.get(1.0) == NodeGone("n", "its stream ended")


async def test_a_second_stream_takes_over_without_losing_the_node(registry: NodeRegistry, inbox: Inbox) -> None:
    first, second = Stream(), Stream()
    first.put(hello())
    second.put(hello())
    async with aclosing(registry.session(aiter(first))) as old, aclosing(registry.session(aiter(second))) as new:
        await anext(old)
        await anext(new)
        with pytest.raises(LemixError) as caught:
            await anext(old)
        assert caught.value.code is ErrorCode.CONFLICT
        assert registry.is_connected("n")
        kinds = [type(await inbox.get(0.0)) for _ in range(5)]
        assert kinds == [NodeArrived, Told, NodeArrived, Told, type(None)]


async def test_a_node_that_does_not_read_is_cut_off(registry: NodeRegistry, inbox: Inbox) -> None:
    stream = Stream()
    stream.put(hello())
    cancel = pb.NodeSessionResponse(cancel=pb.CancelWork(task_id="t"))
    async with aclosing(registry.session(aiter(stream))) as session:
        await anext(session)
        assert [registry.send("n", cancel) for _ in range(3)] == [True, True, False]
        assert [(await anext(session)).WhichOneof("message") for _ in range(2)] == ["cancel", "cancel"]
        with pytest.raises(LemixError, match="does not read"):
            await anext(session)
    await joined(inbox)
    assert await inbox.get(1.0) == NodeGone("n", "it does not read its messages")
    assert not registry.send("n", cancel)


async def test_nodes_keep_their_work_when_the_scheduler_stops(registry: NodeRegistry, inbox: Inbox) -> None:
    stream = Stream()
    stream.put(hello())
    async with aclosing(registry.session(aiter(stream))) as session:
        await anext(session)
        registry.close()
        with pytest.raises(LemixError, match="stops"):
            await anext(session)
    await joined(inbox)
    assert await inbox.get(0.0) is None


async def test_nobody_joins_before_the_scheduler_leads(registry: NodeRegistry) -> None:
    registry.lead(0)
    with pytest.raises(LemixError) as caught:
        await anext(registry.session(aiter(Stream())))
    assert caught.value.code is ErrorCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("first", "param"),
    [
        (beat(0.0), "hello"),
        (pb.NodeSessionRequest(hello=pb.NodeHello(address="h:1")), "hello.node_id"),
        (pb.NodeSessionRequest(hello=pb.NodeHello(node_id="n")), "hello.address"),
    ],
)
async def test_a_bad_hello_is_named(registry: NodeRegistry, first: pb.NodeSessionRequest, param: str) -> None:
    stream = Stream()
    stream.put(first)
    with pytest.raises(LemixError) as caught:
        await anext(registry.session(aiter(stream)))
    assert caught.value.param == param
