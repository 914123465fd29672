"""What every service shares to start, listen, call, fail and be observed. No logic of any service."""
