"""Many processes: sharded parameters, experts spread over ranks, checkpoints of both, and their probes."""
