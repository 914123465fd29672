"""What a node's stages are told to do with the peers' weights."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from lemix.internal.v1 import scheduler_service_pb2
from services.latency import OpKind
from services.node_agent.adapters import NodeAdapters
from services.node_agent.core.types import Op
from services.node_agent.engine.weight_ops import LoadWeights
from services.node_agent.weight_ops import WeightOp
from services.node_agent.weights import WeightSync


async def test_applied_weights_say_which_older_ones_are_still_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[WeightOp] = []

    async def run_weight_op(subject: str, weight_op: WeightOp) -> WeightOp:
        asked.append(weight_op)
        return weight_op

    async def combine(self: WeightSync, sync_id: str, mode: str, peers: Sequence[str], path: Path) -> None:
        assert (sync_id, mode, list(peers)) == ("s", "replace", ["peer:1"])

    loop = SimpleNamespace(run_weight_op=run_weight_op, ages=SimpleNamespace(newest_step=4), adapters=NodeAdapters(1))
    monkeypatch.setattr(WeightSync, "_combine", combine)
    finished: asyncio.Queue[scheduler_service_pb2.SyncFinished] = asyncio.Queue()
    sync = WeightSync(loop=loop, address=lambda: "own:1", report=finished.put_nowait, timeout_s=5.0)  # type: ignore[arg-type]
    sync.start_apply(
        scheduler_service_pb2.ApplyWeights(
            sync_id="s", mode=scheduler_service_pb2.SYNC_MODE_REPLACE, source_addresses=["peer:1", "own:1"]
        )
    )
    async with asyncio.timeout(5.0):
        assert not (await finished.get()).HasField("error")
    await sync.close()
    (weight_op,) = asked
    op = Op(7, OpKind.WEIGHT_SYNC, (), 3, subject="s/apply", changes_weights=True, oldest_version=2)
    payload = weight_op.payload(op)
    assert isinstance(payload, LoadWeights)
    assert payload == LoadWeights(7, 3, "s", payload.path, "replace", 2)


async def test_an_adapter_that_is_deleted_meanwhile_does_not_fail_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the one that is unwanted when the command comes, nor the one whose copy is on its way."""
    adapters, changed, given_up = NodeAdapters(4), [], []
    adapters.unwanted("job-0", [])

    async def run_weight_op(subject: str, weight_op: WeightOp) -> WeightOp:
        for adapter_id in weight_op.adapter_ids:
            adapters.check(adapter_id)
        changed.append(subject)
        return weight_op

    async def combine(self: WeightSync, sync_id: str, mode: str, peers: Sequence[str], path: Path) -> None:
        adapters.unwanted("job-1", [])

    loop = SimpleNamespace(
        run_weight_op=run_weight_op,
        ages=SimpleNamespace(newest_step=4),
        adapters=adapters,
        give_up_adapter=given_up.append,
    )
    monkeypatch.setattr(WeightSync, "_combine", combine)
    finished: asyncio.Queue[scheduler_service_pb2.SyncFinished] = asyncio.Queue()
    sync = WeightSync(loop=loop, address=lambda: "own:1", report=finished.put_nowait, timeout_s=5.0)  # type: ignore[arg-type]
    replace = scheduler_service_pb2.SYNC_MODE_REPLACE
    command = scheduler_service_pb2.ApplyWeights(sync_id="s", mode=replace, skip_weights=True)
    for index in range(3):
        held = scheduler_service_pb2.HeldAdapter(adapter_id=f"job-{index}", isolated=True)
        command.adapters.add(adapter=held, mode=replace, source_addresses=["peer:1"])
    sync.start_apply(command)
    async with asyncio.timeout(5.0):
        assert not (await finished.get()).HasField("error")
    await sync.close()
    assert len(changed) == 1
    assert changed[0].endswith("job-2/apply")
    assert set(adapters.held) == {"job-2"}
    assert given_up == ["job-0", "job-1", "job-2"]
