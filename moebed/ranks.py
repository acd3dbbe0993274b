"""Which of several processes this one is before they have met: by what torchrun, Lightning or srun says to it."""

from __future__ import annotations

import os

TASKS = "SLURM_STEP_NUM_TASKS"  # tells how many tasks srun has started together
SAID = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # where Lightning looks for a rank, in its order


def starts_first() -> bool:
    """Whether it is the first one, or the only one."""
    of_slurm = os.environ.get("SLURM_PROCID", "0") if os.environ.get(TASKS, "1") != "1" else "0"
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", of_slurm)) == "0"


def stand_alone() -> None:
    """Be the only one from now on, and whatever this one starts, also where others were started beside it.

    What is done by one process would be done by none but the first: later ones draw and log nothing.
    """
    for name in (*SAID, TASKS):
        os.environ.pop(name, None)
