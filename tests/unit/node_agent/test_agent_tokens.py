"""Fan-out of tokens to gateways."""

import asyncio
from contextlib import aclosing

import pytest

from lemix.errors import ErrorCode, LemixError
from lemix.internal.v1 import work_pb2
from services.node_agent import tokens as tokens_module
from services.node_agent.tokens import TokenHub, TokenReader
from services.runtime.clock import FakeClock


def _outcome(*token_ids: int) -> work_pb2.InferenceOutcome:
    return work_pb2.InferenceOutcome(token_ids=token_ids, prompt_tokens=1)


def _hub(ttl_s: float = 60.0) -> tuple[TokenHub, FakeClock]:
    clock = FakeClock()
    return TokenHub(clock, ttl_s), clock


async def _next(reader: TokenReader) -> list[tuple[str, int, list[int], bool]]:
    async with aclosing(reader.responses()) as responses:
        response = await asyncio.wait_for(anext(responses), 1.0)
    return [(c.request_id, c.offset, list(c.token_ids), c.HasField("outcome")) for c in response.chunks]


async def test_chunks_of_one_step_travel_together() -> None:
    hub, _ = _hub()
    reader = hub.open()
    for request_id in ("a", "b"):
        hub.begin(request_id)
        reader.attach(request_id, 0)
    hub.append("a", [1])
    hub.append("b", [2])
    hub.append("a", [3])
    assert await _next(reader) == [("a", 0, [1, 3], False), ("b", 0, [2], False)]
    hub.append("b", [4])
    assert await _next(reader) == [("b", 1, [4], False)]


async def test_tokens_after_the_first_wait_for_the_next_message_and_ends_do_not() -> None:
    hub = TokenHub(FakeClock(), 60.0, flush_s=3600.0)
    reader = hub.open()
    hub.begin("a")
    reader.attach("a", 0)
    hub.append("a", [1])
    async with aclosing(reader.responses()) as responses:
        first = await asyncio.wait_for(anext(responses), 1.0)
        assert list(first.chunks[0].token_ids) == [1]
        following = asyncio.ensure_future(anext(responses))
        for token in (2, 3):
            hub.append("a", [token])
            await asyncio.sleep(0)
        assert not following.done(), "an hour is not over"
        hub.begin("b")
        reader.attach("b", 0)
        hub.append("b", [9])
        message = await asyncio.wait_for(following, 1.0)
        assert {chunk.request_id: list(chunk.token_ids) for chunk in message.chunks} == {"a": [2, 3], "b": [9]}
        hub.append("a", [4])
        hub.finish("a", _outcome(1, 2, 3, 4))
        last = await asyncio.wait_for(anext(responses), 1.0)
        assert [(list(c.token_ids), c.HasField("outcome")) for c in last.chunks] == [([4], True)]


async def test_a_message_that_is_due_leaves_without_a_first_token() -> None:
    hub = TokenHub(FakeClock(), 60.0, flush_s=0.01)
    reader = hub.open()
    hub.begin("a")
    reader.attach("a", 1)
    hub.append("a", [1, 2])
    assert await _next(reader) == [("a", 1, [2], False)]


async def test_attach_before_the_request_is_known_and_from_an_offset() -> None:
    hub, _ = _hub()
    reader = hub.open()
    reader.attach("a", 2)
    waiting = asyncio.create_task(_next(reader))
    await asyncio.sleep(0)
    hub.begin("a")
    hub.append("a", [1, 2])
    await asyncio.sleep(0)
    assert not waiting.done(), "it has those already"
    hub.append("a", [3])
    assert await waiting == [("a", 2, [3], False)]


async def test_the_outcome_comes_with_the_last_tokens_and_ends_the_stream() -> None:
    hub, _ = _hub()
    reader = hub.open()
    reader.attach("a", 0)
    reader.end_attaching()
    hub.begin("a")
    hub.append("a", [1, 2])
    hub.finish("a", _outcome(1, 2))
    responses = [response async for response in reader.responses()]
    assert [list(chunk.token_ids) for chunk in responses[0].chunks] == [[1, 2]]
    assert responses[0].chunks[0].outcome == _outcome(1, 2)
    assert hub.output("a") is None, "delivered"


async def test_a_request_taken_again_goes_on_where_the_reader_is() -> None:
    hub, _ = _hub()
    reader = hub.open()
    reader.attach("a", 0)
    hub.begin("a")
    hub.append("a", [1, 2])
    assert await _next(reader) == [("a", 0, [1, 2], False)]
    hub.begin("a")
    hub.append("a", [1])
    hub.append("a", [2, 3])
    assert await _next(reader) == [("a", 2, [3], False)]


async def test_two_readers_each_get_everything() -> None:
    hub, _ = _hub()
    one, two = hub.open(), hub.open()
    for reader in (one, two):
        reader.attach("a", 0)
        reader.end_attaching()
    hub.finish("a", _outcome())
    assert len([response async for response in one.responses()]) == 1
    assert hub.output("a") is not None, "the other one waits"
    assert len([response async for response in two.responses()]) == 1
    assert hub.output("a") is None


async def test_a_closed_reader_keeps_the_output_for_the_next() -> None:
    hub, _ = _hub()
    reader = hub.open()
    reader.attach("a", 0)
    hub.close(reader)
    hub.begin("a")
    hub.append("a", [1])
    hub.finish("a", _outcome(1))
    again = hub.open()
    again.attach("a", 0)
    assert await _next(again) == [("a", 0, [1], True)]


async def test_unfetched_outputs_go_after_their_time_and_beyond_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, clock = _hub(ttl_s=10.0)
    hub.finish("old", _outcome())
    clock.advance(11.0)
    hub.finish("new", _outcome())
    assert (hub.output("old"), hub.output("new") is not None) == (None, True)
    monkeypatch.setattr(tokens_module, "_MAX_FINISHED", 2)
    hub.finish("newer", _outcome())
    hub.finish("newest", _outcome())
    assert [name for name in ("new", "newer", "newest") if hub.output(name)] == ["newer", "newest"]


async def test_long_outputs_are_cut_and_the_outcome_is_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_MAX_CHUNK_TOKENS", 2)
    hub, _ = _hub()
    reader = hub.open()
    reader.attach("a", 0)
    reader.end_attaching()
    hub.begin("a")
    hub.append("a", [1, 2, 3, 4, 5])
    hub.finish("a", _outcome(1, 2, 3, 4, 5))
    chunks = [chunk async for response in reader.responses() for chunk in response.chunks]
    assert [(c.offset, list(c.token_ids), c.HasField("outcome")) for c in chunks] == [
        (0, [1, 2], False),
        (2, [3, 4], False),
        (4, [5], True),
    ]


async def test_attaching_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_MAX_ATTACHED", 1)
    hub, _ = _hub()
    reader = hub.open()
    reader.attach("a", 0)
    reader.attach("a", 3)
    with pytest.raises(LemixError) as caught:
        reader.attach("b", 0)
    assert caught.value.code is ErrorCode.OVERLOADED


async def test_end_all_ends_waiting_streams() -> None:
    hub, _ = _hub()
    reader = hub.open()
    reader.attach("a", 0)

    async def drain() -> int:
        return len([response async for response in reader.responses()])

    waiting = asyncio.create_task(drain())
    await asyncio.sleep(0)
    hub.end_all()
    assert await asyncio.wait_for(waiting, 1.0) == 0
