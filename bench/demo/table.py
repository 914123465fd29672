"""Columns of the demo's results table, the same on the terminal and on the page."""

from bench.report.table import Column, one, percent, two, whole

COLUMNS = (
    Column("SLO kept", "Requests within both promises, of all sent", ("slo_attainment",), percent, "high"),
    Column("TTFT p50 ms", "Time to first token, median", ("ttft_ms", "p50"), whole, "low"),
    Column("TTFT p99 ms", "Time to first token, 99th percentile", ("ttft_ms", "p99"), whole, "low"),
    Column("TPOT p50 ms", "Time per further token, median", ("tpot_ms", "p50"), one, "low"),
    Column("TPOT p99 ms", "Time per further token, 99th percentile", ("tpot_ms", "p99"), one, "low"),
    Column("trained tokens/s", "Tokens learned from per second", ("trained_tokens_per_s",), whole, "high"),
    Column(
        "tasks per held node-s",
        "Requests and micro-batches finished per second that a node was held",
        ("tasks_per_held_node_s",),
        two,
        "high",
    ),
    Column("loss after drift", "Loss of served prompts, nats/token", ("inference_loss", "after_drift"), two, "low"),
    Column("weights' age p50 s", "Time since the newest training step served", ("staleness_s", "p50"), one, "low"),
    Column("busy", "Share of stage time that is not a bubble", ("utilisation",), percent),
)
