"""A profile as a page: what was measured, what every form makes of it, and where it fails."""
