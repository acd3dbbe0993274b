"""Measuring beside the peers that are installed, as ratios within one run (``moebed bench``).

May import ``probes.report`` and what lies below.
"""
