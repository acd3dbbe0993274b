"""The planted ladder whose second step waits, where its processes find it."""

from tests.check.planted import WAITING as LADDER  # noqa: F401
