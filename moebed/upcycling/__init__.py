"""Upcycling: the experts and the router of an MoE, made from the FFNs of a dense model, a layer at a time.

May import ``moebed.parallel`` and what lies below.
"""
