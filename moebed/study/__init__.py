"""Studies: arms over seeds, each run a run folder of its own, compared by paired differences with intervals.

May import ``probes.report`` and what lies below.
"""
