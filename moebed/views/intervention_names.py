"""Interventions by the names that a person writes, :mod:`moebed.views.intervention_words`."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from moebed.errors import UserError
from moebed.machine import provenance
from moebed.views import interventions
from moebed.views.intervention_words import CHOICES, read, stored_choices
from moebed.views.interventions import Intervention


def parse(text: str) -> Intervention:
    """The intervention that a name says.

    Raises:
        ConfigError: It says none.
        UserError: A file that it names cannot be read.
    """
    what, arguments, layers, is_alone = read(text)
    make: Callable[..., Intervention] = _replay if what == "replay" else getattr(interventions, what)
    found = make(*arguments, layers=layers)
    return interventions.alone(found) if is_alone else found


def _replay(path: Path, layers: list[int] | None) -> Intervention:
    try:
        with np.load(path, allow_pickle=False) as file:
            routings = {
                n: (torch.from_numpy(file[f"{CHOICES}/{n}"]), torch.from_numpy(file[f"topk_weight/{n}"]))
                for n in stored_choices(path)
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"intervention replay: {path} has no choices to replay ({error}); give a results/routing.npz"
        ) from error
    content = provenance.fingerprint([[part.tolist() for part in pair] for pair in routings.values()])[:8]
    return interventions.replay(routings, layers, f"replay {path} ({content})")
