"""Files of other machines: web servers of every kind of manners, memory, and file systems that are not installed."""

import functools
import gzip
import http.server
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from pipeline import remote
from pipeline.config import Content, PrepareConfig
from pipeline.errors import UserError
from pipeline.locations import Document, Piece, open_file
from pipeline.prepare import prepare
from pipeline.sources import cut_units, list_files, read_piece, survey

MakeConfig = Callable[..., PrepareConfig]
ROWS = [{"id": f"r{number}", "text": f"text {number} " * 20} for number in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a directory; `ranges`: also parts of files; `failures`: how many requests it fails before it obeys;
    `missing`: what it does not find though it lists it.
    """

    ranges = True
    missing = ""
    failures = 0
    cut = 0

    def do_GET(self) -> None:
        if self._fails():
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        file = Path(self.translate_path(self.path))
        if not (self.ranges and wanted and file.is_file()):
            super().do_GET()
            return
        data = file.read_bytes()
        part = data[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {wanted[1]}-{int(wanted[1]) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if type(self).cut > 0:
            type(self).cut -= 1
            part = part[: len(part) // 2]
            self.close_connection = True
        self.wfile.write(part)

    def do_HEAD(self) -> None:
        if not self._fails():
            super().do_HEAD()

    def _fails(self) -> bool:
        if self.path == self.missing:
            self.send_error(404)
            return True
        if type(self).failures <= 0:
            return False
        type(self).failures -= 1
        self.send_error(503)
        return True

    def copyfile(self, source: Any, outputfile: Any) -> None:
        try:
            super().copyfile(source, outputfile)
        except ConnectionError:  # who asked has read enough
            self.close_connection = True

    def log_message(self, format: str, *arguments: Any) -> None: ...


@contextmanager
def served(folder: Path, **manners: Any) -> Iterator[tuple[str, Any]]:
    handler: Any = type("Handler", (Handler,), manners)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_WAIT_SECONDS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(remote, "_MORE_WAIT_SECONDS", (0.0,))


def content_of(**source: Any) -> Content:
    return Content.model_validate({"sources": [source], "tokenizer": {"path": "x"}, "unit_bytes": 20_000})


def texts(config: Content) -> list[str]:
    units = cut_units([survey(config, file) for file in list_files(config)], config)
    pieces = sorted((piece for unit in units for piece in unit), key=lambda piece: (piece.name, piece.start))
    items = [item for piece in pieces for item in read_piece(config, piece)]
    assert all(isinstance(item, Document) for item in items)
    return [item.data.decode() for item in items if isinstance(item, Document)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "served"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=60)
    return folder


@pytest.mark.usefixtures("ray_address")
@pytest.mark.parametrize(("kind", "name"), [("parquet", "rows.parquet"), ("jsonl", "a.jsonl")])
def test_workers_read_what_a_server_has(make_config: MakeConfig, folder: Path, kind: str, name: str) -> None:
    """Rows and byte ranges over the network: the digest is that of the same file on disk."""
    with served(folder) as (address, _):
        digests = {
            prepare(make_config(f"data{number}", sources=[{"type": kind, "path": f"{place}/{name}"}]))["digest"]
            for number, place in enumerate((address, folder))
        }
    assert len(digests) == 1


def test_a_directory_and_an_address_with_a_query(folder: Path) -> None:
    with served(folder) as (address, _):
        found = list_files(content_of(type="jsonl", path=f"{address}/"))
        assert [file.name for file in found] == ["a.jsonl", "deep/b.jsonl.gz"]
        signed = content_of(type="jsonl", path=f"{address}/deep/b.jsonl.gz?signature=x%3D")
        assert [file.name for file in list_files(signed)] == ["b.jsonl.gz"]
        assert texts(signed) == [row["text"] for row in ROWS]


def test_a_directory_that_a_server_lists_but_does_not_have(folder: Path) -> None:
    """Its files would be missing without a word."""
    with (
        served(folder, missing="/deep/") as (address, _),
        pytest.raises(UserError, match=r"content\.sources\.0\.path: .*/deep/"),
    ):
        list_files(content_of(type="jsonl", path=f"{address}/"))


def test_a_server_without_ranges(folder: Path) -> None:
    """Lines are found by reading from the start; tables, which are read from their end, are refused."""
    with served(folder, ranges=False) as (address, _):
        (folder / "long.jsonl").write_bytes(LINES * 100)  # longer than what is asked for at once
        config = content_of(type="jsonl", path=f"{address}/long.jsonl").model_copy(update={"unit_bytes": 2_000_000})
        assert texts(config) == [row["text"] for row in ROWS] * 100  # each piece is read from the start
        (folder / "long.parquet").write_bytes(b"PAR1" + bytes(12_000_000) + (folder / "rows.parquet").read_bytes())
        with pytest.raises(UserError, match=r"long\.parquet: cannot be read: .*range requests.*copy the file first"):
            texts(content_of(type="parquet", path=f"{address}/long.parquet"))


def test_what_fails_for_a_moment_is_tried_again(folder: Path) -> None:
    with served(folder) as (address, handler):
        config = content_of(type="jsonl", path=f"{address}/a.jsonl")
        handler.failures = 5
        files = list_files(config)
        handler.failures = 3
        surveys = [survey(config, file) for file in files]
        pieces = [piece for unit in cut_units(surveys, config) for piece in unit]
        handler.failures, handler.cut = 2, 2
        items = [item for piece in sorted(pieces, key=lambda piece: piece.start) for item in read_piece(config, piece)]
        assert [item.data.decode() for item in items if isinstance(item, Document)] == [row["text"] for row in ROWS]
        assert handler.failures == handler.cut == 0


def test_reading_goes_on_where_it_broke_off(folder: Path) -> None:
    with served(folder) as (address, handler), open_file(f"{address}/a.jsonl") as stream:
        assert stream.readline() == LINES.splitlines(keepends=True)[0]
        handler.cut, handler.failures = 1, 1
        stream.seek(10_000)
        assert stream.read() == LINES[10_000:]


def test_a_server_that_stays_broken(folder: Path) -> None:
    with served(folder) as (address, handler):
        config = content_of(type="jsonl", path=f"{address}/a.jsonl")
        files = list_files(config)
        handler.failures = 1_000_000
        skip = config.model_copy(update={"clean": config.clean.model_copy(update={"on_unreadable_file": "skip"})})
        with pytest.raises(UserError, match=r"a\.jsonl: cannot be read now: asked \d times: .*503.* no damage"):
            survey(skip, files[0])
        piece = Piece(0, "a.jsonl", files[0].url, 0, len(LINES), len(LINES))
        with pytest.raises(UserError, match=r"a\.jsonl: cannot be read now: asked \d times: .*503.* no damage"):
            list(read_piece(skip, piece))
        with pytest.raises(UserError, match=r"content\.sources\.0\.path: .*a\.jsonl: .*503"):
            list_files(config)
        handler.failures = 0
        with pytest.raises(UserError, match=r"none\.jsonl: no such file or directory"):
            list_files(content_of(type="jsonl", path=f"{address}/none.jsonl"))
    with pytest.raises(UserError, match=r"content\.sources\.0\.path: .*a\.jsonl"):
        list_files(config)


def test_local_errors_are_not_tried_again() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        remote.retry(fsspec.filesystem("file"), fail)
    assert len(calls) == 1
    with pytest.raises(OSError, match="broken"):
        remote.retry(fsspec.filesystem("http"), fail)
    assert len(calls) == 1 + 4


def test_memory(folder: Path) -> None:
    for file in ("a.jsonl", "rows.parquet"):
        with fsspec.open(f"memory://corpus/{file}", "wb") as target:
            target.write((folder / file).read_bytes())
        kind = "parquet" if file.endswith("parquet") else "jsonl"
        assert texts(content_of(type=kind, path="memory://corpus")) == [row["text"] for row in ROWS]


@pytest.mark.parametrize(("address", "package"), [("s3://bucket/a.jsonl", "s3fs"), ("gs://bucket/a.jsonl", "gcsfs")])
def test_a_file_system_that_is_not_installed(address: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"content\.sources\.0\.path: {address}: `pip install {package}`"):
        list_files(content_of(type="jsonl", path=address))
