"""Packages that only some commands need, and how they are had."""

from __future__ import annotations

from importlib.util import find_spec

from moebed.errors import UserError

INSTALL_LM_EVAL = "pip install -e '.[tasks]' where moebed was cloned"


def require_lm_eval(what: str) -> None:
    """Raise UserError where lm-eval, which ``what`` takes, is not installed."""
    if find_spec("lm_eval") is None:
        raise UserError(f"{what} needs lm-eval; {INSTALL_LM_EVAL}")
