"""Memory of a GPU that the workers of several stages use, through the IPC of the CUDA driver.

Not torch's own sharing of tensors: it counts references in files with names, which processes that are killed leave
behind, and wants one export per reader. Here a stage exports one allocation, once; which part of it is in use stands in
the headers of the blocks. The driver copies between GPUs that can read each other's memory, and refuses others.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LIBRARY = "libcuda.so.1"
_LAZY_ENABLE_PEER_ACCESS = 1


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class _Span:
    """Bytes on the device, as torch takes them over without a copy; it keeps this object as long as the storage."""

    address: int
    num_bytes: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html"""
        return {
            "shape": (self.num_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 2,
        }


class CudaMemory:
    """One allocation, made here or opened from another process."""

    def __init__(self, device: torch.device, address: int, *, opened: bool, export: bytes = b"") -> None:
        self.device = device
        self.address = address
        self.export = export
        self._opened = opened

    def tensor(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """See Memory."""
        return self.borrow(start, count, dtype)[0]

    def borrow(self, start: int, count: int, dtype: torch.dtype) -> tuple[Tensor, object]:
        """See Memory."""
        span = _Span(self.address + start, count * dtype.itemsize)
        return torch.as_tensor(span, device=self.device).view(dtype), span

    def close(self) -> None:
        """See Memory."""
        name = "cuIpcCloseMemHandle" if self._opened else "cuMemFree_v2"
        with torch.cuda.device(self.device):
            torch.cuda.synchronize()
            _call(name, ctypes.c_uint64(self.address))


class CudaMemories:
    """Of the device of one stage. See DeviceMemories."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)

    def create(self, num_bytes: int) -> CudaMemory:
        """See DeviceMemories."""
        address, handle = ctypes.c_uint64(), _IpcHandle()
        with torch.cuda.device(self._device):
            # The driver works in the context of this thread, which torch makes the device's.
            torch.cuda.synchronize()
            _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
            memory = CudaMemory(self._device, address.value, opened=False)
            try:
                _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
            except OSError:
                memory.close()
                raise
        memory.export = bytes(handle.reserved)
        return memory

    def open(self, export: bytes, num_bytes: int) -> CudaMemory:
        """See DeviceMemories."""
        del num_bytes
        address, handle = ctypes.c_uint64(), _IpcHandle.from_buffer_copy(export)
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS))
        return CudaMemory(self._device, address.value, opened=True)


def _call(name: str, *arguments: Any) -> None:
    """A function of the driver. Raises OSError with its error number."""
    error = getattr(ctypes.CDLL(_LIBRARY), name)(*arguments)
    if error:
        raise OSError(f"{name} failed with CUDA error {error}")
