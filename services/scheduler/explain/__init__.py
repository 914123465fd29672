"""Why a task went where it went, what came of it, and what another policy would have done. See `python -m`."""
