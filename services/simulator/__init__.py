"""The second driver of the cores: virtual nodes on a virtual clock. See `cluster.Simulation`."""
