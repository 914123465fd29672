"""A whole LeMix cluster of child processes on this machine."""
