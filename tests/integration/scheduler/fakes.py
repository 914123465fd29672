"""A node agent and a gateway as the scheduler sees them, on real gRPC."""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import profile_pb2, profiler_service_pb2, profiler_service_pb2_grpc, work_pb2
from lemix.internal.v1 import scheduler_service_pb2 as pb
from lemix.internal.v1 import scheduler_service_pb2_grpc as pb_grpc
from lemix.v1 import types_pb2
from services.ledger import Delivery, Ledger, LedgerUnavailable
from services.profile_artifact import write_artifact
from services.runtime.grpc_server import GrpcServer

WAIT_S = 10.0


def profile(num_stages: int = 1) -> profile_pb2.Profile:
    """A plausible profile."""
    made = profile_pb2.Profile(profile_id="p-1", fingerprint="p", version=1, num_stages=num_stages)
    for stage in range(num_stages):
        for op, model, coefficients in (
            (profile_pb2.OP_KIND_PREFILL, "affine", [1e-3, 1e-5]),
            (profile_pb2.OP_KIND_DECODE, "full_decode", [1e-3, 1e-5, 1e-7]),
            (profile_pb2.OP_KIND_TRAIN_FORWARD, "affine", [1e-3, 1e-5]),
            (profile_pb2.OP_KIND_TRAIN_BACKWARD, "affine", [2e-3, 2e-5]),
            (profile_pb2.OP_KIND_OPTIMIZER_STEP, "constant", [1e-3]),
        ):
            made.fits.add(stage=stage, op=op, model=model, coefficients=coefficients, chosen=True)
            made.fits.add(stage=stage, op=op, model="quadratic", coefficients=[9.0], chosen=False)
    return made


def write_profile(path: Path) -> str:
    """The profile as a file."""
    path.write_text(write_artifact(profile()), encoding="utf-8")
    return str(path)


def work(prompt_tokens: int = 3, **fields: Any) -> work_pb2.InferenceWork:
    """A request."""
    sampling = work_pb2.ResolvedSampling(max_tokens=4, top_p=1.0)
    return work_pb2.InferenceWork(
        prompt_token_ids=list(range(1, prompt_tokens + 1)), sampling=sampling, arrival_unix_s=time.time(), **fields
    )


class FakeNode:
    """Joins, beats, takes work from the ledger and reports, all when told to; `serve` does it by itself."""

    def __init__(self, address: str, ledger: Ledger, node_id: str) -> None:
        self.node_id = node_id
        self.address = f"127.0.0.1:{abs(hash(node_id)) % 50_000 + 1000}"
        self._ledger = ledger
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = pb_grpc.SchedulerServiceStub(self._channel)
        self._call: Any = None
        self._writing = asyncio.Lock()  # one write at a time, or gRPC ends the call
        self._tasks: list[asyncio.Task[None]] = []
        self.commands: asyncio.Queue[pb.NodeSessionResponse] = asyncio.Queue()
        self.welcome = pb.NodeWelcome()
        self.trained: list[str] = []
        self.weight_step = 0
        #: Told with every heartbeat from now on.
        self.draining = False
        self.weights_age_s: float | None = None

    async def join(self, *, beats: bool = True, **hello: Any) -> "FakeNode":
        """Open a session and wait for the welcome."""
        self._call = self._stub.NodeSession()
        fields = {"num_stages": 1, "model": "m", "max_inflight_inference": 8, "profile_fingerprint": "p"}
        message = pb.NodeHello(
            node_id=self.node_id, address=self.address, sent_monotonic_s=time.monotonic(), **{**fields, **hello}
        )
        await self._call.write(pb.NodeSessionRequest(hello=message))
        first = await asyncio.wait_for(self._call.read(), WAIT_S)
        self.welcome = first.welcome
        self._tasks.append(asyncio.create_task(self._listen(self._call)))
        if beats:
            self._tasks.append(asyncio.create_task(self._beat(self._call, first.welcome.lease_s / 4)))
        return self

    async def is_refused(self) -> bool:
        """Say hello and wait for the answer: whether it was a refusal."""
        self._call = self._stub.NodeSession()
        hello = pb.NodeHello(node_id=self.node_id, address=self.address, num_stages=1, profile_fingerprint="p")
        await self._call.write(pb.NodeSessionRequest(hello=hello))
        return await self.ended() is not grpc.StatusCode.OK

    async def _listen(self, call: Any) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while (message := await call.read()) is not grpc.aio.EOF:
                self.commands.put_nowait(message)

    async def _beat(self, call: Any, interval_s: float) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self.beat(call)
                await asyncio.sleep(interval_s)

    async def beat(self, call: Any = None) -> None:
        """Send one heartbeat."""
        beat = pb.NodeHeartbeat(
            sent_monotonic_s=time.monotonic(), draining=self.draining, weights_age_s=self.weights_age_s
        )
        async with self._writing:
            await (call or self._call).write(pb.NodeSessionRequest(heartbeat=beat))

    async def ended(self) -> grpc.StatusCode:
        """Status the scheduler closed the session with."""
        return await asyncio.wait_for(self._call.code(), WAIT_S)

    def serve(self) -> None:
        """Take and finish everything from now on."""
        self._tasks.append(asyncio.create_task(self._serve()))

    async def _serve(self) -> None:
        while True:
            try:
                for delivery in await self._ledger.read_node(self.node_id, count=16, block_s=0.2):
                    await self.finish(delivery)
            except LedgerUnavailable:
                await asyncio.sleep(0.02)

    async def take(self) -> Delivery:
        """The next task from the ledger."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for delivery in await self._ledger.read_node(self.node_id, count=1, block_s=1.0):
                    return delivery

    async def finish(self, delivery: Delivery, *, tokens: tuple[int, ...] = (5, 6), report: bool = True) -> bool:
        """End a task well. False when the ledger refused it."""
        outcome = work_pb2.WorkOutcome(task_id=delivery.item.task_id, node_id=self.node_id)
        if delivery.item.HasField("training"):
            training = delivery.item.training
            self.weight_step += 1
            self.trained.append(delivery.item.task_id)
            outcome.training.CopyFrom(
                work_pb2.TrainingOutcome(
                    job_id=training.job_id,
                    sequence=training.sequence,
                    loss=2.0,
                    label_tokens=3,
                    weight_step=self.weight_step,
                )
            )
        else:
            reason = types_pb2.FINISH_REASON_STOP
            outcome.inference.CopyFrom(work_pb2.InferenceOutcome(finish_reason=reason, token_ids=tokens))
        return await self.end(delivery, outcome, report=report)

    async def end(self, delivery: Delivery, outcome: work_pb2.WorkOutcome, *, report: bool = True) -> bool:
        """Store an outcome and report it if it counts."""
        counted = await self._ledger.finish(self.node_id, delivery.entry_id, outcome)
        if counted and report:
            await self.send(pb.NodeSessionRequest(outcome=outcome))
        return counted

    async def send(self, message: pb.NodeSessionRequest) -> None:
        """Report anything."""
        async with self._writing:
            await self._call.write(message)

    async def command(self) -> pb.NodeSessionResponse:
        """The next thing the scheduler tells."""
        return await asyncio.wait_for(self.commands.get(), WAIT_S)

    async def vanish(self) -> None:
        """Cut the session as a crash would."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._call is not None:
            self._call.cancel()

    async def close(self) -> None:
        """Release everything."""
        await self.vanish()
        await self._channel.close()


class StuckProfiler(profiler_service_pb2_grpc.ProfilerServiceServicer):
    """Measures until told to fail."""

    def __init__(self) -> None:
        self.asked, self.fail = asyncio.Event(), asyncio.Event()
        self.address = ""

    @classmethod
    async def start(cls, stack: contextlib.AsyncExitStack) -> "StuckProfiler":
        """A listening one, stopped with the stack."""
        profiler, server = cls(), GrpcServer("127.0.0.1:0")
        server.add(profiler_service_pb2_grpc.add_ProfilerServiceServicer_to_server, profiler, "p")
        await server.start()
        stack.push_async_callback(server.stop, 0.1)
        profiler.address = server.address
        return profiler

    async def GetProfile(self, request: Any, context: Any) -> profiler_service_pb2.GetProfileResponse:  # noqa: N802
        """There is none yet."""
        raise LemixError(ErrorCode.NOT_FOUND, "no profile")

    async def ProfileNode(  # noqa: N802
        self, request: Any, context: Any
    ) -> AsyncIterator[profiler_service_pb2.ProfileNodeResponse]:
        """Never succeeds."""
        self.asked.set()
        yield profiler_service_pb2.ProfileNodeResponse(progress=profiler_service_pb2.ProfileProgress(points_total=1))
        await self.fail.wait()
        raise LemixError(ErrorCode.UNAVAILABLE, "the node went away while it was measured")


class FakeGateway:
    """Submits and collects what it is told, by request."""

    def __init__(self, address: str, gateway_id: str = "g0") -> None:
        self._gateway_id = gateway_id
        self._channel = grpc.aio.insecure_channel(address)
        self.stub = pb_grpc.SchedulerServiceStub(self._channel)
        self._call: Any = None
        self._listener: asyncio.Task[None] | None = None
        self._news: dict[str, asyncio.Queue[pb.GatewaySessionResponse]] = defaultdict(asyncio.Queue)
        self.welcome = pb.GatewayWelcome()

    async def connect(self) -> "FakeGateway":
        """Open a session and wait for the welcome."""
        self._call = self.stub.GatewaySession()
        hello = pb.GatewayHello(gateway_id=self._gateway_id)
        await self._call.write(pb.GatewaySessionRequest(hello=hello))
        self.welcome = (await asyncio.wait_for(self._call.read(), WAIT_S)).welcome
        self._listener = asyncio.create_task(self._listen(self._call))
        return self

    async def _listen(self, call: Any) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while (message := await call.read()) is not grpc.aio.EOF:
                self._news[message.request_id].put_nowait(message)

    async def submit(self, request_id: str, request: work_pb2.InferenceWork | None = None) -> None:
        """Hand a request over."""
        submit = pb.SubmitInference(request_id=request_id, work=work() if request is None else request)
        await self._call.write(pb.GatewaySessionRequest(submit=submit))

    async def cancel(self, request_id: str) -> None:
        """Withdraw a request."""
        await self._call.write(pb.GatewaySessionRequest(cancel=pb.CancelInference(request_id=request_id)))

    async def news(self, request_id: str, kind: str) -> Any:
        """The next message of this kind about a request; others before it are skipped."""
        async with asyncio.timeout(WAIT_S):
            while True:
                message = await self._news[request_id].get()
                if message.WhichOneof("message") == kind:
                    return getattr(message, kind)

    async def disconnect(self) -> None:
        """Cut the session."""
        if self._listener is not None:
            self._listener.cancel()
            await asyncio.gather(self._listener, return_exceptions=True)
        if self._call is not None:
            self._call.cancel()

    async def close(self) -> None:
        """Release everything."""
        await self.disconnect()
        await self._channel.close()
