"""Traces: which experts tokens went to, as engines that train or serve models note it down, without any weights.

May import ``moebed.views``, ``moebed.data`` and what lies below.
"""
