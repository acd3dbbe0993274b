"""Settings of one router, as its class declares them.

A router's class has them as ``Options``; what they are in a model stands under ``router_options`` of its config.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field
from typing import Any

from moebed.errors import ConfigError


def setting(
    sentence: str,
    default: Any = MISSING,
    least: float | None = None,
    most: float | None = None,
    advice: Callable[[Any], str] | None = None,
) -> Any:
    """A field of a router's Options.

    Args:
        sentence: What it says in ``--help``.
        default: What it is if not given; if there is none, it must be given.
        least: Of a number.
        most: Of a number.
        advice: What to give in a model such as this ModelConfig, for the error that says that it must be given.
    """
    return field(default=default, metadata={"sentence": sentence, "least": least, "most": most, "advice": advice})


@dataclass
class RouterOptions:
    """What one router can be told: each router's class has its own as ``Options``, made of :func:`setting`.

    Raises ConfigError where a number is outside its bounds.
    """

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            for name, holds in (("least", operator.ge), ("most", operator.le)):
                bound = one.metadata.get(name)
                if bound is not None and not (number and holds(value, bound)):
                    raise ConfigError(
                        f"model config: router_options.{one.name} is {value}; it must be at {name} {bound}"
                    )
