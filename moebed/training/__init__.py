"""Training: the LightningModule, what it is optimised by, and what happens around a step.

May import ``moebed.upcycling``, ``moebed.exporting``, ``moebed.plan`` and what lies below. It knows no probe: those are
callbacks of a recipe.
"""
