"""The house: one set of pins under three names, arrows between packages that go one way, imports that cost nothing."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "flash_model", "launch", "benchmarks")
HEAVY = ("ray", "mlflow", "datasets", "deepspeed")


def read_pins(lines: list[str]) -> dict[str, str]:
    """Version by canonical package name; every line must pin exactly, and none twice."""
    pins: dict[str, str] = {}
    for line in lines:
        name, separator, version = line.partition("==")
        assert separator, f"not an exact pin: {line}"
        assert canonicalize_name(name) not in pins, f"pinned twice: {line}"
        pins[canonicalize_name(name)] = version
    return pins


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return read_pins([line for line in lines if line and not line.startswith("#")])


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def direct_requirements() -> list[Requirement]:
    table = project()
    lines = sum(table["optional-dependencies"].values(), table["dependencies"])
    own = canonicalize_name(table["name"])
    return [requirement for requirement in map(Requirement, lines) if canonicalize_name(requirement.name) != own]


def test_conda_gets_the_same_packages_and_versions() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (by_pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert by_pip[0] == "-e .[test]"
    assert read_pins(by_pip[1:]) == constraints()


def test_conda_python_is_one_that_the_project_supports() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (python,) = [entry for entry in environment["dependencies"] if str(entry).startswith("python=")]
    assert SpecifierSet(project()["requires-python"]).contains(python.removeprefix("python="))


def test_every_direct_dependency_is_pinned_inside_its_range() -> None:
    pins = constraints()
    for requirement in direct_requirements():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{requirement} has no pin"
        assert requirement.specifier.contains(pins[name]), f"{requirement} excludes its pin {pins[name]}"


def test_every_transitive_dependency_is_pinned() -> None:
    pins = constraints()
    open_ends = direct_requirements()
    seen: set[tuple[str, frozenset[str]]] = set()
    while open_ends:
        requirement = open_ends.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        assert name in pins, f"{requirement} has no pin"
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                open_ends.append(needed)
    assert len(seen) > 100


def imported_packages(source: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(), source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("pipeline", {"flash_model", "launch", "benchmarks", "deepspeed", "mlflow"}),
        ("flash_model", {"pipeline", "launch", "benchmarks", "deepspeed", "mlflow", "ray", "datasets"}),
        ("launch", {"benchmarks"}),
    ],
)
def test_arrows_go_one_way(package: str, forbidden: set[str]) -> None:
    sources = list((ROOT / package).rglob("*.py"))
    assert sources
    for source in sources:
        assert not imported_packages(source) & forbidden, source


def test_no_module_loads_the_heavy_packages_when_imported() -> None:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    script = (
        "import importlib, sys\n"
        f"for module in {modules}:\n"
        "    importlib.import_module(module)\n"
        f"    loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "    if loaded: sys.exit(f'{module} loads {loaded}')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["config", "replay", "supervise", "by_ray", "system_metrics"])
def test_what_runs_beside_training_does_not_load_torch(module: str) -> None:
    """It costs a second and 150 MB, on a node whose cores are busy."""
    script = f"import sys, launch.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
