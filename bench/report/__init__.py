"""What the benchmarks share to show their results: page, charts, tables, progress and verdicts."""
