"""The door `deepspeed --hostfile`: launcher, pdsh and sshd between two hosts.

The hosts are namespaces of this machine with a virtual cable between them; no packet leaves it.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.netns

ROOT = Path(__file__).resolve().parents[2]
INTERFACE = "cable"
SYSTEM_PATH = "/usr/sbin:/sbin"

SSHD_CONFIG = """
HostKey {keys}/host
AuthorizedKeysFile {keys}/user.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""

SSH_CONFIG = """
Host *
  IdentityFile {keys}/user
  IdentitiesOnly yes
  BatchMode yes
  UserKnownHostsFile {keys}/known_hosts
"""

# A host has its own network, processes, name, /run and /dev/shm, and the ssh settings of this test in the usual place;
# the other files are the machine's. The first process ends with the namespaces, and they with it.
HOST_SCRIPT = """
set -e
hostname {name}
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind {keys}/ssh_config /etc/ssh/ssh_config
ip link set lo up
exec "$(command -v sshd)" -D -e -f {keys}/sshd_config
"""


@dataclass(frozen=True)
class Host:
    """A network namespace and what lives in it."""

    name: str
    address: str
    init: int  # process that the namespaces belong to, numbered as the machine sees it

    def run(self, command: list[str], env: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
        """Run a command on this host, as somebody logged in there would."""
        enter = ["nsenter", f"--target={self.init}", "--net", "--mount", "--pid", "--uts", f"--wd={ROOT}"]
        return subprocess.run([*enter, *command], env=env, capture_output=True, text=True, timeout=timeout)


@dataclass(frozen=True)
class TwoHosts:
    """Two hosts that reach each other by ssh, and nothing else; the first is where commands are typed."""

    first: Host
    second: Host
    hostfile: Path
    environment: dict[str, str]

    def deepspeed(self, *arguments: str | Path, timeout: float) -> subprocess.CompletedProcess[str]:
        """Run `deepspeed --hostfile …` on the first host."""
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [str(launcher), "--hostfile", str(self.hostfile), *map(str, arguments)]
        return self.first.run(command, {**os.environ, **self.environment}, timeout)


def _check_output(*command: str | Path) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


def _wait_until(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.05)


def _child_of(process: subprocess.Popen[bytes]) -> int | None:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0]) if children else None


def _write_keys(folder: Path, addresses: list[str]) -> None:
    for key in ("host", "user"):
        _check_output("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
    host_key = (folder / "host.pub").read_text()
    (folder / "known_hosts").write_text("".join(f"{address} {host_key}" for address in addresses))
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(keys=folder))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(keys=folder))


def _start_host(name: str, keys: Path, log: Path, stack: ExitStack) -> int:
    """Start a host's first process and return its number."""
    namespaces = ["--net", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
    script = HOST_SCRIPT.format(name=shlex.quote(name), keys=shlex.quote(str(keys)))
    process = subprocess.Popen(
        ["unshare", *namespaces, "bash", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=stack.enter_context(log.open("wb")),
        stderr=subprocess.STDOUT,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    _wait_until(lambda: process.poll() is not None or b"Server listening" in log.read_bytes(), f"no sshd on {name}")
    init = _child_of(process) if process.poll() is None else None
    assert init is not None, log.read_text()
    return init


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """Two hosts with one slot each, ready for `deepspeed --hostfile`."""
    folder = tmp_path_factory.mktemp("hosts")
    addresses = ["10.0.0.1", "10.0.0.2"]
    with ExitStack() as stack:
        path = os.environ["PATH"]
        stack.callback(os.environ.__setitem__, "PATH", path)
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{path}:{SYSTEM_PATH}"
        _write_keys(folder, addresses)
        hosts = [
            Host(name, address, _start_host(name, folder, folder / f"{name}.log", stack))
            for name, address in zip(("flash-a", "flash-b"), addresses, strict=True)
        ]
        cable = ["ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", str(hosts[1].init)]
        _check_output("nsenter", f"--target={hosts[0].init}", "--net", *cable)
        for host in hosts:
            enter = ["nsenter", f"--target={host.init}", "--net", "ip"]
            _check_output(*enter, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            _check_output(*enter, "link", "set", INTERFACE, "up")

        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{host.address} slots=1\n" for host in hosts))
        exported = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"}
        exported["PATH"] = os.environ["PATH"]
        (folder / "deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in exported.items()))
        environment = {**exported, "DS_ENV_FILE": str(folder / "deepspeed_env")}
        yield TwoHosts(hosts[0], hosts[1], hostfile, environment)


def test_the_ranks_of_two_hosts_add_up(two_hosts: TwoHosts) -> None:
    result = two_hosts.deepspeed(Path(__file__).with_name("all_reduce.py"), timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    for rank, name in enumerate(("flash-a", "flash-b")):
        assert f"rank {rank} of 2 on {name} ['cable', 'lo'] sum 3" in result.stdout


def losses(run: Path) -> list[float]:
    records = [json.loads(line).get("metrics", {}) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def test_training_on_two_hosts_gives_the_losses_of_one_process(
    two_hosts: TwoHosts, prepared_data: Path, tmp_path: Path
) -> None:
    config = {
        "run": {"dir": str(tmp_path / "two")},
        "model": {"vocab_size": 384, "d_model": 32, "n_layers": 2, "qk_dim": 16, "chunk_size": 16},
        "data": {
            "path": str(prepared_data),
            "seq_len": 64,
            "validation": {"valid": {"path": str(prepared_data), "split": "valid"}},
        },
        "train": {"tokens": 2048, "tokens_per_step": 512, "precision": "fp32", "zero_stage": 2, "log_every": 1},
        "tracking": {"enabled": False},
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))

    result = two_hosts.deepspeed("launch/train.py", file, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "two/DONE").exists()

    alone = [sys.executable, "launch/train.py", str(file), f"run.dir={tmp_path / 'one'}"]
    result = two_hosts.second.run(alone, {**os.environ, **two_hosts.environment}, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(losses(tmp_path / "two")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
