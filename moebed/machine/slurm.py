"""What SLURM says of this process, in its environment: whose task it is, and in which job.

srun starts the tasks of a step. What the job asked for (SLURM_NTASKS, SLURM_PROCID) is also said in its script and in a
shell of salloc, where nothing else was started, and to a step of other numbers: only what is said of the step counts.
"""

from __future__ import annotations

import os
import re
import subprocess

from moebed.ranks import TASKS

SECONDS = 60  # for scontrol's answer


def tasks() -> int:
    """How many tasks srun has started together, this one among them; 1 where it has not."""
    return int(os.environ.get(TASKS, "1"))


def tasks_of_nodes() -> list[int]:
    """The same by node: SLURM writes ``2(x3),1`` for 2, 2, 2 and 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ["SLURM_STEP_TASKS_PER_NODE"])
    return [int(number) for number, times in found for _ in range(int(times or 1))]


def job() -> str | None:
    """The job of this process, or the task of an array, as scontrol names it."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def requeue() -> str | None:
    """Put this job into the queue again; returns why it could not be."""
    return _ask("requeue", str(job()))[1]


def makes_room() -> bool:
    """Whether this job has been asked to end for another, within a grace time.

    SLURM queues it again once that is over; a job that has ended by itself meanwhile it does not.
    """
    said = "" if job() is None else _ask("show", "job", str(job()))[0]
    return "JobState=RUNNING" in said and re.search(r"\bPreemptTime=\d", said) is not None


def _ask(*words: str) -> tuple[str, str | None]:
    """What scontrol answers, and what is wrong, if anything is."""
    try:
        done = subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    return done.stdout, (" ".join(done.stderr.split()) or f"exit code {done.returncode}") if done.returncode else None
