"""How activations and gradients get from one stage worker to another: what both ways to do it have in common, and the
one between stages of one process. See shared_transport for that between processes."""

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from services.node_agent.engine.handle import Handle
from services.node_agent.engine.torch.wire import Shared, Sharing


class ActivationLost(RuntimeError):
    """A handle's tensor is gone: its tasks were forgotten."""


class ArenaFull(RuntimeError):
    """The outputs nobody has read yet leave no room for another one; the message holds the numbers."""


class Transport(Protocol):
    """One worker's end."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory to compute an output in, so that `put` need not copy it. Never fails for lack of room: without any it
        is memory like any other."""
        ...

    def put(self, tensor: Tensor, task_ids: Collection[str]) -> Handle:
        """Publish a tensor for another worker; `task_ids` are the tasks it belongs to. One that was allocated here is
        given away: its caller does not look at it again. Raises ArenaFull."""
        ...

    def take(self, handle: Handle, device: torch.device) -> Tensor:
        """A published tensor, the caller's own from now on; it can be taken once. Raises ActivationLost."""
        ...

    def settle(self) -> None:
        """An op has come to its end on the device: what was read and freed meanwhile can be written again, and so can
        what was allocated and not published."""
        ...

    def forget(self, task_ids: Collection[str]) -> None:
        """Release unread tensors all of whose tasks are forgotten."""
        ...

    def share(self, message: Sharing) -> Shared:
        """One step of sharing device memory with the other stages."""
        ...

    def close(self) -> None:
        """Let go of the memory."""
        ...


class LocalTransport:
    """Between stages of one process: the handle is the tensor."""

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """See Transport."""
        return torch.empty(shape, dtype=dtype, device=device)

    def put(self, tensor: Tensor, task_ids: Collection[str]) -> Handle:
        """See Transport."""
        del task_ids
        return Handle(tensor.clone())

    def take(self, handle: Handle, device: torch.device) -> Tensor:
        """See Transport."""
        assert isinstance(handle.token, Tensor)
        # Cloned because the tensor may have been made in inference mode, or still be in use by who made it.
        return handle.token.to(device, copy=True)

    def settle(self) -> None:
        """See Transport."""

    def forget(self, task_ids: Collection[str]) -> None:
        """See Transport."""

    def share(self, message: Sharing) -> Shared:
        """See Transport."""
        del message
        return Shared(problem="the stages of one process share all memory")

    def close(self) -> None:
        """See Transport."""
