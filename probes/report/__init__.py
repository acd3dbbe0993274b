"""The report: one page about one run or several, from what they left in their folders.

May import ``probes.running`` and what lies below.
"""
