"""Running probes: in training and over checkpoints; what is kept of them, and what it was made from.

May import ``probes`` and what lies below.
"""
