"""`functional.linear` with the faster of the two matrix libraries that PyTorch brings.

In float32 PyTorch multiplies with MKL, which has no AVX-512 kernels for processors of other makers than Intel; oneDNN,
which PyTorch uses for other types and for compiled models, has. On an AMD EPYC it takes half the time, see
docs/decisions.md.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (T, inputs), weight (outputs, inputs), bias (outputs,) -> (T, outputs)."""
    is_float32 = rows.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if not is_float32 or rows.device.type != "cpu" or rows.numel() == 0 or not uses_onednn():
        return functional.linear(rows, weight, bias)
    if torch.is_grad_enabled():
        output: Tensor = _Linear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
        return output
    return _multiply(rows, weight, bias)


@functools.cache
def uses_onednn() -> bool:
    """Whether this processor is one of those that MKL is slow on."""
    has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not has_onednn:
        return False
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    maker = next((line for line in lines if line.startswith("vendor_id")), "")
    return bool(maker) and "GenuineIntel" not in maker


class _Linear(torch.autograd.Function):
    """oneDNN forward and backward, on the weights as they lie: they change with every optimizer step, so that packing
    them for the library would not pay."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `linear`."""
        ctx.save_for_backward(rows, weight)
        return _multiply(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of rows, weight and bias, those that are wanted."""
        rows, weight = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            _multiply(gradient, weight.t()) if wants_rows else None,
            _multiply(gradient.t(), rows.t()) if wants_weight else None,
            gradient.sum(0) if wants_bias else None,
        )


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # What torch.compile puts in the place of a linear on the CPU; no public function takes float32 to oneDNN.
    output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return output
