"""The paged KV cache against a plain dictionary, under random arrivals, growth, hand-overs and departures."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.node_agent.engine.torch.cached_attention import DecodeAttention
from services.node_agent.engine.torch.kv_cache import KvCache, KvCacheFull, KvEntry, KvShape, plan_write

BLOCKS, BLOCK = 12, 4
SHAPE = KvShape(
    num_layers=2, kv_heads=2, head_dim=3, dtype=torch.float64, device=torch.device("cpu"), block_tokens=BLOCK
)
ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "grow", "free", "trim", "take"]),
        st.integers(0, 4),
        st.integers(0, 4),
        st.integers(1, 20),
    ),
    max_size=40,
)


def write(cache: KvCache, entry: KvEntry, rows: Tensor) -> None:
    """Append the rows as keys, and their negation as values, in every layer."""
    cache.grow(entry, entry.used + len(rows))
    plan = plan_write(cache, [entry], [(0, entry.used, len(rows))], len(rows))
    for layer in range(SHAPE.num_layers):
        plan(layer, rows + layer, -rows - layer)
    entry.token_ids += [1] * len(rows)


def blocks(tokens: int) -> int:
    """Blocks that hold so many tokens."""
    return math.ceil(tokens / BLOCK)


@settings(max_examples=100, deadline=None)
@given(ACTIONS)
def test_contents_survive_and_no_block_is_lost(actions: list[tuple[str, int, int, int]]) -> None:
    cache = KvCache(SHAPE, BLOCKS)
    expected: dict[str, Tensor] = {}
    for action, number, other, amount in actions:
        name, earlier = f"r{number}", f"r{other}"
        if action == "free":
            cache.free(name)
            expected.pop(name, None)
        elif action == "open":
            assert cache.open(name).used == 0
            expected[name] = torch.zeros(0, 2, 3, dtype=torch.float64)
        elif action == "take" and name != earlier:
            entry = cache.take_over(name, earlier)
            expected[name] = expected.pop(earlier, torch.zeros(0, 2, 3, dtype=torch.float64))
            assert entry.used == len(expected[name])
        elif action == "trim" and name in expected:
            expected[name] = expected[name][:amount]
            cache.trim(cache.entry(name), len(expected[name]))
        elif action == "grow" and name in expected:
            rows = torch.randn(amount, 2, 3, dtype=torch.float64)
            held = sum(blocks(len(kept)) for kept in expected.values())
            need = blocks(len(expected[name]) + amount) - blocks(len(expected[name]))
            if held + need > BLOCKS:
                with pytest.raises(KvCacheFull, match=f"{need} blocks of 4 tokens are needed; {held} of 12"):
                    write(cache, cache.entry(name), rows)
                continue
            write(cache, cache.entry(name), rows)
            expected[name] = torch.cat([expected[name], rows])
        assert len(cache) == len(expected)
        held_blocks = [block for kept in expected for block in cache.entry(kept).blocks]
        assert len(set(held_blocks)) == len(held_blocks) == cache.used_blocks
        assert cache.used_blocks == sum(blocks(len(kept)) for kept in expected.values())
        for known, rows in expected.items():
            for layer in range(SHAPE.num_layers):
                keys, values = cache.read(layer, cache.entry(known), len(rows))
                assert torch.equal(keys.transpose(0, 1), rows + layer)
                assert torch.equal(values.transpose(0, 1), -rows - layer)


def test_the_lowest_free_block_is_used_first() -> None:
    cache = KvCache(SHAPE, BLOCKS)
    for name in ("a", "b", "c"):
        write(cache, cache.open(name), torch.ones(6, 2, 3, dtype=torch.float64))
    cache.free("b")
    write(cache, cache.open("d"), torch.ones(9, 2, 3, dtype=torch.float64))
    assert cache.entry("d").blocks == [2, 3, 6]


def test_bytes_in_use_are_those_of_the_tensors() -> None:
    cache = KvCache(SHAPE, BLOCKS)
    write(cache, cache.open("a"), torch.ones(6, 2, 3, dtype=torch.float64))
    tensors = (*cache.keys, *cache.values)
    assert cache.used_bytes == sum(tensor.nbytes for tensor in tensors) * 2 // BLOCKS


def test_a_block_used_before_brings_nothing_along() -> None:
    """Also not NaN: what is masked has weight zero, and zero times NaN is NaN."""
    cache = KvCache(SHAPE, 1)
    assert all(bool((tensor == 0.0).all()) for tensor in (*cache.keys, *cache.values))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=6), st.integers(0, 9))
def test_decode_attends_to_every_position_of_its_own_request(requests: list[tuple[int, bool]], seed: int) -> None:
    """Dense and scattered batches, full and begun blocks, one block and several."""
    torch.manual_seed(seed)
    cache = KvCache(SHAPE, 60)
    for index, (length, _) in enumerate(requests):
        write(cache, cache.open(f"r{index}"), torch.randn(length, 2, 3, dtype=torch.float64))
    chosen = [index for index, (_, is_chosen) in enumerate(requests) if is_chosen] or [0]
    entries = [cache.entry(f"r{index}") for index in chosen]
    query = torch.randn(len(chosen), 4, 3, dtype=torch.float64)
    plan = DecodeAttention.plan(cache, entries, [entry.used - 1 for entry in entries])
    for layer in range(SHAPE.num_layers):
        found = plan.attend(layer, query, 0.5)
        for row, entry in enumerate(entries):
            keys, values = cache.read(layer, entry, entry.used)
            scores = (query[row].view(2, 2, 3) @ keys.transpose(1, 2)) * 0.5
            expected = (scores.softmax(-1) @ values).reshape(4, 3)
            assert torch.allclose(found[row], expected, rtol=1e-12, atol=1e-12)


def test_unknown_request() -> None:
    cache = KvCache(SHAPE, 10)
    cache.free("nobody")
    with pytest.raises(KeyError, match="nobody has no KV cache"):
        cache.entry("nobody")
