"""Pages of results: one HTML file each, with charts as inline SVG, and nothing to fetch."""
