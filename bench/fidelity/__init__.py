"""`make fidelity`: how far predictions are from what happens, and how far the simulator is from live clusters."""
