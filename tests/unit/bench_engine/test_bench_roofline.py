"""The roofline: what an op takes at least, and that ops are measured against it."""

import pytest

from bench.engine import roofline
from bench.engine.roofline import Roofline, Row, work
from services.latency import OpKind


def test_an_op_is_bound_by_the_slower_of_computing_and_reading() -> None:
    device = Roofline(flops_per_s=100.0, bytes_per_s=10.0)
    assert device.least_s(200.0, 5.0) == 2.0
    assert device.least_s(200.0, 50.0) == 5.0
    assert Row("prefill", 1, 1, median_s=4.0, least_s=2.0).share == 0.5


def test_a_backward_is_two_forwards_and_a_decode_one_token() -> None:
    assert work(OpKind.PREFILL, 2, 8, 10, 4) == (320.0, 40.0)
    assert work(OpKind.DECODE, 2, 8, 10, 4) == (40.0, 40.0)
    assert work(OpKind.TRAIN_BACKWARD, 2, 8, 10, 4) == (640.0, 80.0)


async def test_every_op_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_PRODUCT", 64)
    monkeypatch.setattr(roofline, "_COPY_BYTES", 1 << 16)
    device, rows, num_parameters = await roofline.measure("cpu", "float32", 32, 1, 1)
    assert min(device.flops_per_s, device.bytes_per_s, num_parameters) > 0.0
    assert {row.op for row in rows} == {"prefill", "decode", "train_forward", "train_backward"}
    assert all(row.median_s > 0.0 and row.share > 0.0 for row in rows)
