"""Older versions of a stage's weights: what is kept, what a copy costs, and that values never change afterwards."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from services.node_agent.engine.torch.weights import Weight, WeightSet

#: How an op that changes weights ends, how many versions before its own are needed (None: not even that one), and
#: whether a micro-batch starts before it.
changes = st.lists(st.tuples(st.booleans(), st.none() | st.integers(0, 3), st.booleans()), max_size=12)


def weight_set() -> WeightSet:
    """Two parameters of value 0."""
    return WeightSet(
        tuple(Weight((name,), (2,), nn.Parameter(torch.zeros(2))) for name in ("a", "b")),
    )


def values(weights: WeightSet) -> set[float]:
    """The distinct elements of all parameters in use."""
    return {float(value) for weight in weights.weights for value in weight.parameter.detach()}


def change(weights: WeightSet, value: float, oldest_version: int | None, in_use: bool = False) -> None:
    """What an op that changes all weights does."""
    weights.advance(oldest_version)
    weights.replace_parameters(in_use)
    with torch.no_grad():
        weights.apply(lambda name, current: torch.full_like(current, value))


@given(changes)
def test_every_kept_version_keeps_its_values(steps: list[tuple[bool, int | None, bool]]) -> None:
    weights = weight_set()
    expected = {0: 0.0}
    graphs: list[tuple[list[nn.Parameter], float]] = []
    for succeeds, needed, starts in steps:
        version = weights.version
        if starts:
            graphs.append((weights.parameters(), expected[version]))
        oldest = None if needed is None else version - needed
        if succeeds:
            in_use = any(parameters[0] is weights.weights[0].parameter for parameters, _ in graphs)
            change(weights, version + 1.0, oldest, in_use)
        else:
            weights.advance(oldest)
        expected[version + 1] = version + 1.0 if succeeds else expected[version]
        expected = {v: value for v, value in expected.items() if v > version or (oldest is not None and v >= oldest)}
        assert weights.versions == tuple(expected)
        for older, value in expected.items():
            current = weights.parameters()
            with weights.at(older):
                assert values(weights) == {value}
            assert all(now is before for now, before in zip(weights.parameters(), current, strict=True))
        for parameters, value in graphs:
            assert all(torch.equal(parameter, torch.full((2,), value)) for parameter in parameters)


def test_weights_are_copied_only_for_who_needs_them() -> None:
    weights = weight_set()
    renewed: list[Mapping[nn.Parameter, nn.Parameter]] = []
    weights.on_replace.append(renewed.append)
    first = weights.parameters()
    change(weights, 1.0, None)
    assert weights.parameters()[0] is first[0]
    weights.advance(1)  # a step that failed: both versions are the same
    assert weights.versions == (1, 2)
    assert renewed == []
    change(weights, 3.0, 3)  # and both are dropped before this one changes them
    assert renewed == []
    change(weights, 4.0, 3)
    assert [list(pairs) for pairs in renewed] == [first]
    assert list(renewed[0].values()) == weights.parameters()


def test_the_current_weights_are_back_after_an_error() -> None:
    weights = weight_set()
    change(weights, 1.0, 0)
    with pytest.raises(ArithmeticError), weights.at(0):
        raise ArithmeticError
    assert values(weights) == {1.0}
