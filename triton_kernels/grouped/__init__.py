"""Grouped matrix products: one file per product, each with its kernel, its launch and its specs."""
