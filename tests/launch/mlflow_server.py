"""A real MLflow server that tests kill and start again, and a proxy in front of it that loses answers."""

import http.client
import sqlite3
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from benchmarks.mlflow_server import MLflowServer


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


class Server(MLflowServer):
    """And what is in its database."""

    def stored(self, columns: str, table: str, run_id: str) -> list[tuple[object, ...]]:
        """Rows of a run in the server's database, every one of them."""
        with sqlite3.connect(self.store) as database:
            rows = database.execute(f"SELECT {columns} FROM {table} WHERE run_uuid = ?", (run_id,))
            return sorted(rows.fetchall())


class Cut(Exception):  # noqa: N818 (no error)
    """The connection ends without an answer."""


class Proxy:
    """Passes requests on to a server.

    after: called with the path and body of a request before its answer is passed on; may raise `Cut`.
    authorization: the header without which a request is refused.
    """

    def __init__(self, server: Server) -> None:
        self.after: Callable[[str, bytes], None] | None = None
        self.authorization: str | None = None
        self.refused = 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                try:
                    self._pass_on()
                except (Cut, OSError, http.client.HTTPException):
                    self.close_connection = True

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if proxy.authorization and self.headers.get("Authorization") != proxy.authorization:
                    proxy.refused += 1
                    self.send_error(401)
                    return
                backend = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
                backend.request(self.command, self.path, body, dict(self.headers))
                answer = backend.getresponse()
                content = answer.read()
                if proxy.after:
                    proxy.after(self.path, body)
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.uri = f"http://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
