"""Stages that compute on each other's memory: nothing looks at a block again that it gave back."""

import math
import os
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.node_agent.engine.base import EngineConfig
from services.node_agent.engine.inference_ops import DecodeSequence, PrefillSequence, Sampling
from services.node_agent.engine.ops import Offload, Reload
from services.node_agent.engine.torch.arena import create_arena
from services.node_agent.engine.torch.blocks import DATA
from services.node_agent.engine.torch.device_sharing import share_device_memory
from services.node_agent.engine.torch.engine import InProcessStageWorker, TorchEngine
from services.node_agent.engine.torch.executor import StageExecutor
from services.node_agent.engine.torch.load import read_model
from services.node_agent.engine.torch.shared_transport import SharedTransport
from services.node_agent.engine.torch.stage import parse_dtype
from services.node_agent.engine.torch.wire import Place
from services.node_agent.engine.training_ops import AdapterSpec, OptimizerSpec
from services.node_agent.scratch import ScratchFolder
from tests.parity.pipeline import Pipeline
from tests.parity.test_training_parity import batch
from tests.unit.engine.file_memory import FileMemories
from tests.unit.engine.test_transport import Worker

STAGES = 3
#: Room for what is in flight, so that blocks are used again and again.
ARENA_BYTES = 1 << 19
ADAPTER = AdapterSpec("adapter", 2, dropout=0.3, target_modules=("all-linear",), isolated=True)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> list[Place]:
    """A block that is given back holds NaN from then on. The blocks."""
    spoiled: list[Place] = []
    release: Callable[[SharedTransport, Place], None] = SharedTransport._release

    def spoiling(self: SharedTransport, place: Place) -> None:
        spoiled.append(place)
        memory = self._areas[place.on_device, place.stage].memory
        memory.tensor(place.offset + DATA, prod(place.shape), parse_dtype(place.dtype)).fill_(math.nan)
        release(self, place)

    monkeypatch.setattr(SharedTransport, "_release", spoiling)
    return spoiled


async def sharing(path: Path, folder: Path, *, on_device: bool, config: dict[str, object]) -> Pipeline:
    """All stages in this process, each with its end of a transport between processes."""
    settings = EngineConfig(model_path=str(path), num_stages=STAGES, **config)  # type: ignore[arg-type]
    spec = read_model(settings.model_path)
    fds = [create_arena(ARENA_BYTES, ARENA_BYTES) for _ in range(STAGES)]
    ends = [
        SharedTransport(stage, fds, ARENA_BYTES, devices=FileMemories(), device_bytes=ARENA_BYTES)
        for stage in range(STAGES)
    ]
    for fd in fds:
        os.close(fd)
    if on_device:
        assert await share_device_memory([Worker(end) for end in ends]) == ""
    executors = [
        StageExecutor(settings, spec, stage, ends[stage], folder / f"stage-{stage}") for stage in range(STAGES)
    ]
    workers = [InProcessStageWorker(executor) for executor in executors]
    return Pipeline(TorchEngine(spec.info(0), workers, ScratchFolder("engine")))


async def everything_at_once(pipeline: Pipeline, parts: int) -> list[Tensor]:
    """Serves and trains with several micro-batches in flight, over a step, some of them offloaded; all results."""
    found: list[Tensor] = []
    result = await pipeline.prefill(PrefillSequence("r", (5, 6, 7, 8), Sampling(ignore_eos=True), 20))
    tokens = [result.tokens[0].token_id]
    for number in range(4):
        await pipeline.forward(f"m{number}", batch(number), parts=parts)
        result = await pipeline.decode(DecodeSequence("r", tokens[-1], 4 + number))
        tokens.append(result.tokens[0].token_id)
    if pipeline.executors[0].ready.activation_bytes_per_token:
        for stage in range(STAGES):
            await pipeline.run(stage, Offload(0, ("m1", "m2", "r")))
        await pipeline.forward("m4", batch(4), parts=parts)
        for stage in range(STAGES):
            await pipeline.run(stage, Reload(0, ("m1", "m2", "r")))
    else:
        await pipeline.forward("m4", batch(4), parts=parts)
    await pipeline.forward("a", batch(5), parts=parts, adapter=ADAPTER)
    await pipeline.backward("m0", parts=parts)
    await pipeline.backward("m1", parts=parts)
    found += [gradient.clone() for gradient in pipeline.gradients().values()]
    await pipeline.step(OptimizerSpec(learning_rate=1e-2), oldest_version=0)
    await pipeline.backward("m2", 1, parts=parts)
    await pipeline.forget("m3")
    await pipeline.backward("m4", 1, parts=parts)
    found += [gradient.clone() for gradient in pipeline.gradients(1).values()]
    await pipeline.backward("a", 2, parts=parts)
    found += [gradient.clone() for gradient in pipeline.adapter_gradients(ADAPTER.adapter_id, 2).values()]
    result = await pipeline.decode(DecodeSequence("r", tokens[-1], 8))
    tokens.append(result.tokens[0].token_id)
    return [*found, torch.tensor(tokens)]


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize(
    "config",
    [
        {"dtype": "float64"},
        {"dtype": "float32", "training_dtype": "bfloat16"},
        {"dtype": "float64", "activation_checkpointing": True},
        {"dtype": "float64", "can_offload": True},
        {"dtype": "float64", "can_offload": True, "activation_checkpointing": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama-tied", "gpt2-untied"])
async def test_blocks_are_not_read_after_they_were_given_back(
    models: dict[str, Path],
    tmp_path: Path,
    name: str,
    config: dict[str, object],
    parts: int,
    on_device: bool,
    spoil: list[Place],
) -> None:
    shared = await sharing(models[name], tmp_path, on_device=on_device, config=config)
    alone = Pipeline.load(models[name], STAGES, **config)  # type: ignore[arg-type]
    found, expected = [await everything_at_once(pipeline, parts) for pipeline in (shared, alone)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(spoil) > 30
    for pipeline in (shared, alone):
        await pipeline.engine.close()
