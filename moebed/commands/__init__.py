"""Commands that no other room has: probe, report, size."""
