"""Columns of the results table, the same on the terminal and on the page. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Column:
    """One figure per policy. `better`: "high", "low" or "" when neither is."""

    title: str
    help: str
    path: tuple[str, ...]
    format: Callable[[float], str]
    better: str = ""

    def value(self, metrics: Mapping[str, Any]) -> Any:
        """The number (or [min, max]) in a policy's metrics; None when it was not measured."""
        found: Any = metrics
        for key in self.path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    def best(self, policies: Mapping[str, Mapping[str, Any]]) -> str | None:
        """The policy with the best value; None when there is no order or no comparison."""
        values = {name: self.value(metrics) for name, metrics in policies.items()}
        known = {name: value for name, value in values.items() if isinstance(value, int | float)}
        if not self.better or len(known) < 2:
            return None
        return (max if self.better == "high" else min)(known, key=lambda name: known[name])


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _one(value: float) -> str:
    return f"{value:.1f}"


def _whole(value: float) -> str:
    return f"{value:,.0f}"


COLUMNS = (
    Column("SLO kept", "Requests within both promises, of all sent", ("slo_attainment",), _percent, "high"),
    Column("TTFT p50 ms", "Time to first token, median", ("ttft_ms", "p50"), _whole, "low"),
    Column("TTFT p99 ms", "Time to first token, 99th percentile", ("ttft_ms", "p99"), _whole, "low"),
    Column("TPOT p50 ms", "Time per further token, median", ("tpot_ms", "p50"), _one, "low"),
    Column("TPOT p99 ms", "Time per further token, 99th percentile", ("tpot_ms", "p99"), _one, "low"),
    Column("trained tokens/s", "Tokens learned from per second", ("trained_tokens_per_s",), _whole, "high"),
    Column(
        "tasks per held node-s",
        "Requests and micro-batches finished per second that a node was held",
        ("tasks_per_held_node_s",),
        _two,
        "high",
    ),
    Column("loss after drift", "Loss of served prompts, nats/token", ("inference_loss", "after_drift"), _two, "low"),
    Column("weights' age p50 s", "Time since the newest training step served", ("staleness_s", "p50"), _one, "low"),
    Column("busy", "Share of stage time that is not a bubble", ("utilisation",), _percent),
)


def cell(column: Column, metrics: Mapping[str, Any]) -> str:
    """A value as text; a [min, max] pair as a range; a dash for what was not measured."""
    value = column.value(metrics)
    if isinstance(value, list):
        return f"{column.format(value[0])} – {column.format(value[1])}"
    return "–" if value is None else column.format(value)
