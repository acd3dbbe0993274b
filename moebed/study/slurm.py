"""A study as a SLURM job array: a task a run, then one job that collects."""

from __future__ import annotations

import shlex
from collections.abc import Sequence


def job_array(command: Sequence[str], name: str, runs: Sequence[int], jobs: int) -> str:
    """A script for bash that submits both.

    Args:
        command: The study's own command line, without ``--slurm``.
        name: Of the jobs.
        runs: Their numbers, in order.
        jobs: Tasks at a time.
    """
    is_range = runs[-1] - runs[0] == len(runs) - 1
    numbers = f"{runs[0]}-{runs[-1]}" if is_range else ",".join(map(str, runs))
    study = shlex.join(command)
    one, collect = shlex.quote(f'{study} --run "$SLURM_ARRAY_TASK_ID"'), shlex.quote(f"{study} --collect")
    return f"""\
#!/bin/bash
# Run this script with bash where sbatch is known. A task that is preempted is queued again and continues from its last
# checkpoint; one that fails or runs out of time does when the script is run again, and finished runs are left alone.
# Earlier steps that arms share are run once: the tasks that need one wait for the one that has it.
set -e
array=$(sbatch --parsable --job-name={shlex.quote(name)} --array={numbers}%{jobs} \\
  --requeue --open-mode=append --output=slurm-%A_%a.log \\
  --wrap {one})
sbatch --job-name={shlex.quote(name + "-collect")} --dependency=afterany:"$array" --output=slurm-%j.log \\
  --wrap {collect}
# Add what your cluster wants (--partition, --gpus-per-node=1, --cpus-per-task, --time) to the first command, or set
# SBATCH_PARTITION and the like.
"""
