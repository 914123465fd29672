"""Mixed operations, interference and host links: known laws are recovered."""

import pytest

from services.latency import LatencyModel, OpKind
from services.profiler.fit_together import (
    BusyTiming,
    MixedTiming,
    MoveTiming,
    fit_host_link,
    fit_interference,
    fit_mixed,
)

PREFILL = LatencyModel("affine", (2e-3, 2e-5))
DECODE = LatencyModel("full_decode", (2e-3, 1e-4, 1e-7))
POINTS = [(1, length, 0, decodes, 128) for length in (16, 64, 256) for decodes in (1, 8, 32)]


def mixed(law, points=POINTS):
    return [
        MixedTiming(*point, (law(PREFILL.predict_s(*point[:3]), DECODE.predict_s(*point[3:])),) * 3) for point in points
    ]


@pytest.mark.parametrize("share", [0.0, 0.4, 0.8])
def test_the_share_done_once_is_found(share):
    cost = fit_mixed(mixed(lambda p, d: p + d - share * min(p, d)), PREFILL, DECODE)
    assert (cost.prefill, cost.decode) == (1.0, 1.0)
    assert cost.shared == pytest.approx(share, abs=1e-6)
    assert cost.mape < 1e-6


def test_factors_are_found_when_they_fit_better():
    cost = fit_mixed(mixed(lambda p, d: 0.9 * p + 0.3 * d), PREFILL, DECODE)
    assert (cost.prefill, cost.decode, cost.shared) == (pytest.approx(0.9), pytest.approx(0.3), 0.0)
    assert cost.predict_s(1.0, 1.0) == pytest.approx(1.2)


def test_one_mixed_point_says_how_wrong_the_sum_is():
    cost = fit_mixed(mixed(lambda p, d: 2.0 * (p + d), POINTS[:1]), PREFILL, DECODE)
    assert (cost.prefill, cost.decode, cost.shared) == (1.0, 1.0, 0.0)
    assert cost.mape == pytest.approx(0.5)
    assert cost.residual_p95 == pytest.approx(1.0)


def test_slowdowns_are_medians_over_points_measured_alone_too():
    alone = {(OpKind.DECODE, (1, size)): 0.01 * size for size in (1, 2, 3)}
    beside = [
        BusyTiming(OpKind.DECODE, OpKind.TRAIN_BACKWARD, (1, size), (0.01 * size * factor,) * 3)
        for size, factor in ((1, 1.2), (2, 1.3), (3, 1.7), (4, 9.0))
    ]
    beside.append(BusyTiming(OpKind.PREFILL, OpKind.DECODE, (1, 1), (1.0,)))
    (item,) = fit_interference(1, beside, alone)
    assert (item.stage, item.op, item.busy) == (1, OpKind.DECODE, OpKind.TRAIN_BACKWARD)
    assert item.slowdown == pytest.approx(0.3)
    assert item.std == pytest.approx(0.216, abs=1e-3)


def moves(fixed_s, offload, reload, sizes=(1 << 16, 1 << 20, 1 << 24)):
    rates = {OpKind.OFFLOAD: offload, OpKind.RELOAD: reload}
    return [MoveTiming(op, size, (fixed_s + size / rate,) * 3) for op, rate in rates.items() for size in sizes]


def test_bandwidth_and_fixed_time_of_a_link_are_found():
    link = fit_host_link(moves(2e-5, 1e10, 2e10))
    assert link is not None
    assert link.move_s(OpKind.OFFLOAD, 10**9) == pytest.approx(0.1, rel=1e-3)
    assert link.move_s(OpKind.RELOAD, 10**9) == pytest.approx(0.05, rel=1e-3)
    assert link.fixed_s == pytest.approx(2e-5, rel=1e-3)


def test_one_size_gives_a_bandwidth_and_one_way_gives_no_link():
    link = fit_host_link(moves(0.0, 1e9, 3e9, sizes=(1 << 20,)))
    assert link is not None
    assert (link.offload_bytes_per_s, link.reload_bytes_per_s) == (pytest.approx(1e9), pytest.approx(3e9))
    assert link.fixed_s == 0.0
    assert fit_host_link(moves(0.0, 1e9, 1e9)[:3]) is None
    assert fit_host_link([]) is None
