"""Explanations of a live scheduler: what it decided, why, and what came of it."""

import asyncio
from io import StringIO
from pathlib import Path

import grpc
import pytest
from rich.console import Console

from lemix.internal.v1 import scheduler_service_pb2 as pb
from services.scheduler.explain.__main__ import main
from tests.integration.scheduler.cluster import Cluster, eventually
from tests.integration.scheduler.fakes import FakeGateway


async def explain(gateway: FakeGateway, task_id: str) -> pb.ExplainTaskResponse:
    return await gateway.stub.ExplainTask(pb.ExplainTaskRequest(task_id=task_id))


async def command(*arguments: str) -> tuple[int, str]:
    """Exit code and output of the command, which blocks."""
    console = Console(file=StringIO(), width=120)
    code = await asyncio.to_thread(main, arguments, console)
    return code, console.file.getvalue()  # type: ignore[attr-defined]


async def test_a_request_is_explained_from_its_arrival_to_its_end(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler(core={"policy": "lemix"})
    gateway = await cluster.gateway(scheduler)
    await gateway.submit("r")
    await gateway.news("r", "accepted")

    async def waits() -> bool:
        try:
            return [wait.reason for wait in (await explain(gateway, "r")).waits] == ["no_node"]
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return False

    await eventually(waits)
    code, out = await command("explain", "r", "--address", scheduler.address)
    assert (code, out.endswith(" s: no_node\n")) == (0, True)

    node = await cluster.node(scheduler)
    await gateway.news("r", "assigned")
    answer = await explain(gateway, "r")
    (decision,) = answer.decisions
    assert (decision.task_id, decision.node_id, decision.policy) == ("r", "n0", "lemix")
    assert [wait.reason for wait in decision.waits] == ["no_node"]
    assert not answer.waits
    (candidate,) = decision.candidates
    assert candidate.response_s == decision.predicted_response_s > 0.0
    assert decision.response_meaning == pb.RESPONSE_MEANING_FIRST_TOKEN
    assert decision.outcome.fate == pb.DECISION_FATE_UNFINISHED
    assert not decision.outcome.HasField("ended_monotonic_s")
    assert decision.arrival_monotonic_s <= decision.at_monotonic_s <= answer.now_monotonic_s

    await node.finish(await node.take(), tokens=(7, 8))
    await gateway.news("r", "finished")

    async def ended() -> bool:
        (decision,) = (await explain(gateway, "r")).decisions
        return decision.outcome.fate == pb.DECISION_FATE_OK and decision.outcome.output_tokens == 2

    await eventually(ended)
    code, out = await command("explain", "r", "--address", scheduler.address)
    assert code == 0
    assert "goes to n0" in out
    assert "ok, 2 tokens" in out


async def test_the_newest_decisions_come_first(cluster: Cluster) -> None:
    scheduler = await cluster.scheduler()
    await cluster.node(scheduler)
    gateway = await cluster.gateway(scheduler)
    for number in range(3):
        await gateway.submit(f"r{number}")
        await gateway.news(f"r{number}", "assigned")
    listed = await gateway.stub.ListDecisions(pb.ListDecisionsRequest(limit=2))
    assert [decision.task_id for decision in listed.decisions] == ["r2", "r1"]
    assert [decision.sequence for decision in listed.decisions] == [3, 2]
    assert not listed.decisions[0].HasField("predicted_response_s"), "round_robin predicts nothing"
    assert len((await gateway.stub.ListDecisions(pb.ListDecisionsRequest())).decisions) == 3
    code, out = await command("newest", "--limit", "1", "--address", scheduler.address)
    assert code == 0
    assert "r2" in out
    assert "r1" not in out


async def test_the_event_log_of_a_live_scheduler_replays(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "events"
    scheduler = await cluster.scheduler(event_log_path=str(log), core={"policy": "paper_additive"})
    node, gateway = await cluster.node(scheduler), await cluster.gateway(scheduler)
    for number in range(3):
        await gateway.submit(f"r{number}")
        await gateway.news(f"r{number}", "assigned")
        await node.finish(await node.take())
        await gateway.news(f"r{number}", "finished")
    await cluster.stop(scheduler)
    code, out = await command("replay", "--log", str(log))
    assert (code, "policy paper_additive: equal: " in out) == (0, True)
    code, out = await command("explain", "r1", "--log", str(log))
    assert (code, "ok, 2 tokens" in out) == (0, True)


async def test_a_task_nobody_knows_is_not_found(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    scheduler = await cluster.scheduler()
    gateway = await cluster.gateway(scheduler)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await explain(gateway, "nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert await command("explain", "nobody", "--address", scheduler.address) == (1, "")
    assert capsys.readouterr().err == "explain: task 'nobody' is not among the newest 4096 decisions\n"
