"""The same parity tests on a GPU. `LEMIX_TEST_DEVICE=cuda:0 make test TEST_ARGS=tests/parity`: all of them there."""

from pathlib import Path

import pytest
import torch

from tests.parity import pipeline, test_serving_parity, test_training_parity
from tests.parity.conftest import MODELS

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
