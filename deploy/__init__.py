"""Ways to run a LeMix cluster."""
