"""A real SLURM on this machine: controller, node daemon and munge in their own folder, two GPUs of device nodes."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs={processors} Gres=gpu:2 State=UNKNOWN
PartitionName=usual Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


def is_installed() -> bool:
    """Whether this machine has SLURM's daemons and this user may start them."""
    return all(shutil.which(name, path=_path()) for name in DAEMONS) and os.geteuid() == 0


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start a cluster of this machine alone; yields the environment in which SLURM's commands find it."""
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    for number in (0, 1):
        os.mknod(folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File={folder}/gpu[0-1]\n")
    ports = _free_ports(2)
    settings = {"host": host, "folder": folder, "controller_port": ports[0], "node_port": ports[1]}
    (folder / "slurm.conf").write_text(CONFIG.format(**settings, processors=os.cpu_count()))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    munge = ("--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key")
    munge += (f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed")
    commands = [("munged", *munge), ("slurmctld", "-D"), ("slurmd", "-D", "-N", host)]
    daemons = []
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "wb") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if command[0] == "munged":
                wait_for(lambda: (folder / "munge.socket").exists(), "munge's socket")
        wait_for(lambda: "idle" in called(environment, "sinfo", "--noheader", "-o", "%T"), "an idle node")
        yield environment
    finally:
        subprocess.run(["scancel", "--user", "root", "--signal", "KILL"], env=environment, capture_output=True)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(20)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


def called(environment: dict[str, str], *command: str) -> str:
    """What one of SLURM's commands prints; empty while the controller does not answer."""
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def state_of(environment: dict[str, str], job: str) -> str:
    """A task's state as SLURM names it (`PENDING`, `RUNNING`, `COMPLETED`, ...)."""
    found = re.search(r"JobState=(\w+)", called(environment, "scontrol", "show", "job", job))
    return found[1] if found else ""


def start_now(environment: dict[str, str], job: str) -> None:
    """A task that is queued again starts soon, and not after the two minutes that SLURM gives a node to recover."""
    wait_for(lambda: state_of(environment, job) == "PENDING", f"{job} in the queue again")
    # In the second in which a task ended the node still refuses its credentials, and SLURM would end it for good.
    time.sleep(2)
    called(environment, "scontrol", "update", f"JobId={job}", "StartTime=now")


def wait_for(happened: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Wait until something is so; an AssertionError names what did not come."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.2)
