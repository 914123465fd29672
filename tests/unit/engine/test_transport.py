"""Shared memory between stage workers: bounded, reused, and safe against tasks that are forgotten."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator

import pytest
import torch

from services.node_agent.engine.handle import Handle
from services.node_agent.engine.torch.arena import create_arena
from services.node_agent.engine.torch.device_sharing import share_device_memory
from services.node_agent.engine.torch.shared_transport import SharedTransport
from services.node_agent.engine.torch.transport import ActivationLost, ArenaFull, LocalTransport
from services.node_agent.engine.torch.wire import Place, Shared, Sharing
from tests.unit.engine.file_memory import FileMemories, FileMemory

CPU = torch.device("cpu")
SIZE = 64 * 1024
#: Nearly half an arena, in float32.
HALF = (SIZE // 8 - 64,)


Pair = tuple[SharedTransport, SharedTransport]


class Worker:
    """A worker whose end of the transport is in this process."""

    def __init__(self, transport: SharedTransport) -> None:
        self._transport = transport

    def share(self, message: Sharing) -> "asyncio.Future[Shared]":
        """See SharingWorker."""
        answer: asyncio.Future[Shared] = asyncio.get_running_loop().create_future()
        answer.set_result(self._transport.share(message))
        return answer


async def share(pair: Pair) -> str:
    return await share_device_memory([Worker(end) for end in pair])


@contextlib.contextmanager
def connected(*memories: FileMemories | None) -> Iterator[Pair]:
    """Two workers' ends."""
    fds = [create_arena(SIZE, SIZE), create_arena(SIZE, SIZE)]
    first, second = (
        SharedTransport(stage, fds, SIZE, devices=devices, device_bytes=SIZE) for stage, devices in enumerate(memories)
    )
    for fd in fds:
        os.close(fd)
    yield first, second
    first.close()
    second.close()


@pytest.fixture(params=["host", "device"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    """Outputs in host memory, and in what stands for memory of devices."""
    with connected(FileMemories(), FileMemories()) as ends:
        if request.param == "device":
            assert await share(ends) == ""
        yield ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_arrive_both_ways(pair: Pair, dtype: torch.dtype) -> None:
    for sender, receiver in (pair, pair[::-1]):
        tensor = torch.randn(7, 5).to(dtype).t()
        received = receiver.take(sender.put(tensor, ["t"]), CPU)
        assert received.dtype == dtype
        assert torch.equal(received, tensor)


def test_read_blocks_are_used_again(pair: Pair) -> None:
    """Far more passes through than fits at once, with several outputs waiting."""
    sender, receiver = pair
    waiting: list[tuple[Handle, torch.Tensor]] = []
    for number in range(300):
        receiver.settle()
        tensor = torch.full((number % 37 * 64 + 1,), float(number))
        waiting.append((sender.put(tensor, [f"t{number}"]), tensor))
        if len(waiting) == 3:
            handle, expected = waiting.pop(number % 3)
            assert torch.equal(receiver.take(handle, CPU), expected)


def fill(sender: SharedTransport) -> list[Handle]:
    """As many outputs of nearly half an arena as there is room for."""
    handles: list[Handle] = []
    with contextlib.suppress(ArenaFull):
        while True:
            handles.append(sender.put(torch.full(HALF, float(len(handles))), [f"t{len(handles)}"]))
    return handles


def test_full_arena_says_so_and_recovers(pair: Pair) -> None:
    sender, receiver = pair
    handles = fill(sender)
    with pytest.raises(ArenaFull, match="does not fit into stage 0's arena of 65536 bytes; 2 outputs wait to be read"):
        sender.put(torch.zeros(HALF), ["one too many"])
    receiver.take(handles[0], CPU)
    receiver.settle()
    again = sender.put(torch.full(HALF, 9.0), ["again"])
    assert [float(receiver.take(handle, CPU)[0]) for handle in (*handles[1:], again)] == [*range(1, len(handles)), 9.0]


def test_what_does_not_fit_on_the_device_goes_through_the_host() -> None:
    with connected(FileMemories(), FileMemories()) as ends:
        assert asyncio.run(share(ends)) == ""
        places = [handle.token for handle in fill(ends[0])]
        assert [place.on_device for place in places if isinstance(place, Place)] == [True, True, False, False]


def test_a_block_that_a_device_may_still_read_is_not_written() -> None:
    """The reader's kernels run behind what it computed so far."""
    with connected(FileMemories(), FileMemories()) as ends:
        assert asyncio.run(share(ends)) == ""
        sender, receiver = ends
        first = sender.put(torch.zeros(HALF), ["a"])
        receiver.take(first, CPU)
        second = sender.put(torch.ones(HALF), ["b"])
        receiver.settle()
        third = sender.put(torch.ones(HALF), ["c"])
        offsets = [handle.token.offset for handle in (first, second, third) if isinstance(handle.token, Place)]
        assert offsets[0] != offsets[1]
        assert offsets[0] == offsets[2]


def test_an_output_computed_in_place_is_not_copied(pair: Pair) -> None:
    sender, receiver = pair
    output = sender.allocate((4, 3), torch.float64, CPU)
    torch.add(torch.ones(4, 3), 1.0, out=output)
    received = receiver.take(sender.put(output.detach(), ["a"]), CPU)
    assert torch.equal(received, torch.full((4, 3), 2.0, dtype=torch.float64))
    output += 1.0
    assert torch.equal(received, torch.full((4, 3), 3.0, dtype=torch.float64))
    # It was given away: once more it is an output like any other.
    copied = receiver.take(sender.put(output, ["b"]), CPU)
    output += 1.0
    assert torch.equal(copied, torch.full((4, 3), 3.0, dtype=torch.float64))


def test_what_was_allocated_and_not_published_is_free_after_the_op(pair: Pair) -> None:
    sender, _ = pair
    for _ in range(10):
        sender.allocate(HALF, torch.float32, CPU)
        sender.forget(["t"])
        sender.settle()
    assert len(fill(sender)) >= 2
    # Without room it is memory of its own, and what is computed there waits for room like any other output.
    output = sender.allocate(HALF, torch.float32, CPU)
    with pytest.raises(ArenaFull):
        sender.put(output, ["t"])


class Noted(FileMemories):
    """Notes in which order memory is let go of."""

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes

    def create(self, num_bytes: int) -> FileMemory:
        """See DeviceMemories."""
        return self._noting(super().create(num_bytes), "freed")

    def open(self, export: bytes, num_bytes: int) -> FileMemory:
        """See DeviceMemories."""
        return self._noting(super().open(export, num_bytes), "closed")

    def _noting(self, memory: FileMemory, note: str) -> FileMemory:
        close = memory.close
        memory.close = lambda: (self._notes.append(note), close())  # type: ignore[assignment, func-returns-value]
        return memory


class NotedAndBroken(Noted):
    """And what it opens holds something else."""

    def open(self, export: bytes, num_bytes: int) -> FileMemory:
        """See DeviceMemories."""
        memory = super().open(export, num_bytes)
        memory.tensor(0, 1, torch.uint8).bitwise_not_()
        return memory


async def test_device_memory_is_freed_when_nobody_has_it_open() -> None:
    notes: list[str] = []
    with connected(Noted(notes), NotedAndBroken(notes)) as ends:
        assert "not what was written" in await share(ends)
        assert notes == ["closed", "closed", "freed", "freed"]


class Broken(FileMemories):
    """What it opens holds something else."""

    def open(self, export: bytes, num_bytes: int) -> FileMemory:
        """See DeviceMemories."""
        return self.create(num_bytes)


class Refused(FileMemories):
    """The driver does not open it."""

    def open(self, export: bytes, num_bytes: int) -> FileMemory:
        """See DeviceMemories."""
        raise OSError("CUDA error 217")


@pytest.mark.parametrize(
    ("devices", "problem"),
    [
        (Broken(), "stage 1: what it reads from a device is not what was written"),
        (Refused(), "stage 1: CUDA error 217"),
        (None, "stage 1: it has no device whose memory can be shared"),
    ],
)
async def test_one_stage_that_cannot_read_a_device_keeps_all_on_the_host(
    devices: FileMemories | None, problem: str
) -> None:
    fds_before = len(os.listdir("/proc/self/fd"))
    with connected(FileMemories(), devices) as ends:
        assert await share(ends) == problem
        for sender, receiver in (ends, ends[::-1]):
            handle = sender.put(torch.ones(3), ["a"])
            assert isinstance(handle.token, Place)
            assert not handle.token.on_device
            assert torch.equal(receiver.take(handle, CPU), torch.ones(3))
        # Every end maps every arena, and nothing else.
        assert len(os.listdir("/proc/self/fd")) == fds_before + len(ends) ** 2


def test_unread_output_is_released_when_all_its_tasks_are_forgotten(pair: Pair) -> None:
    sender, receiver = pair
    handles = [sender.put(torch.zeros(HALF), ["a", "b"]), *fill(sender)]
    sender.forget(["a"])
    with pytest.raises(ArenaFull):
        sender.put(torch.zeros(HALF), ["c"])
    sender.forget(["b", "unknown"])
    again = sender.put(torch.ones(HALF), ["c"])
    assert torch.equal(receiver.take(again, CPU), torch.ones(HALF))
    with pytest.raises(ActivationLost, match="stage 0"):
        receiver.take(handles[0], CPU)


def test_a_handle_is_read_once(pair: Pair) -> None:
    sender, receiver = pair
    handle = sender.put(torch.zeros(4), ["a"])
    receiver.take(handle, CPU)
    with pytest.raises(ActivationLost):
        receiver.take(handle, CPU)


def test_received_tensor_is_private(pair: Pair) -> None:
    sender, receiver = pair
    received = receiver.take(sender.put(torch.zeros(4), ["a"]), CPU)
    sender.put(torch.ones(4), ["b"])
    assert torch.equal(received, torch.zeros(4))
    local = LocalTransport()
    original = torch.zeros(4)
    handle = local.put(original, ["a"])
    original += 1
    assert torch.equal(local.take(handle, CPU), torch.zeros(4))
