"""One stage's ops in order, and forgetting in between."""

import asyncio

import pytest

from services.node_agent import stage_runner
from services.node_agent.engine.base import StageResult, WorkerDied
from services.node_agent.engine.inference_ops import Decode, Prefill
from services.node_agent.engine.ops import Forget, StageOp
from services.node_agent.stage_runner import StageRunner


class _Worker:
    pid = 1

    def __init__(self) -> None:
        self.ops: list[StageOp] = []
        self.ended: asyncio.Queue[StageOp] = asyncio.Queue()
        self.go = asyncio.Event()
        self.go.set()
        self.fails = ""
        self.dead = False

    def run(self, op: StageOp) -> asyncio.Future[StageResult]:
        return asyncio.ensure_future(self._run(op))

    async def _run(self, op: StageOp) -> StageResult:
        self.ops.append(op)
        await self.go.wait()
        await asyncio.sleep(0)
        if self.dead:
            raise WorkerDied("gone")
        self.ended.put_nowait(op)
        return StageResult(op.op_id, 0.0, 0.0, 0, error=self.fails)

    async def close(self) -> None:
        return


class _Stage:
    def __init__(self, op_timeout_s: float = 60.0) -> None:
        self.worker = _Worker()
        self.broken: asyncio.Queue[BaseException] = asyncio.Queue()
        self.runner = StageRunner(3, self.worker, self.broken.put_nowait, op_timeout_s=op_timeout_s)

    async def __aenter__(self) -> "_Stage":
        self.runner.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.runner.stop()

    async def ended(self, count: int) -> list[StageOp]:
        """The next ops that ended."""
        async with asyncio.timeout(5.0):
            return [await self.worker.ended.get() for _ in range(count)]

    async def breaks(self) -> BaseException:
        """What the runner ended with."""
        async with asyncio.timeout(5.0):
            return await self.broken.get()


def _decode(op_id: int) -> Decode:
    return Decode(op_id, 0, ())


async def test_ops_run_in_order_and_results_come_back() -> None:
    async with _Stage() as stage:
        results = await asyncio.gather(*(stage.runner.call(_decode(op_id)) for op_id in (1, 2, 3)))
        assert [result.op_id for result in results] == [1, 2, 3]
        assert [op.op_id for op in stage.worker.ops] == [1, 2, 3]


async def test_forgets_wait_for_idleness_and_travel_together() -> None:
    async with _Stage() as stage:
        stage.worker.go.clear()
        first = asyncio.create_task(stage.runner.call(_decode(1)))
        await asyncio.sleep(0)
        stage.runner.forget("a")
        stage.runner.forget("b")
        second = asyncio.create_task(stage.runner.call(_decode(2)))
        await asyncio.sleep(0)
        stage.worker.go.set()
        await asyncio.gather(first, second)
        assert await stage.ended(3) == [_decode(1), _decode(2), Forget(0, ("a", "b"))]


async def test_forgets_go_before_an_op_that_takes_memory() -> None:
    async with _Stage() as stage:
        stage.worker.go.clear()
        stage.runner.submit(_decode(1), lambda _: None)
        await asyncio.sleep(0)
        stage.runner.forget("a")
        stage.runner.submit(Prefill(2, 0, ()), lambda _: None)
        stage.worker.go.set()
        assert await stage.ended(3) == [_decode(1), Forget(0, ("a",)), Prefill(2, 0, ())]


async def test_forgets_are_bounded_under_steady_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_runner, "_MAX_PENDING_FORGETS", 2)
    async with _Stage() as stage:
        stage.runner.forget("a")
        stage.runner.forget("b")
        stage.runner.submit(_decode(1), lambda _: None)
        assert await stage.ended(2) == [Forget(0, ("a", "b")), _decode(1)]


async def test_a_caller_that_gave_up_does_not_disturb() -> None:
    async with _Stage() as stage:
        stage.worker.go.clear()
        call = asyncio.create_task(stage.runner.call(_decode(1)))
        await asyncio.sleep(0)
        call.cancel()
        stage.worker.go.set()
        assert (await stage.runner.call(_decode(2))).op_id == 2
        assert stage.broken.empty()


@pytest.mark.parametrize("where", ["op", "result", "forget"])
async def test_what_goes_wrong_is_told_once(where: str) -> None:
    def done(result: StageResult) -> None:
        raise ValueError(f"cannot use {result.op_id}")

    async with _Stage() as stage:
        if where == "forget":
            stage.worker.fails = "RuntimeError: x"
            stage.runner.forget("a")
        else:
            stage.worker.dead = where == "op"
            stage.runner.submit(_decode(1), done)
        expected = {"op": WorkerDied, "result": ValueError, "forget": RuntimeError}[where]
        assert type(await stage.breaks()) is expected
        assert stage.broken.empty()


@pytest.mark.parametrize("work", ["op", "forget"])
async def test_a_worker_that_does_not_answer_is_given_up(work: str) -> None:
    async with _Stage(op_timeout_s=0.01) as stage:
        stage.worker.go.clear()
        if work == "op":
            stage.runner.submit(_decode(1), lambda _: None)
        else:
            stage.runner.forget("a")
        error = await stage.breaks()
        assert isinstance(error, WorkerDied)
        expected = {"op": "Decode", "forget": "Forget"}[work]
        assert str(error) == f"stage 3 worker (pid 1) did not answer {expected} within 0.01 s"


async def test_a_worker_that_dies_idle_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_runner, "_PROBE_S", 0.001)
    async with _Stage() as stage:
        assert await stage.ended(1) == [Forget(0, ())]
        stage.worker.dead = True
        assert isinstance(await stage.breaks(), WorkerDied)
