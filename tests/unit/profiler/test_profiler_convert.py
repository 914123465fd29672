"""Protobuf to fitting types and the statistics of samples."""

import pytest

from lemix.internal.v1 import profile_pb2
from services.latency import MOVES, OpKind
from services.profiler.convert import fit_to_proto, timings_from_proto
from services.profiler.fit import Fit
from services.profiler.statistics import distribution


def measurement(stage, op, batch=1, length=16, durations=(1e-3, 2e-3)):
    return profile_pb2.Measurement(stage=stage, op=op, batch=batch, length=length, durations_s=durations)


def test_measurements_are_grouped_by_stage_and_operation():
    timings = timings_from_proto(
        [
            measurement(0, profile_pb2.OP_KIND_PREFILL),
            measurement(1, profile_pb2.OP_KIND_PREFILL, length=32),
            measurement(0, profile_pb2.OP_KIND_PREFILL, length=64),
        ]
    )
    assert {key: [t.length for t in points] for key, points in timings.items()} == {
        (0, OpKind.PREFILL): [16, 64],
        (1, OpKind.PREFILL): [32],
    }
    assert timings[1, OpKind.PREFILL][0].durations_s == (1e-3, 2e-3)


def test_an_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="unknown operation 0"):
        timings_from_proto([measurement(0, profile_pb2.OP_KIND_UNSPECIFIED)])


@pytest.mark.parametrize("op", sorted(set(OpKind) - MOVES))
def test_every_measured_operation_has_its_number(op):
    spread = {"mape": 0.1, "r2": 0.9, "residual_p5": -0.1, "residual_p95": 0.2}
    fit = Fit(stage=3, op=op, form="affine", coefficients=(1.0, 2.0), chosen=True, **spread)
    message = fit_to_proto(fit)
    assert profile_pb2.OpKind.Name(message.op) == f"OP_KIND_{op.name}"
    assert (message.stage, message.model, list(message.coefficients)) == (3, "affine", [1.0, 2.0])
    assert {name: getattr(message, name) for name in spread} == spread
    assert message.chosen
    assert not message.HasField("table")


def test_distribution():
    result = distribution([1.0, 2.0, 3.0, 4.0])
    assert (result.count, result.mean, result.p50) == (4, 2.5, 2.5)
    assert result.std == pytest.approx(1.118, abs=1e-3)
    assert result.p99 == pytest.approx(3.97)
    assert distribution([5.0]).std == 0.0
