"""How activations and gradients get from one stage worker process to another.

Each worker writes into its own arena, an anonymous shared memory file the parent created and every worker inherited:
it has no name, so nothing is left behind however the processes end. Workers on GPUs that can read each other's memory
keep their outputs there, and only the headers of the blocks in the arena. Other CUDA tensors are copied through it.

A reader on the same device works on the block itself. A block is freed by its reader (a mark in the block's header),
when nothing refers to what was read any more, or when all of its tasks are forgotten: the node core sends no op of a
forgotten task, so nobody looks at it again. A reader that comes too late notices by the sequence number.
"""

import contextlib
import itertools
import mmap
import os
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from services.node_agent.engine.handle import Handle
from services.node_agent.engine.torch.arena import ARENA_BYTES, DEVICE_ARENA_BYTES
from services.node_agent.engine.torch.blocks import DATA, Block, Blocks, Headers
from services.node_agent.engine.torch.memory import DeviceMemories, HostMemory, Memory
from services.node_agent.engine.torch.stage import parse_dtype
from services.node_agent.engine.torch.transport import ActivationLost, ArenaFull
from services.node_agent.engine.torch.wire import (
    CloseDeviceMemory,
    ExportDeviceMemory,
    OpenDeviceMemory,
    Place,
    Shared,
    Sharing,
    UseDeviceMemory,
)

_HOST = torch.device("cpu")
_SECRET_BYTES = 16


@dataclass(frozen=True, slots=True)
class _Area:
    """Memory of a stage with the headers of its blocks."""

    memory: Memory
    headers: Headers


@dataclass(frozen=True, slots=True, eq=False)
class _OwnArea:
    """Where this worker publishes."""

    on_device: bool
    memory: Memory
    blocks: Blocks

    def written(self, block: Block, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A block, to be written."""
        return self.memory.tensor(block.offset + DATA, prod(shape), dtype).view(shape)


class SharedTransport:
    """Between processes: arena `stage` is this worker's, the others are read."""

    def __init__(
        self,
        stage: int,
        arena_fds: Sequence[int],
        arena_bytes: int = ARENA_BYTES,
        *,
        devices: DeviceMemories | None = None,
        device_bytes: int = DEVICE_ARENA_BYTES,
    ) -> None:
        """devices: how memory of this stage's device is shared, where it can be."""
        self._stage = stage
        self._devices = devices
        self._arena_bytes = arena_bytes
        self._device_bytes = device_bytes
        self._files = [mmap.mmap(fd, arena_bytes + device_bytes) for fd in arena_fds]
        #: What is read, by whether it is on a device, and stage.
        self._areas = {(False, index): _Area(HostMemory(file), Headers(file)) for index, file in enumerate(self._files)}
        self._sequences = itertools.count(1)
        own = self._areas[False, stage]
        self._host = _OwnArea(False, own.memory, Blocks(own.headers, arena_bytes, self._sequences))
        #: The first one with room that is where a tensor is, else the one on the host, takes it.
        self._own = [self._host]
        #: What was taken and is in use: stage and sequence number.
        self._taken: set[tuple[int, int]] = set()
        #: Freed here, while the device may still be reading it.
        self._unsettled: list[Place] = []

    def allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """See Transport."""
        areas = [area for area in self._own if area.memory.device == device]
        found = _reserve(areas, prod(shape) * dtype.itemsize)
        if found is None:
            return torch.empty(shape, dtype=dtype, device=device)
        area, block = found
        return area.written(block, shape, dtype)

    def put(self, tensor: Tensor, task_ids: Collection[str]) -> Handle:
        """See Transport."""
        area, block = self._allocated(tensor) or self._copied(tensor)
        block.tasks = set(task_ids)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Handle(Place(self._stage, area.on_device, block.offset, block.sequence, dtype, tuple(tensor.shape)))

    def take(self, handle: Handle, device: torch.device) -> Tensor:
        """See Transport."""
        place = handle.token
        assert isinstance(place, Place)
        key, area = (place.stage, place.sequence), self._areas[place.on_device, place.stage]
        tensor: Tensor | None = None
        if key not in self._taken:
            self._taken.add(key)
            count, dtype = prod(place.shape), parse_dtype(place.dtype)
            lying, owner = area.memory.borrow(place.offset + DATA, count, dtype)
            weakref.finalize(owner, self._freed, place).atexit = False
            tensor = lying.view(place.shape).to(device)
        # Checked after a copy: the block may be reused at any time once all its tasks are forgotten.
        if tensor is None or not area.headers.holds(place.offset, place.sequence):
            raise ActivationLost(f"an activation from stage {place.stage} was released before it was read")
        return tensor

    def settle(self) -> None:
        """See Transport."""
        for own in self._own:
            own.blocks.give_up()
        places, self._unsettled = self._unsettled, []
        for place in places:
            self._release(place)

    def forget(self, task_ids: Collection[str]) -> None:
        """See Transport."""
        for area in self._own:
            area.blocks.forget(task_ids)

    def close(self) -> None:
        """See Transport."""
        # The other stages close what they opened at about this time; those who come later find it freed, and end too.
        for let_go in (self._close_devices, self._free_device):
            with contextlib.suppress(OSError, RuntimeError):
                let_go()
        for index in range(len(self._files)):
            self._areas[False, index].memory.close()

    # ------------------------------------------------------------- device memory

    def share(self, message: Sharing) -> Shared:
        """See Transport."""
        try:
            if isinstance(message, ExportDeviceMemory):
                return Shared(export=self._export_device())
            if isinstance(message, OpenDeviceMemory):
                self._open_devices(message.exports)
            elif isinstance(message, UseDeviceMemory):
                own = self._areas[True, self._stage]
                blocks = Blocks(own.headers, self._device_bytes, self._sequences)
                self._own = [_OwnArea(True, own.memory, blocks), self._host]
            elif isinstance(message, CloseDeviceMemory):
                self._close_devices()
            else:
                self._free_device()
        except (OSError, RuntimeError) as error:
            return Shared(problem=str(error))
        return Shared()

    def _export_device(self) -> bytes:
        if self._devices is None:
            raise RuntimeError("it has no device whose memory can be shared")
        memory = self._devices.create(self._device_bytes)
        self._areas[True, self._stage] = _Area(memory, Headers(self._files[self._stage], self._arena_bytes))
        # Not every machine on which memory can be opened reads what is in it.
        secret = os.urandom(_SECRET_BYTES)
        memory.tensor(0, _SECRET_BYTES, torch.uint8).copy_(torch.frombuffer(bytearray(secret), dtype=torch.uint8))
        self._check(memory, secret)
        return secret + memory.export

    def _open_devices(self, exports: Sequence[bytes]) -> None:
        assert self._devices is not None
        for stage, export in enumerate(exports):
            if stage != self._stage:
                memory = self._devices.open(export[_SECRET_BYTES:], self._device_bytes)
                self._areas[True, stage] = _Area(memory, Headers(self._files[stage], self._arena_bytes))
                self._check(memory, export[:_SECRET_BYTES])

    def _check(self, memory: Memory, secret: bytes) -> None:
        if bytes(memory.tensor(0, _SECRET_BYTES, torch.uint8).tolist()) != secret:
            raise RuntimeError("what it reads from a device is not what was written")

    def _close_devices(self) -> None:
        """Those of the other stages."""
        for key in [key for key in self._areas if key[0] and key[1] != self._stage]:
            self._areas.pop(key).memory.close()

    def _free_device(self) -> None:
        """That of this stage."""
        self._own = [self._host]
        own = self._areas.pop((True, self._stage), None)
        if own is not None:
            own.memory.close()

    # ------------------------------------------------------------- blocks

    def _allocated(self, tensor: Tensor) -> tuple[_OwnArea, Block] | None:
        """The block that a tensor was computed in."""
        if not tensor.is_contiguous():
            return None
        for area in self._own:
            block = area.blocks.reserved(tensor.data_ptr() - area.memory.address - DATA)
            if block is not None and area.memory.device == tensor.device:
                return area, block
        return None

    def _copied(self, tensor: Tensor) -> tuple[_OwnArea, Block]:
        """A block with a copy."""
        num_bytes = tensor.numel() * tensor.element_size()
        found = _reserve([area for area in self._own if area.memory.device in (tensor.device, _HOST)], num_bytes)
        if found is None:
            blocks = self._host.blocks
            raise ArenaFull(
                f"an output of {num_bytes} bytes does not fit into stage {self._stage}'s arena of {blocks.size} bytes; "
                f"{len(blocks)} outputs wait to be read"
            )
        area, block = found
        area.written(block, tensor.shape, tensor.dtype).copy_(tensor)
        return found

    def _freed(self, place: Place) -> None:
        """Nothing refers to a taken tensor any more."""
        if place.on_device:
            self._unsettled.append(place)
        else:
            self._release(place)

    def _release(self, place: Place) -> None:
        self._taken.discard((place.stage, place.sequence))
        area = self._areas.get((place.on_device, place.stage))
        if area is not None:
            area.headers.release(place.offset, place.sequence)


def _reserve(areas: Sequence[_OwnArea], num_bytes: int) -> tuple[_OwnArea, Block] | None:
    """A block in the first area with room."""
    for area in areas:
        block = area.blocks.reserve(num_bytes)
        if block is not None:
            return area, block
    return None
