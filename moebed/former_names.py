"""What was once called otherwise, where files that people keep may say so: modules in a run's config.yaml, in recipes
and plug-ins."""

from __future__ import annotations

import re

FORMER = {
    "moebed.callbacks": "moebed.training.callbacks",
    "moebed.saving": "moebed.training.saving",
    "moebed.trainer": "moebed.training.trainer",
    "moebed.training_progress": "moebed.training.progress",
    "moebed.module": "moebed.training.module",
    "moebed.optim": "moebed.training.optim",
    "moebed.config": "moebed.model.config",
    "moebed.decoder": "moebed.model.decoder",
    "moebed.routers": "moebed.model.routers",
    "moebed.float32": "moebed.machine.float32",
    "moebed.float64": "moebed.machine.float64",
    "probes.base": "probes.contract",
    "probes.callback": "probes.running.callback",
    "probes.choices": "probes.measures.choices",
    "probes.resampling": "probes.measures.resampling",
}
_CLASS_PATH = re.compile(r"""(?<=class_path)(["']?\s*:\s*["']?)((?:moebed|probes)(?:\.\w+)+)""")


def present_name(name: str) -> str:
    """A dotted name as it is now; the same where nothing has moved."""
    for former, present in FORMER.items():
        if name == former or name.startswith(f"{former}."):
            return present + name.removeprefix(former)
    return name


def with_present_names(text: str) -> str:
    """YAML or JSON in which every ``class_path`` has its present name."""
    return _CLASS_PATH.sub(lambda found: found.group(1) + present_name(found.group(2)), text)
