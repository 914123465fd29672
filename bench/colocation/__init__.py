"""How much training fits into what serving leaves, and what it costs the requests: `make colocation`."""
