"""Who has started a run's processes, by what SLURM and torchrun say in the environment; no process is started."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from moebed.errors import SharedError
from moebed.machine import slurm
from moebed.training.launched import SrunTasks
from moebed.training.save_requests import NOTHING, REQUEUE, Requests
from moebed.training.trainer import AutoTrainer, looking_trainer
from tests.slurm_variables import SCRIPT, task

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def said(monkeypatch):
    """Sets the variables, and takes away those of a job in which the tests run."""
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["MASTER_ADDR", "MASTER_PORT"]:
        monkeypatch.setenv(name, "")  # given back in the end, whoever sets it
        monkeypatch.delenv(name)

    monkeypatch.setattr(rank_zero_only, "rank", 0)  # which a Trainer sets

    def say(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return say


def _trainer(devices: int, nodes: int = 1, **more) -> Trainer:
    more = {"strategy": "ddp", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **more}
    return AutoTrainer(accelerator="cpu", precision="32-true", devices=devices, num_nodes=nodes, **more)


def _place(trainer: Trainer) -> tuple[int, int, int, int]:
    return trainer.global_rank, trainer.local_rank, trainer.node_rank, trainer.world_size


INTERACTIVE = {"SLURM_JOB_NAME": "interactive"}  # a shell of salloc; of `srun --pty bash` it is bash


@pytest.mark.parametrize("job", [{}, INTERACTIVE, {"SLURM_JOB_NAME": "bash"}])
def test_tasks_of_srun_are_one_run_in_whatever_job(said, job):
    """Lightning's environment took each of a job called interactive or bash for a run of its own, in one folder."""
    said(task(rank=3, **job))
    trainer = _trainer(2, 2)
    assert _place(trainer) == (3, 1, 1, 4)
    environment = trainer.strategy.cluster_environment
    assert environment.creates_processes_externally  # nobody is started beside them
    assert environment.main_address == "gpu07"


def test_a_number_of_tasks_needs_none_of_each_node(said, monkeypatch):
    """As ``--ntasks=4`` has it, to which Lightning's environment said no with a traceback."""
    said(task(rank=1))
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    assert _place(_trainer(2, 2)) == (1, 1, 0, 4)


@pytest.mark.parametrize("variables", [SCRIPT, task(per_node=1, nodes=1), SCRIPT | INTERACTIVE])
def test_where_srun_has_started_no_others_lightning_starts_them(said, variables):
    """In a script without srun Lightning's environment waited for tasks that nobody starts, half an hour long."""
    said(variables)
    trainer = _trainer(2)
    assert not trainer.strategy.cluster_environment.creates_processes_externally
    assert _place(_trainer(1, strategy="auto")) == (0, 0, 0, 1)


def test_what_looks_is_one_process(said, tmp_path):
    """Each task for itself, as srun starts several probes in one job."""
    said(task(rank=2))
    assert _place(looking_trainer(tmp_path)) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "words"),
    [
        (
            task(),
            1,
            1,
            "srun has started 2 + 2 tasks on 2 nodes, but trainer.devices is 1 and trainer.num_nodes 1; give",
        ),
        (task(), 4, 1, "give srun --nodes=1 --ntasks-per-node=4, or the recipe what srun has"),
        (task() | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, 2, 2, "srun has started 3 + 1 tasks on 2 nodes"),
        (SCRIPT, 2, 2, "nothing has started this process together with those of other nodes; start it by srun"),
        ({}, 1, 2, "nothing has started this process together with those of other nodes; start it by srun, or by tor"),
        ({"torchrun": "4"}, 1, 1, "torchrun has started 4 processes, 4 of them here, but trainer.devices is 1 and"),
        ({"torchrun": "4"}, 2, 2, "4 of them here, but trainer.devices is 2 and trainer.num_nodes 2; give torchrun"),
        ({"torchrun": "4"}, 4, 2, "give torchrun --nnodes 2 --nproc_per_node 4, or the recipe what torchrun has"),
    ],
)
def test_another_number_of_processes_than_the_recipe_has_is_refused(
    said, variables, devices, nodes, words, monkeypatch
):
    """They trained each for itself in the same folder, or waited for others."""
    if world := variables.pop("torchrun", None) if "torchrun" in variables else None:
        variables = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        variables |= {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    said(variables)
    with pytest.raises(SharedError, match=re.escape(words)):
        _trainer(devices, nodes, strategy="auto")


class ByHand(LightningEnvironment):
    """As Lightning's KubeflowEnvironment, which goes by RANK and WORLD_SIZE and has no variable for nodes."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def node_rank(self) -> int:
        return int(os.environ["RANK"])


@pytest.mark.parametrize("job", [{}, SCRIPT, task(rank=1)])
@pytest.mark.parametrize("place", ["plugins", "strategy"])
def test_an_environment_of_ones_own_knows_for_itself_how_many_there_are(said, job, place):
    """In trainer.plugins or in the strategy: a run on two nodes was refused, and in a job one of a strategy's."""
    said({**job, "RANK": "1", "WORLD_SIZE": "2"})
    more = {"plugins": ByHand()} if place == "plugins" else {"strategy": DDPStrategy(cluster_environment=ByHand())}
    assert _place(_trainer(1, 2, **more)) == (1, 0, 1, 2)


def test_a_person_may_number_the_nodes(said):
    said({"NODE_RANK": "1"})
    assert _place(_trainer(2, 2)) == (2, 0, 1, 4)


def test_steps_of_a_job_meet_at_ports_of_their_own(said, monkeypatch):
    ports = []
    for step, job in ((0, "12345"), (1, "12345"), (0, "12346")):
        monkeypatch.delenv("MASTER_PORT", raising=False)
        said(task(step=step, SLURM_JOB_ID=job))
        ports.append(SrunTasks().main_port)
    assert len(set(ports)) == 3
    assert all(15000 <= port < 30000 for port in ports)  # below those that a kernel hands out


def test_tasks_of_nodes_are_read_as_slurm_writes_them(said):
    for text, tasks in (("2(x3),1", [2, 2, 2, 1]), ("8", [8]), ("1,3(x2)", [1, 3, 3])):
        said({"SLURM_STEP_TASKS_PER_NODE": text})
        assert slurm.tasks_of_nodes() == tasks


ALONE = """
import os, sys
from moebed.cli import main
sys.modules["moebed.commands.report"] = type(sys)("report")
sys.modules["moebed.commands.report"].run = print
sys.argv = ["moebed", "report", "a folder"]
main()
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from moebed.machine import slurm
print(rank_zero_only.rank, slurm.tasks(), slurm.job())
"""


@pytest.mark.parametrize("variables", [task(rank=1), {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"} | SCRIPT])
def test_a_command_of_one_process_is_the_first_wherever_it_was_started(said, variables):
    """As srun starts one for each of several checkpoints: those after the first drew and logged nothing, or failed."""
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["report ['a folder']", "0 1 12345"], done.stderr


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scontrol(said, tmp_path, monkeypatch):
    """A command of this name, given as a script; returns what it was called with."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def write(script):
        (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n{script}\n')
        (tmp_path / "scontrol").chmod(0o755)
        return tmp_path / "called"

    return write


PREEMPTED = "PreemptEligibleTime=2026-11-28T11:55:48 PreemptTime=2026-11-28T11:55:55"
MAKES_ROOM = f"JobState=RUNNING Reason=None {PREEMPTED}"
EARLY = """
import os, signal, subprocess, sys
from moebed.commands import fit
from moebed.machine.termination import came_early

def train(command, arguments):
    if "to make room" in sys.argv:
        os.kill(os.getpid(), signal.SIGTERM)
    child = subprocess.Popen(["sleep", "0.5"])  # as a compiler
    os.kill(child.pid, signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)
    print(child.wait(), *came_early(), *came_early())

sys.modules["moebed.commands.training_run"] = type(sys)("training_run")
sys.modules["moebed.commands.training_run"].train = train
fit.run("fit", ["--trainer.max_steps", "1"])
"""


def test_slurms_signal_before_the_run_can_save_is_noted_and_reaches_nothing_that_it_has_started(said):
    """While text is prepared or PyTorch loaded it ended the job, which was not queued again; and it ends compilers."""
    environment = {**os.environ, **SCRIPT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", EARLY], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"0 {int(signal.SIGUSR1)}\n"), done.stderr


@pytest.mark.parametrize(("rank", "requeued"), [(0, True), (1, False)])
def test_a_job_that_makes_room_before_it_has_begun_is_queued_again(said, scontrol, rank, requeued):
    """Which ended of the signal, within the grace time."""
    called = scontrol(f"echo '{MAKES_ROOM}'")
    environment = {**os.environ, **task(rank), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", EARLY, "to make room"], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, ""), done.stderr
    assert called.exists() == requeued
    assert ("job 12345 is in the queue again: it makes room for another" in done.stderr) == requeued


def test_a_signal_that_came_early_counts(said, monkeypatch):
    said(SCRIPT)
    monkeypatch.setattr("moebed.training.save_requests.came_early", lambda: [signal.SIGUSR1])
    requests = Requests()
    requests.take_over(_trainer(1, strategy="auto"))
    requests.give_back()
    assert requests._asked == REQUEUE


def test_without_slurm_its_signal_means_nothing(said):
    requests, before = Requests(), signal.getsignal(signal.SIGUSR1)
    requests.take_over(_trainer(1, strategy="auto"))
    try:
        assert signal.getsignal(signal.SIGUSR1) is before
        assert requests._asked == NOTHING
    finally:
        requests.give_back()


def test_an_environment_of_ones_own_says_whether_a_job_is_queued_again(said):
    """In trainer.plugins."""
    said(task(per_node=1, nodes=1))
    requests, before = Requests(), signal.getsignal(signal.SIGUSR1)
    own = SLURMEnvironment(auto_requeue=False)
    requests.take_over(_trainer(1, strategy="auto", plugins=[own]))
    try:
        assert signal.getsignal(signal.SIGUSR1) is before
    finally:
        requests.give_back()


def test_why_a_job_cannot_be_queued_again_is_said_as_scontrol_does(said, scontrol):
    said({**SCRIPT, "SLURM_ARRAY_JOB_ID": "12340", "SLURM_ARRAY_TASK_ID": "5"})
    called = scontrol("echo Requested operation is presently disabled >&2; exit 1")
    with pytest.warns(
        UserWarning, match=r"job 12340_5 could not be requeued \(Requested operation is presently disabl"
    ):
        Requests().requeue(REQUEUE)
    assert called.read_text() == "requeue 12340_5\n"


@pytest.mark.parametrize(
    ("number", "shown", "requeued"),
    [
        (signal.SIGTERM, MAKES_ROOM, True),
        (signal.SIGTERM, "JobState=RUNNING PreemptEligibleTime=2026-11-28T11:55:48 PreemptTime=None", False),
        (signal.SIGTERM, f"JobState=COMPLETING Restarts=1 {PREEMPTED}", False),  # SLURM has done it
        (signal.SIGINT, MAKES_ROOM, False),
    ],
)
def test_a_job_that_makes_room_within_its_grace_time_is_queued_again(said, scontrol, capsys, number, shown, requeued):
    """It was not: SLURM queues one again that it has to end, and this one had ended by itself."""
    said(SCRIPT)
    called = scontrol(f"echo '{shown}'")
    requests = Requests()
    requests.take_over(_trainer(1, strategy="auto"))
    try:
        os.kill(os.getpid(), number)
        requests.requeue(requests._asked)
    finally:
        requests.give_back()
    assert ("requeue 12345" in (called.read_text() if called.exists() else "").splitlines()) == requeued
    assert ("job 12345 is in the queue again, and continues" in capsys.readouterr().err) == requeued


# What is said ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variables", "times"), [(task(rank=0), 1), (task(rank=2), 0), (SCRIPT, 1)])
def test_what_is_waited_for_is_said_once(said, variables, times):
    """Also before PyTorch is there; each of 64 ranks said it."""
    code = (
        "import time\nfrom moebed.machine import progress\nprogress.SECONDS = .05\n"
        "progress.Lines.__init__.__defaults__ = (.05, 60)\nwith progress.waiting('loading'): time.sleep(.3)"
    )
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("loading")) == (0, times), done.stderr
