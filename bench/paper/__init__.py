"""The paper's claims in the simulator: `make paper`. See `__main__`."""
