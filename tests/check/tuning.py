"""The planted ladder that chooses tiles, where its processes find it."""

from tests.check.planted import TUNING as LADDER  # noqa: F401
