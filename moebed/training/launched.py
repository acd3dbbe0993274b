"""Who has started a run's processes, and whether they are as many as its recipe says."""

from __future__ import annotations

import os
from typing import Any

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch import Trainer

from moebed.errors import SharedError
from moebed.machine import slurm
from moebed.training.lightning_private import rank_before_processes, started_by


class SrunTasks(ClusterEnvironment):
    """The tasks of a step of srun, by what SLURM says of the step; it was started in whatever job there is.

    Lightning's goes by what is said of the job: in its script without srun it waits for tasks that nobody starts,
    within ``salloc`` it takes each task for a run of its own, and to a job that asked for ``--ntasks`` it says no.
    """

    @property
    def creates_processes_externally(self) -> bool:
        """SLURM has."""
        return True

    @property
    def main_address(self) -> str:
        """The step's first node, unless ``MASTER_ADDR`` names another."""
        first = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
        return os.environ.setdefault("MASTER_ADDR", first)

    @property
    def main_port(self) -> int:
        """One that all tasks of this step come to, and those of others on the same node do not."""
        number = 31 * int(os.environ["SLURM_JOB_ID"]) + int(os.environ["SLURM_STEP_ID"])
        return int(os.environ.setdefault("MASTER_PORT", str(15000 + number % 15000)))

    @staticmethod
    def detect() -> bool:
        """Whether srun has started this process and others."""
        return slurm.tasks() > 1

    def world_size(self) -> int:
        """Of the step."""
        return slurm.tasks()

    def set_world_size(self, size: int) -> None:
        """It is set already."""

    def global_rank(self) -> int:
        """In the step."""
        return int(os.environ["SLURM_PROCID"])

    def set_global_rank(self, rank: int) -> None:
        """It is set already."""

    def local_rank(self) -> int:
        """On its node."""
        return int(os.environ["SLURM_LOCALID"])

    def node_rank(self) -> int:
        """Of the step's nodes."""
        return int(os.environ["SLURM_NODEID"])


def with_environment(plugins: Any, strategy: Any) -> list[Any]:
    """A Trainer's plugins, and in a job of SLURM what has started this process: Lightning would go by the job.

    torchrun goes first, as srun may have started it, and a person's own, of plugins or of the strategy, before all.
    """
    own = [] if plugins is None else list(plugins) if isinstance(plugins, list | tuple) else [plugins]
    given = any(isinstance(one, ClusterEnvironment) for one in (*own, getattr(strategy, "cluster_environment", None)))
    if given or TorchElasticEnvironment.detect() or slurm.job() is None:
        return own
    return [*own, SrunTasks() if SrunTasks.detect() else LightningEnvironment()]


def require_as_launched(trainer: Trainer) -> None:
    """Check that as many processes were started as the recipe says; Lightning starts those of one node itself.

    LSF, MPI, and a plugin of a person's own, such as Kubeflow's, know for themselves.

    Raises:
        SharedError: There are more, of which each would train alone in the same folder, or fewer, which would wait.
    """
    devices, nodes = trainer.num_devices, trainer.num_nodes
    environment, recipe = started_by(trainer), f"trainer.devices is {devices} and trainer.num_nodes {nodes}"
    if isinstance(environment, TorchElasticEnvironment):
        world, here = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        if (world, here) == (devices * nodes, devices):
            return
        said = f"torchrun has started {world} processes, {here} of them here, but {recipe}; give torchrun "
        said += f"--nnodes {nodes} --nproc_per_node {devices}, or the recipe what torchrun has"
    elif isinstance(environment, SrunTasks):
        if (tasks := slurm.tasks_of_nodes()) == [devices] * nodes:
            return
        started = f"{' + '.join(map(str, tasks))} tasks on {len(tasks)} nodes"
        said = f"srun has started {started}, but {recipe}; give srun --nodes={nodes} --ntasks-per-node={devices}, or "
        said += "the recipe what srun has"
    elif nodes == 1 or type(environment) is not LightningEnvironment or {"NODE_RANK", "GROUP_RANK"} & os.environ.keys():
        return
    else:
        said = f"{recipe}, but nothing has started this process together with those of other nodes; start it by "
        said += "srun" if slurm.job() else "srun, or by torchrun on each"
    raise SharedError(said, rank_before_processes())
