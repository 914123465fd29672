"""Latency models of stage operations: pure arithmetic shared by profiler, scheduler and simulator."""

from services.latency.kinds import MOVES, OpKind
from services.latency.model import FORMS, TABULATED, LatencyModel
from services.latency.node import HostLink, Interference, MixedCost, NodeLatency
from services.latency.table import LatencyTable

__all__ = [
    "FORMS",
    "MOVES",
    "TABULATED",
    "HostLink",
    "Interference",
    "LatencyModel",
    "LatencyTable",
    "MixedCost",
    "NodeLatency",
    "OpKind",
]
