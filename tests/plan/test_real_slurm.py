"""Runs in a SLURM cluster of their own: real daemons, a few nodes on this machine, loopback addresses alone."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from tests.small_run import small_recipe, write_recipe

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
SCRIPT = ROOT / "recipes" / "cluster" / "moe_64gpu.sbatch"
NODES = [f"127.0.0.{number}" for number in (11, 12, 13, 14)]  # names that any Linux machine finds
PATIENCE, SOON = 480.0, 60.0  # seconds for a test, and for its end

# Credentials are short-lived, since a job that is queued again waits until its old ones are of no use.
CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
PartitionName=first Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=gives_way Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
"""


def _missing() -> str | None:
    """Why there can be no cluster here."""
    if absent := [name for name in PROGRAMS if _found(name) is None]:
        return f"needs SLURM and munge, of which {absent[0]} is not installed"
    return "needs root, as whom slurmd runs" if os.geteuid() else None


def _found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


pytestmark = [pytest.mark.slow, pytest.mark.skipif(_missing() is not None, reason=_missing() or "")]


class Cluster:
    """SLURM's commands in it, and how a job stands."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.end = time.monotonic() + PATIENCE

    def call(self, *command: object) -> str:
        """What a command answers."""
        words = [str(word) for word in command]
        done = subprocess.run(words, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}{self.logs()}"
        return done.stdout.strip()

    def shows(self, job: str, text: str) -> bool:
        """Whether scontrol says this of a job."""
        return f" {text} " in " ".join(f" {self.call('scontrol', 'show', 'job', job)} ".split())

    def wait(self, what: Callable[[], bool]) -> None:
        """Until this holds."""
        while not what():
            assert time.monotonic() < self.end, self.logs()
            time.sleep(0.5)

    def logs(self) -> str:
        """The ends of all logs, for who looks why a test failed."""
        files = sorted(self.folder.glob("*.log"))
        return "".join(f"\n--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """All its daemons end with the test, and its jobs before them; its folder's name is short, as sockets lie there."""
    with TemporaryDirectory(prefix="slurm") as folder, ExitStack() as stack:
        yield from _running(Path(folder), stack)


def _running(folder: Path, stack: ExitStack) -> Iterator[Cluster]:
    for name in ("state", "bin", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    conf = CONF.format(folder=folder, port=_free_port())
    for node in NODES:
        conf += f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={_free_port()} CPUs=2\n"
    (folder / "slurm.conf").write_text(conf, encoding="utf-8")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    moebed = folder / "bin" / "moebed"
    moebed.write_text(f'#!/bin/sh\nexec {sys.executable} -m moebed.cli "$@"\n', encoding="utf-8")
    moebed.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{moebed.parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    found = Cluster(folder, environment)
    ends = {"socket": "sock", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    places = [f"--{option}={folder}/munge.{end}" for option, end in ends.items()]
    _daemon(stack, found, "munged", "--foreground", "--force", *places)
    found.wait((folder / "munge.sock").exists)
    _daemon(stack, found, "slurmctld", "-D")
    for node in NODES:
        _daemon(stack, found, "slurmd", "-D", "-N", node)
    found.wait(lambda: found.call("sinfo", "-h", "-p", "first", "-t", "idle", "-o", "%D") == str(len(NODES)))
    try:
        yield found
    finally:
        found.end = time.monotonic() + SOON
        found.call("scancel", "--user=root")
        found.wait(lambda: found.call("squeue", "-h") == "")


def _daemon(stack: ExitStack, cluster: Cluster, program: str, *options: str) -> None:
    """Start one, which is ended in the end."""
    log = stack.enter_context((cluster.folder / f"{program}.{len(options)}.out").open("ab"))
    process = subprocess.Popen([str(_found(program)), *options], env=cluster.environment, stdout=log, stderr=log)
    stack.callback(process.wait, 30)
    stack.callback(process.terminate)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _script(folder: Path) -> Path:
    """``moe_64gpu.sbatch`` for a small recipe, with a rank on each of two nodes."""
    text = SCRIPT.read_text(encoding="utf-8")
    for ours, small in (
        ("#SBATCH --gpus-per-node=8\n", ""),
        ("--nodes=8", "--nodes=2"),
        ("--ntasks-per-node=8", "--ntasks-per-node=1"),
        ("--cpus-per-task=8", "--cpus-per-task=1"),
        ("--output=moe_64gpu-%j.log", f"--output={folder}.log"),
        ("recipes/cluster/moe_64gpu.yaml", str(folder / "recipe.yaml")),
    ):
        assert text.count(ours) == 1, ours
        text = text.replace(ours, small)
    path = folder / "run.sbatch"
    path.write_text(text, encoding="utf-8")
    return path


def _recipe(folder: Path) -> Path:
    folder.mkdir()
    trainer = {"strategy": "ddp", "devices": 1, "num_nodes": 2, "max_steps": 240, "val_check_interval": 60}
    return write_recipe(folder, small_recipe(folder, trainer=trainer, checkpoint={"every_n_train_steps": 10}))


def _closing(folder: Path) -> dict:
    numbers = json.loads((folder / "run" / "run_summary.json").read_text(encoding="utf-8"))
    return {name: value for name, value in numbers.items() if "second" not in name}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_a_run_that_is_signalled_and_makes_room_ends_as_one_that_is_left_alone(cluster):
    """SIGUSR1, as before a time limit, and SIGTERM, as it gives way to another job: saved, queued again, continued."""
    whole, cut = cluster.folder / "whole", cluster.folder / "cut"
    jobs = {}
    for folder, partition, nodes in ((whole, "first", NODES[:2]), (cut, "gives_way", NODES[2:])):
        _recipe(folder)
        where = (f"--partition={partition}", f"--nodelist={','.join(nodes)}")
        jobs[folder] = cluster.call("sbatch", "--parsable", *where, _script(folder))
    log, last = Path(f"{cut}.log"), cut / "run" / "checkpoints" / "last.ckpt"

    cluster.wait(last.exists)
    cluster.call("scancel", "--signal=USR1", jobs[cut])
    cluster.wait(lambda: cluster.shows(jobs[cut], "Restarts=1"))
    cluster.wait(lambda: log.read_text().count("Restored all states") == 1)
    cluster.call("sbatch", "--exclusive", "--nodes=2", f"--nodelist={','.join(NODES[2:])}", "--wrap", "true")
    cluster.wait(lambda: cluster.shows(jobs[cut], "Restarts=2"))
    for folder in (cut, whole):
        cluster.wait(lambda job=jobs[folder]: not cluster.call("squeue", "-h", "-j", job))
        assert cluster.shows(jobs[folder], "JobState=COMPLETED"), cluster.logs()

    said = log.read_text()
    assert said.count(f"job {jobs[cut]} is in the queue again, and continues") == 2
    assert said.count("continuing the run in") == 2  # by the first rank alone
    assert _closing(cut) == _closing(whole)
    states = [_weights(folder) for folder in (cut, whole)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
