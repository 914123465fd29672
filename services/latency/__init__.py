"""Latency models of stage operations: pure arithmetic shared by profiler, scheduler and simulator."""

from services.latency.model import FORMS, LatencyModel, NodeLatency, OpKind

__all__ = ["FORMS", "LatencyModel", "NodeLatency", "OpKind"]
