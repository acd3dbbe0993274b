"""Random numbers that depend on what they are for, and not on what was drawn before."""

from __future__ import annotations

import hashlib

import torch


def generator(*what: object) -> torch.Generator:
    """A generator on the CPU whose state follows from what it is for: a seed, and names or numbers after it."""
    digest = hashlib.sha256(" ".join(map(str, what)).encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)
