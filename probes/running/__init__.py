"""Running probes: in training and over checkpoints; what is kept of them, and what it was made from."""
