"""Shared memory between stage workers: bounded, reused, and safe against tasks that are forgotten."""

import os
from collections.abc import Iterator

import pytest
import torch

from services.node_agent.engine.handle import Handle
from services.node_agent.engine.torch.arena import create_arena
from services.node_agent.engine.torch.transport import ActivationLost, ArenaFull, LocalTransport, SharedTransport

CPU = torch.device("cpu")
SIZE = 64 * 1024


@pytest.fixture
def pair() -> Iterator[tuple[SharedTransport, SharedTransport]]:
    """Two workers' ends."""
    fds = [create_arena(SIZE), create_arena(SIZE)]
    ends = SharedTransport(0, fds, SIZE), SharedTransport(1, fds, SIZE)
    for fd in fds:
        os.close(fd)
    yield ends
    for end in ends:
        end.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_arrive_both_ways(pair: tuple[SharedTransport, SharedTransport], dtype: torch.dtype) -> None:
    for sender, receiver in (pair, pair[::-1]):
        tensor = torch.randn(7, 5).to(dtype).t()
        received = receiver.take(sender.put(tensor, ["t"]), CPU)
        assert received.dtype == dtype
        assert torch.equal(received, tensor)


def test_read_blocks_are_used_again(pair: tuple[SharedTransport, SharedTransport]) -> None:
    """Far more passes through than fits at once, with several outputs waiting."""
    sender, receiver = pair
    waiting: list[tuple[Handle, torch.Tensor]] = []
    for number in range(300):
        tensor = torch.full((number % 37 * 64 + 1,), float(number))
        waiting.append((sender.put(tensor, [f"t{number}"]), tensor))
        if len(waiting) == 3:
            handle, expected = waiting.pop(number % 3)
            assert torch.equal(receiver.take(handle, CPU), expected)


def test_full_arena_says_so_and_recovers(pair: tuple[SharedTransport, SharedTransport]) -> None:
    sender, receiver = pair
    half = torch.zeros(SIZE // 8 - 64)
    first = sender.put(half, ["a"])
    sender.put(half, ["b"])
    with pytest.raises(ArenaFull, match="2 outputs wait to be read"):
        sender.put(half, ["c"])
    receiver.take(first, CPU)
    sender.put(half, ["c"])


def test_unread_output_is_released_when_all_its_tasks_are_forgotten(
    pair: tuple[SharedTransport, SharedTransport],
) -> None:
    sender, receiver = pair
    whole = torch.zeros(SIZE // 4 - 64)
    handle = sender.put(whole, ["a", "b"])
    sender.forget(["a"])
    with pytest.raises(ArenaFull):
        sender.put(whole, ["c"])
    sender.forget(["b", "unknown"])
    assert torch.equal(receiver.take(sender.put(whole + 1, ["c"]), CPU), whole + 1)
    with pytest.raises(ActivationLost, match="stage 0"):
        receiver.take(handle, CPU)


def test_a_handle_is_read_once(pair: tuple[SharedTransport, SharedTransport]) -> None:
    sender, receiver = pair
    handle = sender.put(torch.zeros(4), ["a"])
    receiver.take(handle, CPU)
    with pytest.raises(ActivationLost):
        receiver.take(handle, CPU)


def test_received_tensor_is_private(pair: tuple[SharedTransport, SharedTransport]) -> None:
    sender, receiver = pair
    received = receiver.take(sender.put(torch.zeros(4), ["a"]), CPU)
    sender.put(torch.ones(4), ["b"])
    assert torch.equal(received, torch.zeros(4))
    local = LocalTransport()
    original = torch.zeros(4)
    handle = local.put(original, ["a"])
    original += 1
    assert torch.equal(local.take(handle, CPU), torch.zeros(4))
