"""Scaling laws of Mixture-of-Experts models: fitted to a table of runs, and what follows from them, with intervals.

May import ``moebed.study``, ``moebed.bench``, ``moebed.tasks`` and what lies below.
"""
