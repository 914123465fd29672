"""How good predictions are, as operators see it: the status, the metrics, and the log of the drift alarm."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import REGISTRY
from structlog.testing import capture_logs

from lemix import _convert
from lemix.cli import render
from lemix.v1 import cluster_service_pb2
from services.latency import OpKind
from services.ledger import open_ledger
from services.scheduler import metrics
from services.scheduler.convert import add_predictions
from services.scheduler.core.commands import DriftAlarm
from services.scheduler.core.costs import OpRecord
from services.scheduler.core.events import WeightsTold
from services.scheduler.explain.accuracy import Predicted, PredictionError
from services.scheduler.inbox import Told
from tests.unit.scheduler_service.driver_rig import Rig

RECORDS = {
    "n0": [
        OpRecord(0, OpKind.PREFILL, 40, 0.04, None, 1.01, 0.9, 1.1, drifting=False),
        OpRecord(1, OpKind.DECODE, 900, 0.05, 0.09, 1.31, 0.8, 1.3, drifting=True),
    ]
}
ERRORS = [PredictionError(Predicted.TTFT, True, 12, 0.11), PredictionError(Predicted.RESPONSE, False, 30, 0.06)]


@pytest.fixture
def log() -> Iterator[list[Any]]:
    with capture_logs() as lines:
        yield lines


async def test_the_alarm_is_logged_when_it_begins_and_ends(log: list[Any]) -> None:
    rig = await Rig(await open_ledger(f"memory://{uuid.uuid4().hex}")).lead()
    for active, ratio in ((True, 1.3123), (False, 1.02)):
        rig.core.answers[WeightsTold] = lambda event, a=active, r=ratio: [DriftAlarm("n0", 1, OpKind.DECODE, a, r)]
        await rig.handle(Told(WeightsTold("n0", 1, None)))
    begins, ended = log
    assert (begins["event"], begins["log_level"]) == ("operations are off their profile", "warning")
    assert (begins["node"], begins["stage"], begins["op"], begins["ratio"]) == ("n0", 1, "decode", 1.312)
    assert (ended["event"], ended["log_level"]) == ("operations are back at their profile", "info")


def test_metrics_tell_the_newest_state_and_forget_nodes_that_left() -> None:
    metrics.report_predictions(RECORDS, ERRORS)
    where = {"node": "n0", "stage": "1", "op": "decode"}
    assert REGISTRY.get_sample_value("lemix_scheduler_drift_alarm", where) == 1.0
    assert REGISTRY.get_sample_value("lemix_scheduler_observed_ops", where) == 900
    assert REGISTRY.get_sample_value("lemix_scheduler_op_ratio", where) == 1.31
    assert REGISTRY.get_sample_value("lemix_scheduler_op_prediction_error", {**where, "beside": "no"}) == 0.05
    assert REGISTRY.get_sample_value("lemix_scheduler_op_prediction_error", {**where, "beside": "yes"}) == 0.09
    prefill = {"node": "n0", "stage": "0", "op": "prefill"}
    assert REGISTRY.get_sample_value("lemix_scheduler_op_prediction_error", {**prefill, "beside": "yes"}) is None
    request = {"predicted": "ttft", "training": "yes"}
    assert REGISTRY.get_sample_value("lemix_scheduler_prediction_error", request) == 0.11
    metrics.report_predictions({}, ERRORS)
    assert REGISTRY.get_sample_value("lemix_scheduler_drift_alarm", where) is None


def test_the_status_carries_them_to_the_client_and_the_command_line() -> None:
    message = cluster_service_pb2.GetStatusResponse(policy="lemix", ready=True)
    message.nodes.add(node_id="n0", ready=True, num_stages=2)
    message.nodes.add(node_id="n1", ready=True, num_stages=2)
    add_predictions(message, RECORDS, ERRORS)
    status = _convert.cluster_status(message)
    prefill, decode = status.nodes[0].ops
    assert (prefill.op, prefill.count, prefill.error, prefill.error_beside) == ("prefill", 40, 0.04, None)
    assert (decode.stage, decode.ratio, decode.interval, decode.drifting) == (1, 1.31, (0.8, 1.3), True)
    assert status.nodes[1].ops == ()
    ttft, response = status.predictions
    assert (ttft.predicted, ttft.beside_training, ttft.count, ttft.error) == ("ttft", True, 12, 0.11)
    text = render.status_lines(status, [])
    assert "error    ttft 11.0% beside training, response 6.0%" in text
    assert "drift    n0 stage 1 decode: 1.31 times its profile" in text
    assert response.predicted == "response"
