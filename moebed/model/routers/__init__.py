"""Routers: which experts a token goes to, and with what weight. Each rule is one small class behind one contract."""

from moebed.model.routers.contract import ExpertOutputs, Load, Router, Routing, drawn
from moebed.model.routers.registry import ROUTERS, build_router, register, untaught
from moebed.model.routers.softmax import GatedRouter, SoftmaxTopK
from moebed.model.routers.steps import RouterSteps

__all__ = [
    "ROUTERS",
    "ExpertOutputs",
    "GatedRouter",
    "Load",
    "Router",
    "RouterSteps",
    "Routing",
    "SoftmaxTopK",
    "build_router",
    "drawn",
    "register",
    "untaught",
]
