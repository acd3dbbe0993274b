"""Answers that stay what they are for as long as a process runs, and that a compiler need not ask for again."""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def settled(function: F) -> F:
    """What ``torch.compiler.assume_constant_result`` does, which imports the compiler: two seconds of every command.

    The compiler looks for this attribute, and calls such a function once, while it traces.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
