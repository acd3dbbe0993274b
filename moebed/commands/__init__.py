"""Commands that no other room has: fit and its like, probe, report, size.

The top: nothing imports it. May import ``moebed.laws``, ``moebed.check`` and what lies below.
"""
