"""A node agent that answers the profiler's calls with made-up timings, over real gRPC."""

import asyncio

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import node_agent_service_pb2_grpc as node_grpc
from lemix.internal.v1 import profile_pb2
from services.runtime.grpc_server import GrpcServer


class FakeNodeAgent(node_grpc.NodeAgentServiceServicer):
    """Durations follow 1 ms + 10 us per token, twice that on stage 1. Faults are switched by attributes."""

    def __init__(self):
        self.info = node_pb2.GetNodeInfoResponse(
            node_id="node-0",
            model="tiny",
            num_stages=2,
            profile_fingerprint="f00d",
            max_context_tokens=128,
            max_batch=4,
            engine="torch",
            device="cpu test",
            dtype="float32",
            threads_per_stage=1,
            kv_bytes_per_token=512,
            kv_capacity_tokens=1 << 20,
        )
        self.requests = []
        self.running = 0
        self.most_running = 0
        self.busy = False
        self.silent_stage = None
        self.constant_s = None
        #: The node dies after so many points; points of more tokens do not fit into its memory.
        self.answers_until = None
        #: Its budget is spent after so many points.
        self.budget_points = None
        self.ends_with = ErrorCode.UNAVAILABLE
        self.too_large = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()
        self.left = asyncio.Event()

    async def GetNodeInfo(self, request, context):  # noqa: N802
        return self.info

    async def MeasureOps(self, request, context):  # noqa: N802
        if self.busy:
            raise LemixError(ErrorCode.CONFLICT, "the node has work")
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.entered.set()
        try:
            await self.gate.wait()
            for answered in range(request.rounds * len(request.points)):
                if answered == self.answers_until:
                    raise LemixError(self.ends_with, "the stage worker died")
                if answered == self.budget_points:
                    break
                index = answered % len(request.points)
                yield self._answer(index, request.points[index], request.repetitions)
            losses = [0.5 * len(sample.token_ids) for sample in request.samples]
            memory = [profile_pb2.StageMemory(stage=stage, weight_bytes=5, kv_bytes_per_token=7) for stage in (0, 1)]
            yield node_pb2.MeasureOpsResponse(sample_losses=losses, peak_memory_bytes=[1000, 2000], memory=memory)
        finally:
            self.running -= 1
            self.left.set()

    def _answer(self, index, point, repetitions):
        if self.too_large is not None and point.batch * point.length > self.too_large:
            return node_pb2.MeasureOpsResponse(point=index, left_out_reason="OutOfMemoryError: too large")
        return node_pb2.MeasureOpsResponse(point=index, measurements=self._measure(point, repetitions))

    def _measure(self, point, repetitions):
        kinds = [point.op]
        if point.op == profile_pb2.OP_KIND_OFFLOAD:
            kinds.append(profile_pb2.OP_KIND_RELOAD)
        if point.op == profile_pb2.OP_KIND_TRAIN_FORWARD:
            kinds.append(profile_pb2.OP_KIND_TRAIN_BACKWARD)
        return [
            profile_pb2.Measurement(
                stage=stage,
                op=kind,
                batch=point.batch,
                length=point.length,
                durations_s=[self.constant_s or self._seconds(stage, point)] * repetitions,
                cached_tokens=point.cached_tokens,
                decodes=point.decodes,
                decode_length=point.decode_length,
                num_bytes=point.num_bytes,
                busy=point.busy,
                peak_bytes=1_000_000 + 300 * point.batch * point.length,
            )
            for kind in kinds
            for stage in range(self.info.num_stages)
            if stage != self.silent_stage
        ]

    @staticmethod
    def _seconds(stage, point):
        if point.num_bytes:
            return 1e-4 + point.num_bytes / 1e9
        alone_s = (1e-3 + 1e-5 * point.batch * point.length) * (1 + stage)
        decodes_s = (1e-3 + 1e-5 * point.decodes * point.decode_length) * (1 + stage) if point.decodes else 0.0
        return (alone_s + decodes_s) * (1.25 if point.busy else 1.0)


async def serve_fake(agent):
    """Start it on a free port; returns the server, whose `address` the profiler dials."""
    server = GrpcServer("127.0.0.1:0")
    server.add(node_grpc.add_NodeAgentServiceServicer_to_server, agent, "lemix.internal.v1.NodeAgentService")
    await server.start()
    return server
