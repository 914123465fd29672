"""The life of one submitted request."""

import asyncio

import pytest

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from lemix.v1 import types_pb2
from services.gateway.pending import PendingRequest, Stage


def _pending() -> PendingRequest:
    return PendingRequest("r", work_pb2.InferenceWork())


def _assigned() -> PendingRequest:
    pending = _pending()
    pending.on_accepted()
    pending.on_assigned("n0", "a:1")
    return pending


def _outcome(tokens: list[int]) -> work_pb2.InferenceOutcome:
    return work_pb2.InferenceOutcome(token_ids=tokens, finish_reason=types_pb2.FINISH_REASON_STOP)


def test_stages() -> None:
    pending = _pending()
    assert pending.stage is Stage.SUBMITTED
    pending.on_accepted()
    assert pending.stage is Stage.ACCEPTED
    pending.on_assigned("n0", "a:1")
    pending.on_accepted()  # repeated after a reconnect
    assert pending.stage is Stage.ASSIGNED
    pending.on_finished(_outcome([]))
    pending.on_assigned("n1", "b:1")
    assert (pending.stage, pending.node_id) == (Stage.FINISHED, "n0")


async def test_tokens_are_kept_once() -> None:
    pending = _assigned()
    pending.on_tokens("a:1", 0, [1, 2])
    pending.on_tokens("a:1", 0, [1, 2])
    pending.on_tokens("a:1", 1, [2, 3])
    assert await pending.next_tokens() == [1, 2, 3]
    pending.on_finished(_outcome([1, 2, 3, 4]))
    pending.on_finished(_outcome([9] * 9))
    assert await pending.next_tokens() == [4]
    assert await pending.next_tokens() == []


async def test_after_a_reassignment_only_what_lies_beyond_is_taken() -> None:
    pending = _assigned()
    pending.on_tokens("a:1", 0, [1, 2])
    pending.on_assigned("n1", "b:1")
    pending.on_tokens("a:1", 2, [99])
    assert pending.num_received == 2
    pending.on_tokens("b:1", 0, [1, 7, 3])
    assert await pending.next_tokens() == [1, 2, 3]


async def test_a_gap_fails_the_request() -> None:
    pending = _assigned()
    pending.on_tokens("a:1", 0, [1])
    pending.on_tokens("a:1", 3, [4])
    assert await pending.next_tokens() == [1]
    with pytest.raises(LemixError, match="skipped tokens 1 to 2") as raised:
        await pending.next_tokens()
    assert raised.value.code is ErrorCode.INTERNAL


async def test_tokens_come_before_the_error() -> None:
    pending = _assigned()
    outcome = _outcome([5, 6])
    outcome.error.CopyFrom(LemixError(ErrorCode.NODE_LOST, "gone").to_proto())
    pending.on_finished(outcome)
    assert await pending.next_tokens() == [5, 6]
    with pytest.raises(LemixError, match="gone"):
        await pending.next_tokens()


async def test_a_waiting_reader_is_woken() -> None:
    pending = _assigned()
    reader = asyncio.create_task(pending.next_tokens())
    await asyncio.sleep(0)
    pending.on_tokens("a:1", 0, [1])
    assert await reader == [1]
    reader = asyncio.create_task(pending.next_tokens())
    await asyncio.sleep(0)
    pending.on_failed(LemixError(ErrorCode.OVERLOADED, "full"))
    with pytest.raises(LemixError, match="full"):
        await reader
    await pending.wait_finished()
