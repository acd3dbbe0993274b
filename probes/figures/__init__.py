"""What figures are drawn with; imported to draw.

May import ``probes.measures`` and what lies below.
"""
