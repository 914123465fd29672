"""The real engine under the agent: two stage processes, a tiny Llama, serving and training at once."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lemix.internal.v1 import node_agent_service_pb2 as node_pb2
from lemix.internal.v1 import node_agent_service_pb2_grpc as node_grpc
from lemix.internal.v1 import profile_pb2, work_pb2
from lemix.internal.v1 import scheduler_service_pb2 as scheduler_pb2
from services.latency import MOVES, OpKind
from services.ledger import open_ledger
from services.node_agent.agent import NodeAgent
from services.node_agent.config import NodeAgentSettings
from services.node_agent.engine_choice import load
from services.profile_messages import latency_from_profile
from services.profiler.config import CachedGrid, GridSettings, MixedGrid, OpGrid, ProfilerSettings
from services.profiler.measure import Wish, profile_node
from services.runtime.clock import SystemClock
from services.runtime.grpc_client import open_channel
from tests.integration.node_agent.harness import Cluster, cluster, inference_item, training_item
from tests.parity.tiny import write_tiny_llama

PROMPTS = [[10, 20, 30], [7], [200, 100, 50, 25, 12], [3, 3, 3, 3]]
NEW_TOKENS = 12


def _generated_by_transformers(model_path: Path, prompts: list[list[int]]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64).eval()
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


@contextlib.asynccontextmanager
async def _real_node(made: Cluster, model: Path, node_id: str):
    settings = NodeAgentSettings(
        node_id=node_id, num_stages=2, model_path=str(model), dtype="float64", kv_capacity_tokens=2048
    )
    engine, fingerprint = await load(settings)
    try:
        async with open_channel(made.scheduler.address) as channel:
            agent = NodeAgent(
                settings=settings,
                engine=engine,
                ledger=await open_ledger(made.ledger_url),
                scheduler=channel,
                fingerprint=fingerprint,
                clock=SystemClock(),
            )
            try:
                await agent.start()
                await made.scheduler.until(
                    lambda: any(hello.node_id == node_id for hello in made.scheduler.hellos), "the node"
                )
                yield agent
            finally:
                await agent.stop()
    finally:
        pids = [worker.pid for worker in engine.workers]
        await engine.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_serving_equals_transformers_while_training_runs(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "llama", tied=True, dtype=torch.float64)
    expected = _generated_by_transformers(model, PROMPTS)
    async with cluster(tmp_path) as made, _real_node(made, model, "node-0"):
        # No learning: the steps run, the weights stay, so the tokens must not change.
        for sequence in range(4):
            await made.assign(training_item("still", sequence, [[5, 6, 7, 8], [9, 8, 7]], learning_rate=0.0))
        for index, prompt in enumerate(PROMPTS):
            await made.assign(inference_item(f"r{index}", prompt, NEW_TOKENS))
        for index, tokens in enumerate(expected):
            assert list((await made.scheduler.outcome(f"r{index}")).inference.token_ids) == tokens
        still = [(await made.scheduler.outcome(f"still/{sequence}")).training for sequence in range(4)]
        assert [outcome.HasField("error") for outcome in still] == [False] * 4
        assert len({round(outcome.loss, 9) for outcome in still}) == 1
        # Learning: the loss of what is repeated falls.
        for sequence in range(8):
            await made.assign(training_item("learn", sequence, [[5, 6, 7, 8], [9, 8, 7]], learning_rate=1e-2))
        learn = [(await made.scheduler.outcome(f"learn/{sequence}")).training for sequence in range(8)]
        losses = [outcome.loss for outcome in sorted(learn, key=lambda outcome: outcome.weight_step)]
        assert losses[-1] < losses[0] - 0.5, losses


async def test_a_real_node_is_profiled_in_everything(tmp_path: Path) -> None:
    """Serving, training, behind a cache, mixed, moves and busy neighbours, with the memory of the stages."""
    model = write_tiny_llama(tmp_path / "llama")
    small = OpGrid(batches=(1, 2), lengths=(4, 12, 24))
    grid = GridSettings(
        prefill=small,
        decode=small,
        train=small,
        cached=CachedGrid(lengths=(4,), cached_tokens=(8, 16)),
        mixed=MixedGrid(lengths=(4, 12), decodes=(1, 2), decode_length=16),
        move_bytes=(1 << 14, 1 << 16),
    )
    settings = ProfilerSettings(grid=grid, repetitions=2, rounds=2)
    async with cluster(tmp_path) as made, _real_node(made, model, "node-0") as node:
        wish = Wish(node.address, (), budget_s=60.0)
        *steps, profile = [step async for step in profile_node(wish, settings, SystemClock())]
    assert isinstance(profile, profile_pb2.Profile)
    assert len(steps) == steps[-1].points_total
    assert profile.incomplete_reason == ""
    assert (profile.engine, profile.threads_per_stage) == ("torch", 1)
    assert profile.device.startswith("cpu ")
    latency = latency_from_profile(profile)
    assert all(set(models) >= set(OpKind) - MOVES for models in latency.models)
    assert len(latency.host_links) == len(latency.mixed) == 2
    assert {item.busy for item in profile.interference} == {
        profile_pb2.OP_KIND_DECODE,
        profile_pb2.OP_KIND_TRAIN_FORWARD,
    }
    assert [item.stage for item in profile.memory] == [0, 1]
    assert all(item.weight_bytes and item.kv_bytes_per_token for item in profile.memory)


async def test_replicas_average_and_measure_with_the_real_engine(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "llama", dtype=torch.float64)
    async with (
        cluster(tmp_path) as made,
        _real_node(made, model, "node-0") as one,
        _real_node(made, model, "node-1") as two,
        open_channel(one.address) as channel,
    ):
        stub = node_grpc.NodeAgentServiceStub(channel)
        points = [node_pb2.GridPoint(op=op, batch=2, length=8) for op in range(1, 7) if op != 4]
        sample = work_pb2.TrainingExample(token_ids=[5, 6, 7, 8])
        request = node_pb2.MeasureOpsRequest(points=points, repetitions=2, samples=[sample])
        responses = [response async for response in stub.MeasureOps(request)]
        assert {item.op for response in responses for item in response.measurements} == set(range(1, 7))
        first_loss = responses[-1].sample_losses[0]
        assert min(responses[-1].peak_memory_bytes) > 1 << 20

        await made.assign(training_item("job", 0, [[5, 6, 7, 8]], learning_rate=1e-2), "node-0")
        trained = (await made.scheduler.outcome("job/0")).training
        assert trained.loss == pytest.approx(first_loss), "the sample's loss is the training loss"
        for node_id in ("node-0", "node-1"):
            made.scheduler.command(node_id, take_snapshot=scheduler_pb2.TakeSnapshot(sync_id="s1"))
        await made.scheduler.sync_finished(2)
        for node_id, peer in (("node-0", two), ("node-1", one)):
            command = scheduler_pb2.ApplyWeights(
                sync_id="s1", mode=scheduler_pb2.SYNC_MODE_AVERAGE, source_addresses=[peer.address]
            )
            made.scheduler.command(node_id, apply_weights=command)
        assert not [sync.error for sync in await made.scheduler.sync_finished(4) if sync.HasField("error")]
        # Both replicas are one model again: the same loss, between the untrained and the trained one.
        reference = [6, 7, 8]
        for node_id in ("node-0", "node-1"):
            await made.assign(inference_item(node_id, [5], 1, reference_token_ids=reference), node_id)
        losses = [
            (await made.scheduler.outcome(node_id)).inference.report.reference_loss for node_id in ("node-0", "node-1")
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-9)
        assert losses[0] < first_loss
        assert profile_pb2.OP_KIND_WEIGHT_SYNC in {trace.op for trace in made.scheduler.traces}
