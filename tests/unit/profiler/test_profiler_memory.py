"""M_peak from the peaks of training points."""

import pytest

from lemix.internal.v1 import profile_pb2
from services.profiler.memory import fit_memory

TRAIN = profile_pb2.OP_KIND_TRAIN_FORWARD


def peak(batch, length, peak_bytes, stage=0, op=TRAIN, busy=0):
    return profile_pb2.Measurement(
        stage=stage, op=op, batch=batch, length=length, peak_bytes=peak_bytes, durations_s=[1.0], busy=busy
    )


def known(stage=0):
    return profile_pb2.StageMemory(stage=stage, weight_bytes=10**9, kv_bytes_per_token=4096)


def test_the_line_through_the_peaks_is_found():
    points = [peak(b, n, 2 * 10**9 + 50_000 * b * n) for b in (1, 4) for n in (16, 256)]
    (fitted,) = fit_memory(points, [known()])
    assert fitted.fixed_bytes == pytest.approx(2 * 10**9, rel=1e-6)
    assert fitted.activation_bytes_per_token == pytest.approx(50_000, rel=1e-6)
    assert fitted.mape == pytest.approx(0.0, abs=1e-9)
    assert (fitted.weight_bytes, fitted.kv_bytes_per_token) == (10**9, 4096)


def test_peaks_that_do_not_rise_give_no_negative_slope():
    points = [peak(1, 16, 300), peak(1, 64, 200), peak(1, 256, 100)]
    (fitted,) = fit_memory(points, [known()])
    assert fitted.activation_bytes_per_token == 0.0
    assert fitted.mape > 0.3


@pytest.mark.parametrize(
    "points",
    [
        [],
        [peak(1, 16, 100), peak(2, 8, 120)],  # one size
        [peak(1, n, 0) for n in (16, 64, 256)],  # the system does not tell
        [peak(1, n, n, busy=TRAIN) for n in (16, 64, 256)],
        [peak(1, n, n, op=profile_pb2.OP_KIND_PREFILL) for n in (16, 64, 256)],
        [peak(1, n, n, stage=1) for n in (16, 64, 256)],
    ],
)
def test_a_stage_without_usable_peaks_stays_as_it_is(points):
    assert fit_memory(points, [known()]) == [known()]
