"""What every benchmark on a live cluster needs: the client process, its plan and records, online training jobs."""
