"""The offline profiler: times the operations of a node, fits latency models and keeps versioned profiles."""
