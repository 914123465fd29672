"""The smallest time scale whose clock slip is small enough."""

import pytest

from bench.fidelity.clock import Load, smallest_time_scale, traffic

SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)


@pytest.mark.parametrize("needed", [0.5, 1.0, 3.0, 4.0, 16.0])
async def test_the_smallest_scale_under_the_limit_is_found(needed):
    asked = []

    async def p99_slip(scale):
        asked.append(scale)
        return 0.02 * needed / scale * 0.99

    choice = await smallest_time_scale(p99_slip, SCALES)
    assert choice.time_scale == min(scale for scale in SCALES if scale >= needed)
    assert list(choice.tried) == sorted(asked)
    assert len(asked) == len(set(asked)) <= 3


async def test_it_is_said_when_no_scale_keeps_time():
    async def p99_slip(scale):
        return 0.02

    choice = await smallest_time_scale(p99_slip, SCALES)
    assert choice.time_scale is None
    assert max(choice.tried) == 16.0


def test_arrivals_are_scaled_and_lengths_are_not():
    (once, backlog), (thrice, none) = traffic(Load(seconds=30.0), 1.0), traffic(Load(seconds=90.0, trains=False), 3.0)
    assert [3.0 * item.at_s for item in once] == pytest.approx([item.at_s for item in thrice])
    assert [item.max_tokens for item in once] == [item.max_tokens for item in thrice]
    assert all(item.at_s < 90.0 for item in thrice)
    assert backlog is not None
    assert none is None
