"""A study as a SLURM job array: a task a run, then one job that collects."""

from __future__ import annotations

import shlex
from collections.abc import Sequence


def job_array(command: Sequence[str], name: str, count: int, jobs: int) -> str:
    """A script for bash that submits both.

    Args:
        command: The study's own command line, without ``--slurm``.
        name: Of the jobs.
        count: Runs.
        jobs: Tasks at a time.
    """
    study = shlex.join(command)
    one, collect = shlex.quote(f'{study} --run "$SLURM_ARRAY_TASK_ID"'), shlex.quote(f"{study} --collect")
    return f"""\
#!/bin/bash
# Run this script with bash where sbatch is known. A task that is preempted or runs out of time continues from its last
# checkpoint when the script is run again; finished runs are left alone. Earlier steps that arms share are run once:
# the tasks that need one wait for the one that has it.
set -e
array=$(sbatch --parsable --job-name={shlex.quote(name)} --array=0-{count - 1}%{jobs} \\
  --requeue --output=slurm-%A_%a.log \\
  --wrap {one})
sbatch --job-name={shlex.quote(name + "-collect")} --dependency=afterany:"$array" --output=slurm-%j.log \\
  --wrap {collect}
# Add what your cluster wants (--partition, --gpus-per-task=1, --cpus-per-task, --time) through SBATCH_ variables or to
# the first command.
"""
