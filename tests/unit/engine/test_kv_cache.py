"""The KV cache against a plain dictionary, under random arrivals and departures."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from services.node_agent.engine.torch.kv_cache import KvCache, KvCacheFull, KvShape, plan_writes

SHAPE = KvShape(num_layers=2, kv_heads=2, head_dim=3, dtype=torch.float64, device=torch.device("cpu"))
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["add", "grow", "free"]), st.integers(0, 7), st.integers(1, 150)), max_size=40
)


def write(cache: KvCache, request_id: str, position: int, rows: Tensor) -> None:
    """Cache the same rows as keys, and their negation as values, in every layer."""
    entry = cache.entry(request_id)
    for plan in plan_writes([entry], [(0, position, len(rows))], len(rows), SHAPE.device):
        for layer in range(SHAPE.num_layers):
            plan(layer, rows + layer, -rows - layer)
    entry.used = position + len(rows)


@settings(max_examples=60, deadline=None)
@given(ACTIONS)
def test_contents_survive_moves_and_growth(actions: list[tuple[str, int, int]]) -> None:
    cache = KvCache(SHAPE, 600)
    expected: dict[str, Tensor] = {}
    reserved: dict[str, int] = {}
    for action, number, amount in actions:
        name = f"r{number}"
        if action == "free":
            cache.free(name)
            expected.pop(name, None)
            reserved.pop(name, None)
        elif action == "grow" and name in expected and len(expected[name]) < reserved[name]:
            row = torch.randn(1, 2, 3, dtype=torch.float64)
            write(cache, name, len(expected[name]), row)
            expected[name] = torch.cat([expected[name], row])
        elif action == "add":
            others = sum(tokens for other, tokens in reserved.items() if other != name)
            expected.pop(name, None)
            reserved.pop(name, None)
            if others + amount > 600:
                with pytest.raises(KvCacheFull, match=f"needs {amount} tokens of KV cache; {others} of 600"):
                    cache.reserve(name, amount)
                continue
            cache.reserve(name, amount)
            expected[name] = torch.randn((amount + 1) // 2, 2, 3, dtype=torch.float64)
            reserved[name] = amount
            write(cache, name, 0, expected[name])
        assert len(cache) == len(expected)
        assert cache.reserved_tokens == sum(reserved.values())
        for known, rows in expected.items():
            entry = cache.entry(known)
            for layer in range(SHAPE.num_layers):
                assert torch.equal(entry.slab.keys[layer][entry.slot, : len(rows)], rows + layer)
                assert torch.equal(entry.slab.values[layer][entry.slot, : len(rows)], -rows - layer)


def test_used_slots_stay_a_prefix() -> None:
    cache = KvCache(SHAPE, 10_000)
    for number in range(6):
        cache.reserve(f"r{number}", 10)
    cache.free("r1")
    cache.free("r5")
    assert sorted(cache.entry(f"r{number}").slot for number in (0, 2, 3, 4)) == [0, 1, 2, 3]


def test_lengths_far_apart_do_not_share_a_slab() -> None:
    cache = KvCache(SHAPE, 10_000)
    short, long = cache.reserve("short", 5), cache.reserve("long", 1000)
    assert (short.slab.length, long.slab.length) == (512, 1024)


@pytest.mark.parametrize(("tokens", "kept"), [(10, True), (1000, False)])
def test_memory_of_an_empty_slab_is_returned_except_the_smallest(tokens: int, kept: bool) -> None:
    cache = KvCache(SHAPE, 10_000)
    first = cache.reserve("a", tokens).slab
    cache.free("a")
    assert (cache.reserve("b", tokens).slab is first) is kept


def test_unknown_request() -> None:
    cache = KvCache(SHAPE, 10)
    cache.free("nobody")
    with pytest.raises(KeyError, match="nobody has no KV cache"):
        cache.entry("nobody")
