"""What a probe sees: views of layers, text on its way through a model, the walk over a live one.

Models in memory and checkpoints on disk offer the same views. May import ``moebed.model`` and what lies below.
"""
