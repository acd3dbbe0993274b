"""Routers: which experts a token goes to, and with what weight. Each rule is one small class behind one contract."""

from moebed.model.routers.contract import ExpertOutputs, Load, Router, drawn
from moebed.model.routers.registry import (
    ROUTERS,
    all_options,
    build_router,
    cautions,
    options_of,
    register,
    untaught,
)
from moebed.model.routers.softmax import GatedRouter, SoftmaxTopK
from moebed.model.routers.steps import RouterSteps
from moebed.model.routing import Routing, TokenContext

__all__ = [
    "ROUTERS",
    "ExpertOutputs",
    "GatedRouter",
    "Load",
    "Router",
    "RouterSteps",
    "Routing",
    "SoftmaxTopK",
    "TokenContext",
    "all_options",
    "build_router",
    "cautions",
    "drawn",
    "options_of",
    "register",
    "untaught",
]
