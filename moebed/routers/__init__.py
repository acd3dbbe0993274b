"""Routers: which experts a token goes to, and with what weight. Each rule is one small class behind one contract."""

from moebed.routers.contract import ExpertOutputs, Load, Router, Routing
from moebed.routers.registry import ROUTERS, build_router
from moebed.routers.softmax import SoftmaxTopK
from moebed.routers.steps import RouterSteps

__all__ = ["ROUTERS", "ExpertOutputs", "Load", "Router", "RouterSteps", "Routing", "SoftmaxTopK", "build_router"]
