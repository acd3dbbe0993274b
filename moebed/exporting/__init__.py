"""Export: a run's checkpoint as a folder that transformers loads, or in moebed's own layout, with a model card.

May import ``moebed.parallel`` and what lies below.
"""
