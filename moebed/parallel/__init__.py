"""Layouts of a run over many processes."""
