"""An engine without a neural network: the protocol of a real one, with chosen durations and predictable results."""
