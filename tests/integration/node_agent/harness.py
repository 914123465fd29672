"""A node agent with an emulated engine, a memory ledger and a scripted scheduler, joined over loopback gRPC."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from tokenizers import Tokenizer, decoders, models

from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import node_agent_service_pb2_grpc as node_grpc
from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from lemix.internal.v1 import scheduler_service_pb2_grpc as scheduler_grpc
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.latency import LatencyModel, OpKind
from services.ledger import Ledger, open_ledger
from services.node_agent.agent import NodeAgent
from services.node_agent.config import NodeAgentSettings
from services.node_agent.engine.base import EngineConfig
from services.node_agent.engine.emulated.device_timer import device_timer
from services.node_agent.engine.emulated.engine import EmulatedEngine, Tamper, load_emulated_engine
from services.node_agent.engine.emulated.timing import EmulatedTiming
from services.node_agent.engine.emulated.worker import next_token
from services.runtime.clock import SystemClock
from services.runtime.grpc_client import open_channel

TIMEOUT_S = 10.0
VOCAB_SIZE = 97
_NAMES = itertools.count()


def write_model(path: Path, **changes: Any) -> Path:
    """A directory with the config.json an emulated engine reads."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 512, "num_hidden_layers": 4, **changes}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def letter(token_id: int) -> str:
    """What `write_letters` lets a token stand for: one of 97 different characters."""
    return chr(0x4E00 + token_id)


def write_letters(path: Path) -> None:
    """A tokenizer.json beside the config.json: one character per token."""
    vocabulary = {letter(token_id): token_id for token_id in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=letter(0)))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    """What the emulated engine generates."""
    tokens = list(prompt)
    for position in range(len(prompt), len(prompt) + count):
        tokens.append(next_token(tokens[-1], position, VOCAB_SIZE))
    return tokens[len(prompt) :]


def inference_item(task_id: str, prompt: list[int], max_tokens: int, **changes: Any) -> work_pb2.WorkItem:
    """A greedy request. changes: fields of InferenceWork."""
    work = work_pb2.InferenceWork(
        prompt_token_ids=prompt,
        sampling=work_pb2.ResolvedSampling(max_tokens=max_tokens, top_p=1.0, ignore_eos=True),
        gateway_id="gateway",
        **changes,
    )
    return work_pb2.WorkItem(task_id=task_id, inference=work, fencing_token=1)


def training_item(job_id: str, sequence: int, examples: list[list[int]], **hyperparameters: Any) -> work_pb2.WorkItem:
    """A micro-batch; learning rate 1e-3 unless told."""
    hyperparameters.setdefault("learning_rate", 1e-3)
    work = work_pb2.TrainingWork(
        job_id=job_id,
        sequence=sequence,
        examples=[work_pb2.TrainingExample(token_ids=example) for example in examples],
        hyperparameters=types_pb2.Hyperparameters(**hyperparameters),
    )
    return work_pb2.WorkItem(task_id=f"{job_id}/{sequence}", training=work, fencing_token=1)


class Watched:
    """Something whose changes tests wait for."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()

    async def changed(self) -> None:
        """Tell the waiting."""
        async with self._changed:
            self._changed.notify_all()

    async def until(self, predicate: Callable[[], Any], what: str = "the expected state") -> None:
        """Return when the predicate holds; fails after TIMEOUT_S."""
        try:
            async with asyncio.timeout(TIMEOUT_S), self._changed:
                await self._changed.wait_for(lambda: bool(predicate()))
        except TimeoutError:
            raise AssertionError(f"never saw {what}") from None


class ScriptedScheduler(Watched, scheduler_grpc.SchedulerServiceServicer):
    """Takes every node in and records what it reports, also over a restart of its server."""

    def __init__(self, *, fencing_token: int = 1, queue_order: str = "inference_first", lease_s: float = 1.0) -> None:
        super().__init__()
        self.welcome = scheduler_pb2.NodeWelcome(fencing_token=fencing_token, queue_order=queue_order, lease_s=lease_s)
        self.hellos: list[scheduler_pb2.NodeHello] = []
        self.heartbeats: list[scheduler_pb2.NodeHeartbeat] = []
        self.traces: list[scheduler_pb2.OpTrace] = []
        self.outcomes: dict[str, work_pb2.WorkOutcome] = {}
        self.num_outcomes = 0
        self.syncs: list[scheduler_pb2.SyncFinished] = []
        #: Task ids in the order they were told as trained and in no checkpoint, and what became of checkpoints.
        self.trained: list[str] = []
        self.checkpoints: list[scheduler_pb2.CheckpointReport] = []
        self.evaluations: list[scheduler_pb2.EvaluationReport] = []
        self.address = ""
        self._commands: dict[str, asyncio.Queue[scheduler_pb2.NodeSessionResponse]] = {}
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listen, on the same port as before if it listened before."""
        self._server = grpc.aio.server()
        scheduler_grpc.add_SchedulerServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(self.address or "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        """Cut everything off."""
        if self._server is not None:
            await self._server.stop(None)

    def command(self, node_id: str, **message: Any) -> None:
        """Send a command to a node."""
        self._commands[node_id].put_nowait(scheduler_pb2.NodeSessionResponse(**message))

    async def NodeSession(  # noqa: N802
        self, requests: AsyncIterator[scheduler_pb2.NodeSessionRequest], context: Any
    ) -> AsyncIterator[scheduler_pb2.NodeSessionResponse]:
        """See the contract."""
        hello = (await anext(requests)).hello
        self.hellos.append(hello)
        commands = self._commands[hello.node_id] = asyncio.Queue()
        yield scheduler_pb2.NodeSessionResponse(welcome=self.welcome)
        recording = asyncio.create_task(self._record(requests))
        try:
            await self.changed()
            while True:
                yield await commands.get()
        finally:
            recording.cancel()

    async def _record(self, requests: AsyncIterator[scheduler_pb2.NodeSessionRequest]) -> None:
        async for request in requests:
            self.traces.extend(request.traces.ops)
            match request.WhichOneof("message"):
                case "heartbeat":
                    self.heartbeats.append(request.heartbeat)
                case "outcome":
                    self.outcomes[request.outcome.task_id] = request.outcome
                    self.num_outcomes += 1
                case "sync_finished":
                    self.syncs.append(request.sync_finished)
                case "trained":
                    self.trained.append(request.trained.task_id)
                case "checkpoint":
                    self.checkpoints.append(request.checkpoint)
                case "evaluation":
                    self.evaluations.append(request.evaluation)
            await self.changed()

    async def outcome(self, task_id: str) -> work_pb2.WorkOutcome:
        """The reported outcome of a task, waiting for it."""
        await self.until(lambda: task_id in self.outcomes, f"the outcome of {task_id}")
        return self.outcomes[task_id]

    async def checkpoint(self, count: int) -> scheduler_pb2.CheckpointReport:
        """The report of that number, from 1, waiting for it."""
        await self.until(lambda: len(self.checkpoints) >= count, f"{count} reports about checkpoints")
        return self.checkpoints[count - 1]

    async def sync_finished(self, count: int) -> list[scheduler_pb2.SyncFinished]:
        """All ends of synchronisation phases once there are `count`."""
        await self.until(lambda: len(self.syncs) >= count, f"{count} ends of synchronisation phases")
        return self.syncs


class Gate:
    """Holds ops up: use `timer` as the engine's timer and give ops a duration. Open at first."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self.waiting = 0
        self._watched = Watched()
        self._held: set[asyncio.Task[None]] = set()

    def timer(self) -> "GateTimer":
        """For one engine."""
        return GateTimer(self)

    def close(self) -> None:
        """Ops that start from now on wait."""
        self._open.clear()

    def open(self) -> None:
        """Let everything go on."""
        self._open.set()

    def hold(self, call: Callable[[], None]) -> asyncio.Task[None]:
        """Call when the gate is open."""
        task = asyncio.create_task(self._hold(call))
        self._held.add(task)
        task.add_done_callback(self._held.discard)
        return task

    async def _hold(self, call: Callable[[], None]) -> None:
        self.waiting += 1
        await self._watched.changed()
        try:
            await self._open.wait()
            await asyncio.sleep(0)
        finally:
            self.waiting -= 1
        call()

    async def until_waiting(self) -> None:
        """Return when an op is held up."""
        await self._watched.until(lambda: self.waiting > 0 and not self._open.is_set(), "an op that waits")


class GateTimer:
    """Ends ops when a gate is open, whatever time they take."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._tasks: list[asyncio.Task[None]] = []

    def call_at(self, time_s: float, call: Callable[[], None]) -> None:
        """See device_timer.Timer."""
        del time_s
        self._tasks.append(self._gate.hold(call))

    def close(self) -> None:
        """See device_timer.Timer."""
        for task in self._tasks:
            task.cancel()


class Node:
    """A started agent with its engine and a client channel."""

    def __init__(self, agent: NodeAgent, engine: EmulatedEngine, channel: grpc.aio.Channel) -> None:
        self.agent = agent
        self.engine = engine
        self.channel = channel
        self.stub = node_grpc.NodeAgentServiceStub(channel)

    def held_by_stages(self) -> list[str]:
        """Tasks that occupy memory on any stage."""
        return [
            task for worker in self.engine.workers for task in (*worker.stage.kv_tokens, *worker.stage.train_shapes)
        ]

    async def logprobs(self, request_id: str) -> list[work_pb2.TokenLogprobs]:
        """What the stream tells of a request's tokens."""
        call = self.stub.StreamTokens()
        await call.write(node_pb2.StreamTokensRequest(request_id=request_id, gateway_id="gateway"))
        await call.done_writing()
        async with asyncio.timeout(TIMEOUT_S):
            return [told async for response in call for chunk in response.chunks for told in chunk.logprobs]

    async def stream(self, *requests: tuple[str, int]) -> dict[str, tuple[list[int], Any]]:
        """Tokens from an offset, and the outcome, of (request id, offset) pairs."""
        call = self.stub.StreamTokens()
        for request_id, offset in requests:
            await call.write(node_pb2.StreamTokensRequest(request_id=request_id, offset=offset, gateway_id="gateway"))
        await call.done_writing()
        received: dict[str, tuple[list[int], Any]] = {request_id: ([], None) for request_id, _ in requests}
        expected = dict(requests)
        async with asyncio.timeout(TIMEOUT_S):
            async for response in call:
                for chunk in response.chunks:
                    tokens, _ = received[chunk.request_id]
                    assert chunk.offset == expected[chunk.request_id] + len(tokens)
                    tokens.extend(chunk.token_ids)
                    outcome = chunk.outcome if chunk.HasField("outcome") else None
                    received[chunk.request_id] = (tokens, outcome)
        return received


class Cluster:
    """A scripted scheduler, a memory ledger and the nodes a test starts."""

    def __init__(self, scheduler: ScriptedScheduler, ledger: Ledger, ledger_url: str, model: Path) -> None:
        self.scheduler = scheduler
        self.ledger = ledger
        self.ledger_url = ledger_url
        self.model = model
        self.token = 0
        self._stack = contextlib.AsyncExitStack()

    async def start_node(
        self,
        node_id: str = "node-0",
        *,
        num_stages: int = 2,
        gate: Gate | None = None,
        tamper: Tamper | None = None,
        ledger: Ledger | None = None,
        stack: contextlib.AsyncExitStack | None = None,
        **settings: Any,
    ) -> Node:
        """Start an agent; it is stopped at the end of the test, or with `stack`."""
        stack = stack or self._stack
        values = NodeAgentSettings(
            node_id=node_id,
            num_stages=num_stages,
            model_path=str(self.model),
            engine="emulated",
            shutdown_grace_s=0.0,
            **settings,
        )
        latency = {kind: LatencyModel("constant", (1e-6,)) for kind in OpKind} if gate else {}
        timing = EmulatedTiming.alike(latency, num_stages)
        config = EngineConfig(
            model_path=str(self.model), num_stages=num_stages, kv_capacity_tokens=values.kv_capacity_tokens
        )
        engine = load_emulated_engine(config, timing, timer=gate.timer if gate else device_timer, tamper=tamper)
        stack.push_async_callback(engine.close)
        channel = await stack.enter_async_context(open_channel(self.scheduler.address))
        agent = NodeAgent(
            settings=values,
            engine=engine,
            ledger=ledger or await open_ledger(self.ledger_url),
            scheduler=channel,
            fingerprint="fingerprint",
            clock=SystemClock(),
        )
        stack.push_async_callback(agent.stop)
        joined = len(self.scheduler.hellos)
        await agent.start()
        await self.scheduler.until(lambda: len(self.scheduler.hellos) > joined, "the node's hello")
        client = await stack.enter_async_context(open_channel(agent.address))
        return Node(agent, engine, client)

    async def assign(self, item: work_pb2.WorkItem, node_id: str = "node-0") -> None:
        """Accept a task and put it on a node's stream."""
        if not self.token:
            self.token = await self.ledger.acquire_leadership()
        item.fencing_token = self.token
        await self.ledger.submit(item)
        assert await self.ledger.assign(item, node_id, entry_id=None, token=self.token)

    async def close(self) -> None:
        """Stop every node, then the scheduler."""
        await self._stack.aclose()
        await self.scheduler.stop()
        await self.ledger.close()


@contextlib.asynccontextmanager
async def cluster(tmp_path: Path, **scheduler: Any) -> AsyncIterator[Cluster]:
    """A cluster without nodes."""
    url = f"memory://node-agent-{next(_NAMES)}"
    scripted = ScriptedScheduler(**scheduler)
    await scripted.start()
    made = Cluster(scripted, await open_ledger(url), url, write_model(tmp_path / "model"))
    try:
        yield made
    finally:
        await made.close()
