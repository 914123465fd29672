"""The same parity tests on a GPU. `LEMIX_TEST_DEVICE=cuda:0 make test TEST_ARGS=tests/parity`: all of them there."""

from pathlib import Path

import pytest
import torch

from services.node_agent.engine.base import EngineConfig
from services.node_agent.engine.torch.engine import load_engine
from services.node_agent.engine.torch.wire import Place
from services.node_agent.engine.training_ops import Example, TrainForward
from tests.parity import pipeline, test_serving_parity, test_training_parity
from tests.parity.conftest import MODELS
from tests.parity.pipeline import Pipeline
from tests.parity.test_process import serve_and_train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "DEVICE", "cuda:0")


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
async def test_a_gpu_computes_the_same(models: dict[str, Path], name: str, stages: int) -> None:
    """Logits of ragged batches, gradients, ten optimizer steps; all stages on one device."""
    await test_serving_parity.test_ragged_prefill_and_decode_logits(models, name, stages)
    await test_training_parity.test_loss_and_gradients(models, name, stages)
    await test_training_parity.test_ten_steps(models, name, stages)


@pytest.mark.parametrize("devices", [("cuda:0",), ("cuda:0", "cuda:1")])
async def test_outputs_stay_on_the_devices(models: dict[str, Path], devices: tuple[str, ...]) -> None:
    """Stages in processes of their own, on one GPU and on two: bit for bit what one process computes on the first."""
    if len(devices) > torch.cuda.device_count():
        pytest.skip(f"{torch.cuda.device_count()} CUDA devices on this machine")
    path = models["llama-tied"]
    engine = await load_engine(EngineConfig(model_path=str(path), num_stages=2, dtype="float64", devices=devices))
    try:
        assert await serve_and_train(Pipeline(engine)) == await serve_and_train(Pipeline.load(path, 2))
        output = (await Pipeline(engine, version=2).run(0, TrainForward(1, 2, "m", (Example((1, 2)),)))).output
        assert output is not None
        assert isinstance(output.token, Place)
        assert output.token.on_device
    finally:
        await engine.close()
