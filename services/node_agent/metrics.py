"""Prometheus metrics of a node."""

import prometheus_client as prometheus

from services.runtime.counts import Counts, Distributions

OPS = Counts("lemix_node_ops", "Ops that ended", ["stage", "op", "result"])
OP_SECONDS = Counts("lemix_node_op_seconds", "Time spent in ops", ["stage", "op"])
BATCH_SIZE = Distributions(
    "lemix_node_batch_size", "Sequences per op on stage 0", ["op"], buckets=(1, 2, 4, 8, 16, 32, 64, 128)
)
KV_USED_TOKENS = prometheus.Gauge("lemix_node_kv_used_tokens", "KV cache reserved, tokens", ["node"])
WAITING = prometheus.Gauge("lemix_node_waiting_tasks", "Tasks taken and not started", ["node", "kind"])
QUEUE_LENGTH = prometheus.Gauge("lemix_node_stage_queue_length", "Ops ready and not started", ["node", "stage"])
WEIGHT_STEP = prometheus.Gauge("lemix_node_weight_step", "Weights step of stage 0", ["node"])
TOKENS = Counts("lemix_node_tokens", "Tokens computed, padding not counted", ["op"])
TRAINING_LOSS = prometheus.Gauge("lemix_node_training_loss", "Loss of the newest micro-batch, nats per token", ["node"])
TASKS = prometheus.Counter("lemix_node_tasks_total", "Tasks that ended", ["kind", "reason"])
REFUSED = prometheus.Counter("lemix_node_refused_deliveries_total", "Deliveries not taken", ["reason"])
TRACES_DROPPED = prometheus.Counter("lemix_node_traces_dropped_total", "Traces dropped while the scheduler was away")
REPORTS_DROPPED = prometheus.Counter(
    "lemix_node_reports_dropped_total", "Reports dropped while the scheduler was away; outcomes stay in the ledger"
)
CHECKPOINTS = prometheus.Counter("lemix_node_checkpoints_total", "Checkpoints", ["result"])
CLOCK_SLIP = prometheus.Histogram(
    "lemix_node_clock_slip_ratio",
    "Emulated engine: how late an op's end was noticed, by the op's time",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
)
UNSAVED = prometheus.Gauge("lemix_node_unsaved_microbatches", "Micro-batches trained that no checkpoint has", ["node"])
