"""Predicted durations agree with the latency models and learn from real ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.latency import FORMS, LatencyModel, NodeLatency, OpKind
from services.scheduler.core.costs import NodeCosts

coefficient = st.floats(-0.1, 0.1, allow_nan=False)


@given(
    form=st.sampled_from(sorted(FORMS)),
    values=st.tuples(coefficient, coefficient, coefficient),
    batch=st.integers(0, 64),
    length=st.integers(0, 4096),
)
def test_equals_the_latency_model_in_every_form(
    form: str, values: tuple[float, float, float], batch: int, length: int
) -> None:
    model = LatencyModel(form, values[: len(FORMS[form](1.0, 1.0))])
    latency = NodeLatency(({OpKind.PREFILL: model}, {OpKind.PREFILL: model, OpKind.DECODE: model}))
    costs = NodeCosts(latency)
    for stage in range(2):
        expected = latency.op_s(stage, OpKind.PREFILL, batch, length)
        assert costs.stage_s(stage, OpKind.PREFILL, batch, length) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert costs.node_s(OpKind.DECODE, batch, length) == pytest.approx(
        latency.node_s(OpKind.DECODE, batch, length), rel=1e-9, abs=1e-9
    )


def test_training_op_is_the_longest_single_one() -> None:
    models = {
        OpKind.TRAIN_FORWARD: LatencyModel("affine", (0.0, 0.001)),
        OpKind.TRAIN_BACKWARD: LatencyModel("affine", (0.0, 0.002)),
        OpKind.OPTIMIZER_STEP: LatencyModel("constant", (0.5,)),
    }
    costs = NodeCosts(NodeLatency((models,)))
    assert costs.training_op_s(1, 100) == 0.5
    assert costs.training_op_s(4, 100) == pytest.approx(0.8)


def test_calibration_moves_predictions_to_what_really_happens() -> None:
    costs = NodeCosts(NodeLatency(({OpKind.DECODE: LatencyModel("constant", (0.01,))},)))
    for _ in range(200):
        costs.calibrate(0, OpKind.DECODE, 1, 10, 0.02)
    assert costs.node_s(OpKind.DECODE, 1, 10) == pytest.approx(0.02, rel=0.01)
    assert costs.stage_s(0, OpKind.DECODE, 1, 10) == costs.node_s(OpKind.DECODE, 1, 10)


def test_one_outlier_moves_a_prediction_little() -> None:
    costs = NodeCosts(NodeLatency(({OpKind.DECODE: LatencyModel("constant", (0.01,))},)))
    costs.calibrate(0, OpKind.DECODE, 1, 10, 1000.0)
    assert costs.node_s(OpKind.DECODE, 1, 10) <= 0.0121


def test_operations_without_a_model_cost_nothing_and_learn_nothing() -> None:
    costs = NodeCosts(NodeLatency(({},)))
    costs.calibrate(0, OpKind.PREFILL, 1, 10, 0.5)
    assert costs.node_s(OpKind.PREFILL, 1, 10) == 0.0


TRAINING = NodeLatency(
    (
        {
            OpKind.TRAIN_FORWARD: LatencyModel("affine", (0.0, 0.001)),
            OpKind.TRAIN_BACKWARD: LatencyModel("affine", (0.0, 0.002)),
            OpKind.OPTIMIZER_STEP: LatencyModel("constant", (0.1,)),
        },
    )
)


def test_a_job_that_takes_less_than_profiled_is_predicted_by_its_own_traces() -> None:
    """Within a few micro-batches, and without making the next job cheaper than it is."""
    costs = NodeCosts(TRAINING)
    for _ in range(20):
        costs.calibrate_job("lora", 0, OpKind.TRAIN_FORWARD, 4, 100, 0.36)
        costs.calibrate_job("lora", 0, OpKind.TRAIN_BACKWARD, 4, 100, 0.32)
        costs.calibrate_job("lora", 0, OpKind.OPTIMIZER_STEP, 1, 1, 0.02)
    assert costs.stage_s(0, OpKind.TRAIN_BACKWARD, 4, 100, job_id="lora") == pytest.approx(0.32, rel=0.2)
    assert costs.stage_s(0, OpKind.OPTIMIZER_STEP, 1, 1, job_id="lora") < 0.033
    assert costs.training_op_s(4, 100, "lora") == pytest.approx(0.38, rel=0.1)
    assert costs.training_work_s(4, 100, "lora") == pytest.approx(0.7, rel=0.2)
    for job_id in ("full", ""):
        assert costs.training_op_s(4, 100, job_id) == pytest.approx(0.8)
    costs.forget_job("lora")
    assert costs.training_op_s(4, 100, "lora") == pytest.approx(0.8)


def test_a_job_begins_with_what_the_node_takes_in_general() -> None:
    costs = NodeCosts(TRAINING)
    for _ in range(200):
        costs.calibrate(0, OpKind.TRAIN_FORWARD, 1, 100, 0.2)
    costs.calibrate_job("new", 0, OpKind.TRAIN_FORWARD, 1, 100, 0.2)
    assert costs.stage_s(0, OpKind.TRAIN_FORWARD, 1, 100, job_id="new") == pytest.approx(0.2, rel=0.01)


def test_jobs_of_long_ago_are_forgotten() -> None:
    costs = NodeCosts(TRAINING)
    for index in range(1000):
        costs.calibrate_job("steady", 0, OpKind.TRAIN_FORWARD, 1, 100, 0.02)
        costs.calibrate_job(f"job-{index}", 0, OpKind.TRAIN_FORWARD, 1, 100, 0.02)
    known = [index for index in range(1000) if costs.knows_job(f"job-{index}")]
    assert known == list(range(937, 1000))
    assert costs.stage_s(0, OpKind.TRAIN_FORWARD, 1, 100, job_id="steady") < 0.025
