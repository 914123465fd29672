"""Clocks."""

from hypothesis import given
from hypothesis import strategies as st

from services.runtime.clock import FakeClock, SystemClock


@given(steps=st.lists(st.floats(0, 1000), max_size=10))
def test_a_fake_clock_moves_both_times_and_only_when_told(steps):
    clock = FakeClock(monotonic_s=5.0, unix_s=100.0)
    for step in steps:
        before = clock.monotonic_s(), clock.unix_s()
        assert (clock.monotonic_s(), clock.unix_s()) == before
        clock.advance(step)
        assert clock.monotonic_s() == before[0] + step
        assert clock.unix_s() == before[1] + step


def test_the_system_clock_does_not_go_back():
    clock = SystemClock()
    times = [clock.monotonic_s() for _ in range(100)]
    assert times == sorted(times)
    assert clock.unix_s() > 1_700_000_000
