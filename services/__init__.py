"""LeMix's services. Each runs as `python -m services.<name>` from the repository or an image."""
