"""What analyses measure with: cosines, matching, components, ranks, choices, intervals.

May import ``probes.contract`` and what lies below.
"""
