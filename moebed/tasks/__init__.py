"""Benchmarks of lm-eval, and perplexity of texts, over any model that moebed reads; what its experts do there.

May import ``probes.report`` and what lies below.
"""
