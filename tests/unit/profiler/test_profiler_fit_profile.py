"""A profile's measurements become everything that is predicted with it, and back into latency models."""

import math

import pytest

from lemix.internal.v1 import profile_pb2
from services.latency import OpKind
from services.profile_messages import latency_from_profile
from services.profiler.fit import FitError
from services.profiler.fit_profile import fit_profile

PREFILL, DECODE = profile_pb2.OP_KIND_PREFILL, profile_pb2.OP_KIND_DECODE
BACKWARD = profile_pb2.OP_KIND_TRAIN_BACKWARD
MOVES = {profile_pb2.OP_KIND_OFFLOAD: 1e9, profile_pb2.OP_KIND_RELOAD: 2e9}
SIZES = [(batch, length) for batch in (1, 2, 4) for length in (16, 64, 128, 256)]


def measured(stage, op, seconds, **point):
    durations = [seconds * factor for factor in (0.99, 1.0, 1.0, 1.0, 1.01)]
    return profile_pb2.Measurement(stage=stage, op=op, durations_s=durations, **point)


def prefill_s(batch, length):
    return 2e-3 + 1e-5 * batch * length


def decode_s(batch, length):
    return 1e-3 + 2e-4 * batch + 1e-6 * batch * length


def stage_measurements(stage):
    points = [measured(stage, PREFILL, prefill_s(b, n), batch=b, length=n) for b, n in SIZES]
    points += [measured(stage, DECODE, decode_s(b, n), batch=b, length=n) for b, n in SIZES]
    points.append(measured(stage, PREFILL, prefill_s(2, 64), batch=2, length=64, cached_tokens=128))
    points += [measured(stage, DECODE, 1.5 * decode_s(b, 64), batch=b, length=64, busy=BACKWARD) for b in (1, 2)]
    points += [
        measured(
            stage,
            PREFILL,
            prefill_s(1, n) + 0.5 * decode_s(4, 64),
            batch=1,
            length=n,
            decodes=4,
            decode_length=64,
        )
        for n in (64, 128, 256)
    ]
    sizes = (10**5, 10**6, 10**7)
    points += [measured(stage, op, 1e-5 + size / rate, num_bytes=size) for op, rate in MOVES.items() for size in sizes]
    return points


def profile(num_stages=2, **changes):
    points = [point for stage in range(num_stages) for point in stage_measurements(stage)]
    return profile_pb2.Profile(profile_id="p", num_stages=num_stages, measurements=points, **changes)


def test_everything_measured_is_predicted():
    whole = profile()
    fit_profile(whole)
    latency = latency_from_profile(whole)
    for stage in range(2):
        assert latency.op_s(stage, OpKind.PREFILL, 3, 100) == pytest.approx(prefill_s(3, 100), rel=1e-3)
        assert latency.op_s(stage, OpKind.PREFILL, 3, 100, 1000) == pytest.approx(prefill_s(3, 100), rel=1e-3)
        assert latency.op_s(stage, OpKind.DECODE, 3, 100) == pytest.approx(decode_s(3, 100), rel=1e-3)
        assert latency.slowdown(stage, OpKind.DECODE, OpKind.TRAIN_BACKWARD) == pytest.approx(0.5)
        mixed_s = latency.mixed_s(stage, prefill_s(1, 200), decode_s(4, 64))
        assert mixed_s == pytest.approx(prefill_s(1, 200) + 0.5 * decode_s(4, 64), rel=1e-3)
        assert latency.host_links[stage].move_s(OpKind.OFFLOAD, 10**8) == pytest.approx(0.1, rel=1e-2)
        assert latency.host_links[stage].move_s(OpKind.RELOAD, 10**8) == pytest.approx(0.05, rel=1e-2)


def test_outliers_are_left_out_counted_and_left_out_once():
    whole = profile(1)
    whole.measurements[3].durations_s[2] *= 5.0
    before = len(whole.measurements[3].durations_s)
    fit_profile(whole)
    again = profile_pb2.Profile.FromString(whole.SerializeToString())
    fit_profile(again)
    assert again == whole
    assert [item.outliers for item in whole.measurements].count(1) == 1
    assert (whole.measurements[3].outliers, len(whole.measurements[3].durations_s)) == (1, before - 1)


def test_what_was_not_measured_stays():
    bare = profile_pb2.Profile(num_stages=1, host_links=[profile_pb2.HostLink(offload_bytes_per_s=7.0)])
    bare.measurements.extend(item for item in stage_measurements(0)[: len(SIZES)])
    fit_profile(bare)
    assert [link.offload_bytes_per_s for link in bare.host_links] == [7.0]
    assert not bare.mixed
    assert not bare.interference


def test_links_and_mixed_costs_are_of_all_stages_or_none():
    whole = profile()
    del whole.measurements[len(stage_measurements(0)) + 2 * len(SIZES) :]
    fit_profile(whole)
    assert {fit.stage for fit in whole.fits} == {0, 1}
    assert not whole.host_links
    assert not whole.mixed
    assert {item.stage for item in whole.interference} == {0}


def test_too_few_points_are_an_error_unless_the_profile_is_incomplete():
    whole = profile(1)
    del whole.measurements[len(SIZES) + 1 : 2 * len(SIZES)]
    with pytest.raises(FitError, match="stage 0, decode: 1 different point"):
        fit_profile(whole)
    whole.incomplete_reason = "the node died"
    fit_profile(whole)
    assert {fit.op for fit in whole.fits} == {PREFILL}
    assert not whole.mixed


BAD = [
    (
        measured(0, PREFILL, math.nan, batch=1, length=7),
        "stage 0, prefill: a duration for batch 1, length 7 is not .*: nan",
    ),
    (measured(0, PREFILL, -1.0, batch=1, length=7, cached_tokens=3), "length 7 behind 3 tokens is not .*: -0.99"),
    (measured(0, PREFILL, 0.0, batch=1, length=7, decodes=2), "length 7 with 2 decodes is not .*: 0.0"),
    (measured(0, DECODE, math.inf, batch=1, length=7, busy=BACKWARD), "length 7 beside train_backward is not .*: inf"),
    (measured(0, profile_pb2.OP_KIND_OFFLOAD, math.nan, num_bytes=9), "stage 0, offload: a duration for 9 bytes"),
    (measured(0, profile_pb2.OP_KIND_OFFLOAD, 1.0), "stage 0, offload: a move of nothing"),
    (measured(5, DECODE, 1.0, batch=1, length=7), "stage 5, decode: the profile has 1 stages"),
    (measured(0, 0, 1.0, batch=1, length=7), "stage 0: unknown operation 0"),
    (profile_pb2.Measurement(op=DECODE, batch=1, length=7), "no duration for batch 1, length 7"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_bad_timings_are_refused_naming_the_point(bad, message):
    whole = profile(1)
    whole.measurements.append(bad)
    with pytest.raises(FitError, match=message):
        fit_profile(whole)
