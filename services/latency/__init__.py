"""Latency models of stage operations: pure arithmetic shared by profiler, scheduler and simulator."""

from services.latency.model import FORMS, MOVES, LatencyModel, NodeLatency, OpKind

__all__ = ["FORMS", "MOVES", "LatencyModel", "NodeLatency", "OpKind"]
