"""The operator's command line of the profiler."""
