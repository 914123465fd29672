"""Prometheus metrics of the scheduler."""

from functools import cache

from prometheus_client import Counter, Gauge, Histogram

from services.scheduler.core.status import CoreSnapshot

EVENTS = Counter("lemix_scheduler_events_total", "Events the core took in", ["event"])
COMMANDS = Counter("lemix_scheduler_commands_total", "Decisions of the core", ["command"])
DECISION_SECONDS = Histogram(
    "lemix_scheduler_decision_seconds",
    "Time the core took for one event",
    buckets=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 1.0),
)
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


@cache
def events(name: str) -> Counter:
    """Counter of one kind of event."""
    return EVENTS.labels(name)


@cache
def commands(name: str) -> Counter:
    """Counter of one kind of command."""
    return COMMANDS.labels(name)


def report(snapshot: CoreSnapshot) -> None:
    """Set the gauges."""
    WAITING.labels("inference").set(snapshot.waiting_inference)
    WAITING.labels("training").set(snapshot.waiting_training)
    NODES.set(len(snapshot.nodes))
    INFLIGHT.clear()
    for node in snapshot.nodes:
        INFLIGHT.labels(node.node_id, "inference").set(node.inflight_inference)
        INFLIGHT.labels(node.node_id, "training").set(node.inflight_training)
