"""The door `sbatch launch/slurm.sh`: Debian's SLURM, with a controller and one node on this machine."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=bf_interval=1
KillWait=20
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def cluster(free_port: Callable[[], int]) -> Iterator[dict[str, str]]:
    """A cluster of this machine alone; the environment in which its commands find it."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: it holds a socket
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(
        SLURM_CONF.format(folder=folder, host=host, ports=[free_port() for _ in range(2)])
    )
    environment = os.environ | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    daemons = [
        ["munged", "--foreground", "--force", f"--key-file={key}", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]
    running = []
    try:
        for name, *options in daemons:
            program = shutil.which(name, path=environment["PATH"])
            assert program
            with (folder / f"{name}.out").open("w") as log:
                running.append(subprocess.Popen([program, *options], env=environment, stdout=log, stderr=log))
            time.sleep(1)
        wait_for(lambda: "idle" in shell(environment, "sinfo", "--noheader", "--format=%T"), 60)
        yield environment
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(30)
        shutil.rmtree(folder)


def shell(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.5)


def submit(cluster: dict[str, str], output: Path, *arguments: str) -> str:
    options = ["--nodes=1", "--ntasks-per-node=2", f"--output={output}", "--parsable"]
    return shell(cluster, "sbatch", *options, "launch/slurm.sh", *arguments).strip()


def job(cluster: dict[str, str], number: str) -> dict[str, str]:
    """What the controller says of a job."""
    return dict(re.findall(r"(\w+)=(\S*)", shell(cluster, "scontrol", "show", "job", number)))


def steps(run: Path) -> list[int]:
    """The steps that the local record has, in its order."""
    if not (run / "metrics.jsonl").exists():
        return []
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in records if "train/loss" in record.get("metrics", {})]


def test_a_job_at_its_time_limit_saves_is_queued_again_and_goes_on(
    cluster: dict[str, str], run_config: Path, tmp_path: Path
) -> None:
    run, output, last = tmp_path / "run", tmp_path / "job.out", 100
    number = submit(cluster, output, str(run_config), f"run.dir={run}", f"train.tokens={last * 512}")
    wait_for(lambda: len(steps(run)) > 5, 240)
    shell(cluster, "scancel", "--batch", "--signal=USR1", number)  # as SLURM does it two minutes ahead
    wait_for(lambda: job(cluster, number)["Restarts"] == "1", 120)
    assert "received SIGUSR1" in output.read_text()
    assert not (run / "DONE").exists()
    # SLURM lets such a job wait for two minutes. In the second in which it was ended, its node would refuse it.
    time.sleep(2)
    shell(cluster, "scontrol", "update", f"JobId={number}", "StartTime=now")
    wait_for((run / "DONE").exists, 300)
    wait_for(lambda: job(cluster, number)["JobState"] == "COMPLETED", 120)
    assert steps(run) == list(range(1, last + 1))  # no step lost, none taken twice


def test_a_stop_file_ends_a_job_for_good(cluster: dict[str, str], run_config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    number = submit(cluster, tmp_path / "job.out", str(run_config), f"run.dir={run}", "train.tokens=51200000")
    wait_for(lambda: len(steps(run)) > 2, 240)
    (run / "STOP").touch()
    wait_for(lambda: job(cluster, number)["JobState"] == "FAILED", 120)
    told = job(cluster, number)
    assert (told["ExitCode"], told["Restarts"]) == ("75:0", "0")


def test_a_user_error_ends_a_job_at_once(cluster: dict[str, str], run_config: Path, tmp_path: Path) -> None:
    output = tmp_path / "job.out"
    number = submit(cluster, output, str(run_config), f"run.dir={tmp_path / 'run'}", "train.tokns=1")
    wait_for(lambda: job(cluster, number)["JobState"] == "FAILED", 240)
    assert job(cluster, number)["ExitCode"] == "2:0"
    assert output.read_text().count("error: ") == 1 + output.read_text().count("srun: error: ")
    assert not (tmp_path / "run").exists()
