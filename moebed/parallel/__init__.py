"""Many processes: sharded parameters, experts spread over ranks, checkpoints of both, and their probes.

May import ``moebed.checkpoints``, ``moebed.traces`` and what lies below.
"""
