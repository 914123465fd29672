"""Tensors that autograd saved for a micro-batch, and their way to host memory and back.

Host memory is pinned where the device is a GPU. On the CPU it is memory of its own all the same: what goes there leaves
the account of the device, and comes back as a copy.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

_Key = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor.detach())


class _Slot:
    """A saved tensor, here or in host memory."""

    __slots__ = ("__weakref__", "device", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.device = tensor.device


class SavedTensors:
    """What graphs made under `recording` hold, but for parameters. Freed with the graphs."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        # Where a parameter is saved, the graph holds what the stage holds anyway.
        self._kept = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._slots: WeakSet[_Slot] = WeakSet()
        # Those whose tensors are where they were when they were saved: only then does an address tell them apart.
        self._unmoved: WeakValueDictionary[_Key, _Slot] = WeakValueDictionary()
        self._is_away = False
        #: In host memory: the data of tensors that others hold, by what they are.
        self._away: list[tuple[Tensor, Tensor]] = []

    def recording(self) -> AbstractContextManager[object]:
        """Graphs made in here save their tensors so that they can be moved."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def num_bytes(self, others: Iterable[Tensor]) -> int:
        """Bytes on the device: what graphs saved, and what of `others` they did not save too."""
        if self._is_away:
            return 0
        found = {_key(slot.tensor): slot.tensor for slot in self._slots}
        found.update((_key(tensor), tensor) for tensor in others)
        return sum(tensor.numel() * tensor.dtype.itemsize for tensor in found.values())

    def offload(self, others: Iterable[Tensor]) -> None:
        """Everything to host memory; `others` stay the tensors they are, without data."""
        self._is_away = True
        self._unmoved.clear()
        for slot in self._slots:
            slot.tensor = to_host(slot.tensor)
        for tensor in others:
            self._away.append((tensor, to_host(tensor)))
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def reload(self) -> None:
        """Everything back to the device."""
        for slot in self._slots:
            slot.tensor = slot.tensor.to(slot.device, copy=True)
        for tensor, data in self._away:
            tensor.data = data.to(tensor.device, copy=True)
        self._away = []
        self._is_away = False

    def _pack(self, tensor: Tensor) -> _Slot | Tensor:
        if tensor.untyped_storage().data_ptr() in self._kept:
            return tensor
        key = _key(tensor)
        slot = self._unmoved.get(key)
        if slot is None:
            slot = self._unmoved[key] = _Slot(tensor)
            self._slots.add(slot)
        return slot

    def _unpack(self, packed: _Slot | Tensor) -> Tensor:
        return packed.tensor if isinstance(packed, _Slot) else packed


def _key(tensor: Tensor) -> _Key:
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
