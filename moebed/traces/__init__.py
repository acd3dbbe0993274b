"""Traces: which experts tokens went to, as engines that train or serve models note it down, without any weights."""
