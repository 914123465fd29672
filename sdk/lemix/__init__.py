"""Client SDK of LeMix."""
