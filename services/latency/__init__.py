"""Latency models of stage operations: pure arithmetic shared by profiler, scheduler and simulator."""

from services.latency.kinds import (
    DECODE,
    MOVES,
    OPTIMIZER_STEP,
    PREFILL,
    TRAIN_BACKWARD,
    TRAIN_FORWARD,
    WEIGHT_SYNC,
    OpKind,
)
from services.latency.model import FORMS, TABULATED, LatencyModel
from services.latency.node import HostLink, Interference, MixedCost, NodeLatency
from services.latency.table import LatencyTable

__all__ = [
    "DECODE",
    "FORMS",
    "MOVES",
    "OPTIMIZER_STEP",
    "PREFILL",
    "TABULATED",
    "TRAIN_BACKWARD",
    "TRAIN_FORWARD",
    "WEIGHT_SYNC",
    "HostLink",
    "Interference",
    "LatencyModel",
    "LatencyTable",
    "MixedCost",
    "NodeLatency",
    "OpKind",
]
