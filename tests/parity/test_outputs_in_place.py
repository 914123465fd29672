"""What leaves a stage is computed in memory of the transport, whatever the op and however it is cut."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.node_agent.engine.handle import Handle
from services.node_agent.engine.inference_ops import DecodeSequence, PrefillSequence, Sampling
from services.node_agent.engine.torch.transport import LocalTransport
from tests.parity.pipeline import Pipeline
from tests.parity.test_training_parity import batch


@pytest.mark.parametrize(
    "config",
    [
        {"dtype": "float64"},
        {"dtype": "bfloat16"},
        {"dtype": "float32", "training_dtype": "bfloat16"},
        {"dtype": "float64", "activation_checkpointing": True},
        {"dtype": "float64", "can_offload": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("name", ["llama", "gpt2-untied"])
async def test_no_output_is_copied(
    models: dict[str, Path], name: str, parts: int, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated: list[Tensor] = []
    in_place: list[bool] = []
    allocate, put = LocalTransport.allocate, LocalTransport.put

    def recorded_allocate(self: LocalTransport, shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        allocated.append(allocate(self, shape, dtype, device))
        return allocated[-1]

    def recorded_put(self: LocalTransport, tensor: Tensor, task_ids: list[str]) -> Handle:
        in_place.append(any(tensor.data_ptr() == memory.data_ptr() for memory in allocated))
        return put(self, tensor, task_ids)

    monkeypatch.setattr(LocalTransport, "allocate", recorded_allocate)
    monkeypatch.setattr(LocalTransport, "put", recorded_put)
    pipeline = Pipeline.load(models[name], 3, **config)  # type: ignore[arg-type]
    await pipeline.forward("m", batch(0), parts=parts)
    await pipeline.backward("m", parts=parts)
    result = await pipeline.prefill(PrefillSequence("r", (1, 2, 3), Sampling(ignore_eos=True), 4))
    await pipeline.decode(DecodeSequence("r", result.tokens[0].token_id, 3))
    # Two stages give something away in each; nothing is allocated that is not published.
    assert in_place == [True] * 8
    assert len(allocated) == 8
