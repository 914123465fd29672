"""Prometheus metrics of the scheduler."""

from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import Counter, Gauge

from services.runtime.counts import Counts, Distributions
from services.scheduler.core.costs import OpRecord
from services.scheduler.core.status import CoreSnapshot
from services.scheduler.explain.accuracy import PredictionError

EVENTS = Counts("lemix_scheduler_events", "Events the core took in", ["event"])
COMMANDS = Counts("lemix_scheduler_commands", "Decisions of the core", ["command"])
DECISION_SECONDS = Distributions(
    "lemix_scheduler_decision_seconds",
    "Time the core took for one event",
    buckets=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1.0),
).labels()
LEDGER_ERRORS = Counter("lemix_scheduler_ledger_errors_total", "Ledger operations that failed for now")
DROPPED_TRACES = Counter("lemix_scheduler_dropped_traces_total", "Operations not shown to the core: it was behind")
DROPPED_LOG_LINES = Counter("lemix_scheduler_dropped_log_lines_total", "Events missing in the event log")
WAITING = Gauge("lemix_scheduler_waiting", "Tasks without a node", ["kind"])
INFLIGHT = Gauge("lemix_scheduler_inflight", "Tasks assigned and unfinished", ["node", "kind"])
NODES = Gauge("lemix_scheduler_nodes", "Nodes that may get work")
TRAINED = Counter("lemix_scheduler_trained_microbatches_total", "Micro-batches trained")
SKIPPED = Counter("lemix_scheduler_skipped_microbatches_total", "Micro-batches with a loss or gradient not finite")
FAILURE_SIGNATURE = Gauge(
    "lemix_scheduler_failure_signature", "1 while this goes wrong (docs/operations.md), else 0", ["signature"]
)

OPS = Gauge("lemix_scheduler_observed_ops", "Operations that predictions learnt from", ["node", "stage", "op"])
OP_ERROR = Gauge(
    "lemix_scheduler_op_prediction_error",
    "Running mean of |predicted - real| / real of operations, while their node both serves and trains (beside) or not",
    ["node", "stage", "op", "beside"],
)
OP_RATIO = Gauge("lemix_scheduler_op_ratio", "Predicted now over profiled duration", ["node", "stage", "op"])
DRIFT = Gauge(
    "lemix_scheduler_drift_alarm", "1 while operations are off their profile, else 0", ["node", "stage", "op"]
)
PREDICTION_ERROR = Gauge(
    "lemix_scheduler_prediction_error",
    "Running mean of |predicted - real| / real of requests, predicted at assignment, with and without training there",
    ["predicted", "training"],
)


def report(snapshot: CoreSnapshot) -> None:
    """Set the gauges."""
    WAITING.labels("inference").set(snapshot.waiting_inference)
    WAITING.labels("training").set(snapshot.waiting_training)
    NODES.set(len(snapshot.nodes))
    INFLIGHT.clear()
    for node in snapshot.nodes:
        INFLIGHT.labels(node.node_id, "inference").set(node.inflight_inference)
        INFLIGHT.labels(node.node_id, "training").set(node.inflight_training)


def report_predictions(records: Mapping[str, Sequence[OpRecord]], errors: Iterable[PredictionError]) -> None:
    """Set the gauges of how good predictions are."""
    for gauge in (OPS, OP_ERROR, OP_RATIO, DRIFT):
        gauge.clear()
    for node_id, of_node in records.items():
        for record in of_node:
            where = (node_id, str(record.stage), record.op.value)
            OPS.labels(*where).set(record.num_seen)
            OP_RATIO.labels(*where).set(record.ratio)
            DRIFT.labels(*where).set(record.drifting)
            if record.error is not None:
                OP_ERROR.labels(*where, "no").set(record.error)
            if record.error_beside is not None:
                OP_ERROR.labels(*where, "yes").set(record.error_beside)
    for error in errors:
        training = "yes" if error.beside_training else "no"
        PREDICTION_ERROR.labels(error.predicted.value, training).set(error.error)
