"""The linear of the engine against PyTorch's own, forward and backward, whichever library multiplies."""

import pytest
import torch
from torch.nn import functional

from services.node_agent.engine.torch import linear as module
from services.node_agent.engine.torch.linear import linear


@pytest.fixture(params=["onednn", "as PyTorch does"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "uses_onednn", lambda: request.param == "onednn")


@pytest.mark.parametrize("num_rows", [1, 7, 130])
@pytest.mark.parametrize("with_bias", [False, True])
def test_outputs_and_gradients_are_those_of_pytorch(num_rows: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    shapes = [(num_rows, 48), (96, 48), (96,)][: 3 if with_bias else 2]
    ours = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    scale = torch.randn(num_rows, 96, generator=generator)
    output, expected = linear(*ours), functional.linear(*theirs)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-4)
    # The gradient of a sum is one number stretched to a matrix, that of a transposed product lies across.
    for loss, reference in (
        (output.sum(), expected.sum()),
        ((output.t() * scale.t()).sum(), (expected.t() * scale.t().double()).sum()),
    ):
        gradients = torch.autograd.grad(loss, ours, retain_graph=True)
        wanted = torch.autograd.grad(reference, theirs, retain_graph=True)
        for gradient, want in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient.double(), want, rtol=1e-5, atol=1e-4)


def test_only_what_is_wanted_is_differentiated() -> None:
    rows, weight = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8)
    linear(rows, weight).sum().backward()
    assert rows.grad is not None
    with torch.inference_mode():
        assert not linear(rows, weight).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_left_to_pytorch(dtype: torch.dtype) -> None:
    rows, weight = torch.randn(3, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    assert torch.equal(linear(rows, weight), functional.linear(rows, weight))


def test_mixed_precision_is_left_to_pytorch() -> None:
    rows, weight = torch.randn(3, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(rows, weight).dtype == torch.bfloat16


def test_a_batch_without_rows_stays_empty() -> None:
    assert linear(torch.empty(0, 8), torch.randn(4, 8)).shape == (0, 4)
