"""What a person sees of a run in MLflow's pages: curves, parameters, the dataset with its digest, card and picture."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.engine import free_port

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.chromium


@pytest.fixture(scope="module")
def run_dir(prepared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that was tracked."""
    folder = tmp_path_factory.mktemp("tracked")
    values = {
        "run": {"dir": str(folder / "run"), "name": "seen"},
        "model": {"vocab_size": 384, "d_model": 32, "n_layers": 2, "qk_dim": 16, "chunk_size": 16},
        "data": {
            "path": str(prepared_data),
            "seq_len": 64,
            "validation": {"valid": {"path": str(prepared_data), "split": "valid"}},
        },
        "train": {"tokens": 5120, "tokens_per_step": 512, "micro_batch": 2, "precision": "fp32", "zero_stage": 2},
    }
    (folder / "run.yaml").write_text(json.dumps(values))
    command = [sys.executable, "launch/train.py", str(folder / "run.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def ui(run_dir: Path) -> Iterator[str]:
    """The address of `mlflow ui` over the run's store."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{run_dir / 'mlflow.db'}"]
    with open(run_dir / "ui.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=run_dir, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            break
        except OSError:
            assert time.monotonic() < deadline, (run_dir / "ui.log").read_text()
            time.sleep(0.5)
    yield address
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def rendered(address: str, profile: Path) -> str:
    """The page's document once its scripts have run."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={profile}", "--window-size=1600,4000", "--virtual-time-budget=30000", "--dump-dom"]
    done = subprocess.run([*command, address], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_overview_and_curves(run_dir: Path, ui: str, prepared_data: Path, tmp_path: Path) -> None:
    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    digest = json.loads((prepared_data / "manifest.json").read_text())["digest"]
    overview = rendered(f"{ui}/#/experiments/1/runs/{run_id}", tmp_path / "profile")
    for shown in ("seen", "Finished", "model.d_model", "optimizer.lr", "data/train", digest[:8], "step-00000010"):
        assert shown in overview, shown
    curves = rendered(f"{ui}/#/experiments/1/runs/{run_id}/model-metrics", tmp_path / "profile")
    # A chart is drawn once it is scrolled into view; the sections say how many charts they hold.
    words = " ".join(re.sub(r"<[^>]+>", " ", curves).split())
    for section in ("train (4)", "valid (3)", "perf (3)"):
        assert section in words, section
    load = rendered(f"{ui}/#/experiments/1/runs/{run_id}/system-metrics", tmp_path / "profile")
    words = " ".join(re.sub(r"<[^>]+>", " ", load).split())
    assert "System metrics (9)" in words, words[-2000:]


def test_the_data_is_shown_with_its_card_and_picture(
    run_dir: Path, ui: str, prepared_data: Path, tmp_path: Path
) -> None:
    manifest = json.loads((prepared_data / "manifest.json").read_text())
    run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    artifacts = f"{ui}/#/experiments/1/runs/{run_id}/artifacts/data/{prepared_data.name}"
    card = " ".join(re.sub(r"<[^>]+>", " ", rendered(f"{artifacts}/card.md", tmp_path / "profile")).split())
    for shown in ("Token shards: text", manifest["digest"], f"{manifest['splits']['train']['tokens']:,}"):
        assert shown in card, shown
    page = rendered(f"{artifacts}/figure.png", tmp_path / "profile")
    assert re.search(r'<img[^>]+src="(blob:|data:image|[^"]*figure\.png)', page), "no picture"
