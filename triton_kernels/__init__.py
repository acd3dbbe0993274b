"""Triton grouped-expert kernels: one folder per op, with reference, kernels, autograd function and benchmark."""
