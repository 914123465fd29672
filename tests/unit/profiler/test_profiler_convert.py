"""Protobuf to fitting types and the statistics of samples."""

import pytest

from lemix.internal.v1 import profile_pb2
from services.latency import MOVES, OpKind
from services.profiler.convert import fit_to_proto
from services.profiler.fit import Fit
from services.profiler.statistics import distribution


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
