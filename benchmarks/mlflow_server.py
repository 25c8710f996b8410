"""A real MLflow server over SQLite, which benchmarks and tests kill and start again."""

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from launch.engine import free_port
from pipeline.errors import UserError

START_SECONDS = 120


class MLflowServer:
    """On a free port of this machine; its database, artifacts and log lie in `folder`. SIGKILL alone ends it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store, self.port = folder, folder / "mlflow.db", free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._coming: threading.Thread | None = None

    def start(self) -> None:
        """Start it unless it runs, and wait until it answers. Raises `UserError` if it does not."""
        if self._process:
            return
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.store}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with open(self.folder / "server.log", "ab") as log:
            self._process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise UserError(f"the MLflow server does not answer; see {self.folder / 'server.log'}")
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL to all of its processes."""
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def come_back(self, seconds: float) -> None:
        """Start it again in so many seconds, in the background."""

        def start() -> None:
            time.sleep(seconds)
            self.start()

        self._coming = threading.Thread(target=start, daemon=True)
        self._coming.start()

    def wait(self) -> None:
        """Wait until it is back, if it was killed."""
        if self._coming:
            self._coming.join()
            self._coming = None

    @property
    def is_back(self) -> bool:
        """Whether it runs."""
        return self._coming is None or not self._coming.is_alive()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False
