"""The planted ladder whose kernels are wrong, where its processes find it."""

from tests.check.planted import WRONG as LADDER  # noqa: F401
