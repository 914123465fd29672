"""Latency profiles from published timings of GPUs: Vidur's tables (Agrawal et al., MLSys 2024; MIT licence)."""
