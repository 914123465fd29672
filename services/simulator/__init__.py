"""The second driver of the cores: virtual nodes on a virtual clock (`cluster.Simulation`), and plans made with it."""
