"""Where rows and gradients leave a stage: computed right where the next stage reads them, instead of copied there.

What leaves a stage is a sum of two tensors, the residual rows and what the last layer adds, and on the way down the two
gradients of the rows that entered the first layer. So the sum is made in memory of the transport.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Memory for a tensor that leaves the stage, by shape, element type and device.
Allocate = Callable[[Sequence[int], torch.dtype, torch.device], Tensor]


@dataclass(frozen=True, slots=True)
class Outlet:
    """output: for rows behind the last layer that runs; gradient: for that of the rows before the first one. None:
    they do not leave the stage."""

    output: Allocate | None = None
    gradient: Allocate | None = None

    def add(self, rows: Tensor, update: Tensor) -> Tensor:
        """rows + update, the output."""
        if self.output is None:
            return rows + update
        if not torch.is_grad_enabled():
            return _add(rows, update, self.output)
        output: Tensor = _Sum.apply(rows, update, self.output)  # type: ignore[no-untyped-call]
        return output

    def fork(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that enter, for the residual sum and for the layer; their gradients are summed into the memory."""
        if self.gradient is None or not torch.is_grad_enabled():
            return rows, rows
        forked: tuple[Tensor, Tensor] = _Fork.apply(rows, self.gradient)  # type: ignore[no-untyped-call]
        return forked


#: For layers between others.
CLOSED = Outlet()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, update: Tensor, allocate: Allocate) -> Tensor:
        """See Outlet.add."""
        return _add(rows, update, allocate)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradient, for both."""
        return gradients[0], gradients[0], None


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, allocate: Allocate) -> tuple[Tensor, Tensor]:
        """See Outlet.fork."""
        ctx.allocate = allocate
        return rows.view_as(rows), rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The sum of the two gradients."""
        return _add(gradients[0], gradients[1], ctx.allocate), None


def _add(one: Tensor, other: Tensor, allocate: Allocate) -> Tensor:
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.add(one, other, out=allocate(one.shape, dtype, one.device))
