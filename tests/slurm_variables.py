"""What SLURM 22.05 says in the environment of a job's script and of srun's tasks, as a real one was seen to."""

# `sbatch --nodes=2 --ntasks-per-node=2`: its script, where nothing else was started.
SCRIPT = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NAME": "moe",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NNODES": "2",
    "SLURM_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


def task(rank: int = 0, per_node: int = 2, nodes: int = 2, step: int = 0, **others: str) -> dict[str, str]:
    """What srun says to a task in it.

    Args:
        rank: Which.
        per_node: How many there are on a node.
        nodes: On so many.
        step: Number of this srun in the job.
        others: Variables by name that another job has.
    """
    tasks, each = str(per_node * nodes), str(per_node) + (f"(x{nodes})" if nodes > 1 else "")
    own = {
        "SLURM_STEP_ID": str(step),
        "SLURM_STEP_NODELIST": "gpu[07-08]" if nodes > 1 else "gpu07",
        "SLURM_STEP_NUM_NODES": str(nodes),
        "SLURM_STEP_NUM_TASKS": tasks,
        "SLURM_STEP_TASKS_PER_NODE": each,
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": tasks,
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % per_node),
        "SLURM_NODEID": str(rank // per_node),
    }
    return {**SCRIPT, **own, **others}
