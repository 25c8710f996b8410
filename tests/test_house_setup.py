"""setup-venv.sh, the real script, with an interpreter that only pretends to install."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PRETENDER = """#!/usr/bin/env bash
case "$*" in
"-m venv "*) echo venv >>{log}; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pip install "*) echo pip >>{log}; sleep "${{PIP_SECONDS:-0}}"; exit "${{PIP_STATUS:-0}}" ;;
*) exec {python} "$@" ;;
esac
"""


@dataclass(frozen=True)
class Checkout:
    """A copy of what the set-up reads, and a record of what it did."""

    folder: Path
    python: Path
    log: Path

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.folder / "setup-venv.sh"],
            env={**os.environ, "PYTHON": str(self.python), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def set_up(self, **environment: str) -> tuple[int, str]:
        """Exit status and output."""
        process = self.start(**environment)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output

    def did(self) -> list[str]:
        """What was done since the last call."""
        steps = self.log.read_text().split() if self.log.exists() else []
        self.log.write_text("")
        return steps


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("setup-venv.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, folder)
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(PRETENDER.format(log=log, python=sys.executable))
    python.chmod(0o755)
    return Checkout(folder, python, log)


def test_a_finished_set_up_is_left_alone(checkout: Checkout) -> None:
    assert checkout.set_up()[0] == 0
    assert checkout.did() == ["venv", "pip"]
    assert checkout.set_up() == (0, "")
    assert checkout.set_up(PYTHON="") == (0, "")
    assert checkout.did() == []


def test_a_set_up_that_broke_off_does_not_count(checkout: Checkout) -> None:
    assert checkout.set_up(PIP_STATUS="1")[0] == 1
    assert checkout.did() == ["venv", "pip"]
    (checkout.folder / ".venv/half").touch()
    assert checkout.set_up()[0] == 0
    assert checkout.did() == ["venv", "pip"]
    assert not (checkout.folder / ".venv/half").exists()


def test_another_pin_is_an_update(checkout: Checkout) -> None:
    checkout.set_up()
    checkout.did()
    pins = checkout.folder / "constraints.txt"
    pins.write_text(pins.read_text().replace("rich==", "rich==9"))
    assert checkout.set_up()[0] == 0
    assert checkout.did() == ["pip"]


def test_an_update_that_broke_off_does_not_count(checkout: Checkout) -> None:
    checkout.set_up()
    (checkout.folder / "pyproject.toml").write_text("# changed\n")
    assert checkout.set_up(PIP_STATUS="1")[0] == 1
    checkout.did()
    assert checkout.set_up()[0] == 0
    assert checkout.did() == ["venv", "pip"]


def test_a_moved_checkout_is_set_up_anew(checkout: Checkout) -> None:
    checkout.set_up()
    checkout.did()
    moved = Checkout(checkout.folder.rename(checkout.folder.with_name("moved")), checkout.python, checkout.log)
    assert moved.set_up()[0] == 0
    assert moved.did() == ["venv", "pip"]


def test_two_at_once_install_once(checkout: Checkout) -> None:
    first = checkout.start(PIP_SECONDS="2")
    while not checkout.log.exists():
        time.sleep(0.02)
    status, output = checkout.set_up()
    assert status == 0
    assert "waiting" in output
    assert first.wait(timeout=60) == 0
    assert checkout.did() == ["venv", "pip"]


def make_executable(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_what_the_machine_lacks_is_said_before_anything_is_installed(checkout: Checkout, tmp_path: Path) -> None:
    bad_compiler = make_executable(tmp_path / "bad-c++", "exit 1")
    no_venv = make_executable(
        tmp_path / "no-venv", f'case "$*" in *ensurepip*) exit 1 ;; esac; exec {sys.executable} "$@"'
    )
    too_old = make_executable(tmp_path / "old", 'case "$*" in *--version*) echo Python 3.9.2 ;; *) exit 1 ;; esac')
    cases: list[tuple[dict[str, str], list[str]]] = [
        ({"PYTHON": too_old}, ["Python 3.9.2", "3.11 or 3.12"]),
        ({"PYTHON": "/nonexistent/python"}, ["/nonexistent/python", "3.11 or 3.12"]),
        ({"CXX": "nonexistent-c++"}, ["no C++ compiler (nonexistent-c++)", "apt-get install g++"]),
        ({"CXX": bad_compiler}, ["cannot build", "apt-get install g++"]),
        ({"PYTHON": no_venv, "CXX": "nonexistent-c++"}, ["no venv module", "-venv", "no C++ compiler"]),
    ]
    for environment, expected in cases:
        status, output = checkout.set_up(**environment)
        assert status == 2, output
        for words in expected:
            assert words in output, environment
        assert not (checkout.folder / ".venv").exists()


def test_a_python_on_path_that_does_not_run_is_passed_over(checkout: Checkout, tmp_path: Path) -> None:
    shims = tmp_path / "shims"
    shims.mkdir()
    for name in ("python3", "python3.12"):
        make_executable(shims / name, "echo no such version >&2; exit 127")
    (shims / "python3.11").symlink_to(checkout.python)
    status, output = checkout.set_up(PYTHON="", PATH=f"{shims}:/usr/bin:/bin")
    assert status == 0, output
    assert f"new .venv of {shims}/python3.11" in output


def test_another_python_that_is_asked_for_replaces_the_environment(checkout: Checkout, tmp_path: Path) -> None:
    checkout.set_up()
    checkout.did()
    other = make_executable(
        tmp_path / "other", f'case "$*" in *base_prefix*) echo elsewhere ;; *) exec {checkout.python} "$@" ;; esac'
    )
    assert checkout.set_up(PYTHON=other)[0] == 0
    assert checkout.did() == ["venv", "pip"]
