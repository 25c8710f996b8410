"""Input that cannot be read, compressed input, and file systems: a clear error, or a skip that is counted."""

import bz2
import functools
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from pipeline import sources, tables
from pipeline.check import describe_sources
from pipeline.config import Content, PrepareConfig
from pipeline.errors import UserError
from pipeline.locations import Document, Piece, Skipped, open_file
from pipeline.prepare import prepare
from pipeline.shards import MANIFEST
from pipeline.sources import cut_units, group_units, list_files, read_piece, survey
from pipeline.verify import verify

MakeConfig = Callable[..., PrepareConfig]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
}
ROWS = [{"text": f"text {number} " * 20} for number in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def content_of(source: dict[str, Any], **changes: Any) -> Content:
    return Content.model_validate({"sources": [source], "tokenizer": {"path": "x"}} | changes)


def read(config: Content) -> tuple[list[Piece], list[Document], list[Skipped]]:
    """Everything, in the order in which tasks read it."""
    units = cut_units([survey(config, file) for file in list_files(config)], config)
    pieces = [piece for group in group_units(units) for number in group for piece in units[number]]
    items = [item for piece in pieces for item in read_piece(config, piece)]
    documents = [item for item in items if isinstance(item, Document)]
    return pieces, documents, [item for item in items if isinstance(item, Skipped)]


def note_openings(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> list[str]:
    """The addresses of the files that a module opens from now on."""
    opened: list[str] = []

    def noted(url: str, **how: Any) -> BinaryIO:
        opened.append(url)
        return open_file(url, **how)

    monkeypatch.setattr(module, "open_file", noted)
    return opened


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files_are_unpacked_once(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in sequence, one pass; a piece out of turn, or after one that was left out, holds the same documents."""
    (tmp_path / f"a.jsonl.{ending}").write_bytes(COMPRESS[ending](LINES))
    opened = note_openings(monkeypatch, sources)
    config = content_of({"type": "jsonl", "path": str(tmp_path)}, unit_bytes=1000)
    units = cut_units([survey(config, file) for file in list_files(config)], config)
    opened.clear()
    pieces, documents, _ = read(config)
    assert len(pieces) > 50
    assert opened.count(pieces[0].url) == 3  # hashed, measured, read
    assert [document.data.decode() for document in documents] == [row["text"] for row in ROWS]
    assert group_units(units) == [sorted(range(len(units)), key=lambda number: units[number][0].start)]
    by_piece = {
        piece.start: [item.id for item in read_piece(config, piece) if isinstance(item, Document)] for piece in pieces
    }
    for order in (pieces[::-1], pieces[::3]):
        for piece in order:
            assert [item.id for item in read_piece(config, piece)] == by_piece[piece.start]


def test_small_files_beside_a_large_one_do_not_make_it_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small packed files share units with the pieces of a large one, which is still unpacked once."""
    (tmp_path / "large.jsonl.gz").write_bytes(gzip.compress(LINES))
    for number in range(60):
        (tmp_path / f"small{number}.jsonl.gz").write_bytes(gzip.compress(LINES.splitlines(keepends=True)[0] * 2))
    config = content_of({"type": "jsonl", "path": str(tmp_path)}, unit_bytes=int(len(LINES) / 5.1))
    surveys = [survey(config, file) for file in list_files(config)]
    units = cut_units(surveys, config)
    assert any({piece.run for piece in unit} == {None, 0} for unit in units), "none shares a unit"
    opened = note_openings(monkeypatch, sources)
    for group in group_units(units):
        for piece in (piece for number in group for piece in units[number]):
            list(read_piece(config, piece))
    assert sum(url.endswith("large.jsonl.gz") for url in opened) == 1


def test_a_file_that_changed_is_opened_again(tmp_path: Path) -> None:
    """What a worker left open is another file's by then."""
    for kind, name in (("jsonl", "a.jsonl.gz"), ("parquet", "a.parquet")):
        file = tmp_path / name

        def write(word: str, file: Path = file, kind: str = kind) -> None:
            rows = [{"text": f"{word} {number} " * 20} for number in range(300)]
            if kind == "jsonl":
                file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
            else:
                parquet.write_table(pyarrow.Table.from_pylist(rows), file)

        write("old")
        config = content_of({"type": kind, "path": str(file)}, unit_bytes=8000)
        pieces, *_ = read(config)
        list(read_piece(config, pieces[0]))
        write("new")
        items = list(read_piece(config, pieces[1]))
        assert items
        assert all(item.data.startswith(b"new") for item in items if isinstance(item, Document))


@pytest.mark.parametrize("runs", [1, 4])
def test_a_large_row_group_is_decoded_by_few_tasks(tmp_path: Path, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run opens the file once at most; a piece out of turn holds the same rows."""
    rows = [{"text": f"{number} " * 50} for number in range(600)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", use_dictionary=False)
    size = sum(len(row["text"]) + 4 for row in rows)
    unit_bytes = size // 6 if runs == 1 else size // 40
    config = content_of({"type": "parquet", "path": str(tmp_path)}, unit_bytes=unit_bytes)
    units = cut_units([survey(config, file) for file in list_files(config)], config)
    opened = note_openings(monkeypatch, tables)
    groups = group_units(units)
    assert len(groups) == runs
    assert max(len(group) for group in groups) - min(len(group) for group in groups) <= 1
    found = {}
    for group in groups:
        for piece in (piece for number in group for piece in units[number]):
            found[piece.start] = list(read_piece(config, piece))
    assert len(opened) <= runs
    documents = [item for _, part in sorted(found.items()) for item in part if isinstance(item, Document)]
    assert [item.data.decode() for item in documents] == [row["text"] for row in rows]
    pieces = [unit[0] for unit in units]
    for order in (pieces[::-1], sorted(pieces, key=lambda piece: piece.start)[::3]):
        for piece in order:
            assert list(read_piece(config, piece)) == found[piece.start]


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_truncated_compressed_file(tmp_path: Path, ending: str) -> None:
    packed = COMPRESS[ending](LINES)
    (tmp_path / f"a.jsonl.{ending}").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "b.jsonl").write_bytes(LINES)
    source = {"type": "jsonl", "path": str(tmp_path)}
    with pytest.raises(UserError, match=rf"a\.jsonl\.{ending}: cannot be read: .*clean\.on_unreadable_file=skip"):
        read(content_of(source))
    config = content_of(source, clean={"on_unreadable_file": "skip"})
    surveys = [survey(config, file) for file in list_files(config)]
    assert [found.skipped for found in surveys] == [{"unreadable_file": 1}, {}]
    assert surveys[0].record(["jsonl"])["skipped"] == {"unreadable_file": 1}
    assert len(read(config)[1]) == len(ROWS)


def test_a_look_at_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "a.txt").symlink_to(tmp_path / "nowhere")
    source = {"type": "text", "path": str(tmp_path)}
    with pytest.raises(UserError, match=r"a\.txt: cannot be read: .*No such file"):
        list(describe_sources(content_of(source)))
    lines = list(describe_sources(content_of(source, clean={"on_unreadable_file": "skip"})))
    assert lines[1:] == ["  a.txt  left out (unreadable_file)", "  b.txt  1 bytes", "  first document: 'b'"]


def test_an_unreadable_file_in_the_manifest(make_config: MakeConfig, ray_address: str, tmp_path: Path) -> None:
    """Damaged: with the hash of its bytes; not to be read at all: without one, which is no change the next time."""
    texts, output = tmp_path / "texts", tmp_path / "data"
    texts.mkdir()
    packed = gzip.compress(LINES)[:-100]
    (texts / "damaged.jsonl.gz").write_bytes(packed)
    (texts / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (texts / "good.jsonl").write_bytes(LINES)
    config = make_config(
        sources=[{"type": "jsonl", "path": str(texts)}], clean={"on_unreadable_file": "skip"}, splits={}
    )
    manifest = prepare(config)
    damaged, gone, good = manifest["sources"]
    skipped = {"unreadable_file": 1}
    assert damaged == {
        "source": "jsonl",
        "name": "damaged.jsonl.gz",
        "size": len(packed),
        "sha256": hashlib.sha256(packed).hexdigest(),
        "skipped": skipped,
    }
    assert gone == {"source": "jsonl", "name": "gone.jsonl", "size": None, "sha256": None, "skipped": skipped}
    assert good["sha256"] == hashlib.sha256(LINES).hexdigest()
    assert manifest["dropped"] == {"unreadable_file": 2}
    assert list(verify(output)) == []
    assert (
        "(2 hashes), which the digest covers. 1 could not be read and have none." in (output / "README.md").read_text()
    )
    assert prepare(config)["digest"] == manifest["digest"]

    old = json.loads((output / MANIFEST).read_text())
    old["sources"][1] |= {"size": 0, "sha256": ""}  # as it was written once
    (output / MANIFEST).write_text(json.dumps(old))
    prepare(config)
    (texts / "gone.jsonl").unlink()
    (texts / "new.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError) as caught:
        prepare(config)
    assert "source file jsonl:gone.jsonl: gone\n" in str(caught.value)
    assert "source file jsonl:new.jsonl: added\n" in str(caught.value)


BAD_LINES = {
    "not JSON": b'{"text": \n',
    "not a JSON object": b"[1]\n",
    "no field 'text' .text_field.; it has: body": b'{"body": "a"}\n',
    "'text' .text_field. holds no string but 3": b'{"text": 3}\n',
    "'text' .text_field. holds no string but None": b'{"text": null}\n',
    "not JSON: maximum recursion depth": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("message", BAD_LINES)
def test_bad_lines(tmp_path: Path, message: str) -> None:
    good = b'{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_bytes(good + BAD_LINES[message] + good)
    source = {"type": "jsonl", "path": str(tmp_path)}
    with pytest.raises(UserError, match=rf"a\.jsonl: line at byte 17: {message}.*clean\.on_bad_row=skip"):
        read(content_of(source))
    _, documents, skipped = read(content_of(source, clean={"on_bad_row": "skip"}))
    assert [document.data for document in documents] == [b"good"] * 2
    assert [(item.reason, item.count) for item in skipped] == [("bad_row", 1)]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_mark_of_byte_order_is_no_part_of_the_first_line(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS.get(ending[1:], bytes)(b"\xef\xbb\xbf" + LINES))
    config = content_of({"type": "jsonl", "path": str(tmp_path)}, unit_bytes=1000)
    _, documents, _ = read(config)
    assert sorted(item.data.decode() for item in documents) == sorted(row["text"] for row in ROWS)
    assert "  fields: text: str" in list(describe_sources(config))


def test_a_line_as_long_as_many_pieces_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": "long " * 20_000}), json.dumps({"text": "short"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    read_bytes = 0

    class Counted(io.BytesIO):
        def readline(self, size: int | None = -1) -> bytes:
            nonlocal read_bytes
            line = super().readline(size)
            read_bytes += len(line)
            return line

    config = content_of({"type": "jsonl", "path": str(tmp_path)}, unit_bytes=1000)
    pieces = [piece for file in list_files(config) for piece in survey(config, file).pieces]
    monkeypatch.setattr(sources, "open_file", lambda url: Counted((tmp_path / "a.jsonl").read_bytes()))
    documents = [item for piece in pieces for item in read_piece(config, piece) if isinstance(item, Document)]
    assert [item.data for item in documents] == [json.loads(line)["text"].encode() for line in lines]
    assert len(pieces) > 100
    assert read_bytes < 3 * pieces[-1].stop


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_look_at_lines(tmp_path: Path, ending: str) -> None:
    """The first row as preparing would read it; errors in the same words."""
    file = tmp_path / f"a.jsonl{ending}"

    def look(lines: bytes, **clean: str) -> list[str]:
        file.write_bytes(COMPRESS.get(ending[1:], bytes)(lines))
        return list(describe_sources(content_of({"type": "jsonl", "name": "web", "path": str(file)}, clean=clean)))[2:]

    assert look(b"\n" + LINES) == [
        "  fields: text: str",
        f"  first row: web:{file.name}@1: {ROWS[0]['text']!r}",
    ]
    bad = b'{"body": "a", "n": 1}\n'
    with pytest.raises(UserError) as caught:
        look(bad + LINES)
    with pytest.raises(UserError) as prepared:
        read(content_of({"type": "jsonl", "path": str(file)}))
    assert str(caught.value) == str(prepared.value)
    assert "line at byte 0: no field 'text' (text_field); it has: body, n. Mend it" in str(caught.value)
    assert look(bad + LINES, on_bad_row="skip") == ["  first row: left out (bad_row)"]
    (shown,) = look(b'{"text": "caf\xe9"}\n')  # for the cleaner to find out
    assert shown.endswith(repr('{"text": "caf\ufffd"}\n'))
    assert look(b"") == []


def test_a_damaged_row_group_in_the_middle(make_config: MakeConfig, ray_address: str, tmp_path: Path) -> None:
    """Its rows are named, or left out and counted; the others are all there."""
    file = tmp_path / "a.parquet"
    texts = ["".join(chr(97 + (i * j) % 26) for j in range(400)) for i in range(100)]
    table = pyarrow.table({"text": texts})
    parquet.write_table(table, file, row_group_size=20, compression="zstd", use_dictionary=False)
    column = parquet.ParquetFile(file).metadata.row_group(2).column(0)
    data = bytearray(file.read_bytes())
    for position in range(column.data_page_offset + 30, column.data_page_offset + column.total_compressed_size):
        data[position] ^= 0xA5
    file.write_bytes(data)
    settings: dict[str, Any] = {"sources": [{"type": "parquet", "path": str(file)}], "splits": {}}
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read: .*clean\.on_unreadable_file=skip"):
        prepare(make_config(**settings))
    manifest = prepare(make_config(**settings, clean={"on_unreadable_file": "skip"}))
    assert manifest["splits"]["train"]["documents"] == 80
    assert manifest["dropped"] == {"unreadable_rows": 20}
    assert list(verify(tmp_path / "data")) == []


def test_a_row_whose_id_is_null(tmp_path: Path) -> None:
    """Two of them would be one document by name."""
    (tmp_path / "a.jsonl").write_bytes(b'{"id": null, "text": "a"}\n{"id": 0, "text": "b"}\n')
    source = {"type": "jsonl", "path": str(tmp_path), "id_field": "id"}
    with pytest.raises(UserError, match=r"a\.jsonl: line at byte 0: 'id' \(id_field\) is null"):
        read(content_of(source))
    assert [item.id for item in read(content_of(source, clean={"on_bad_row": "skip"}))[1]] == ["jsonl:0"]


def test_an_id_that_is_no_text(tmp_path: Path) -> None:
    """It could be neither hashed nor written down."""
    ids = pyarrow.array([b"a", b"\xff", None, b""]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"id": ids, "text": ["a", "b", "c", "d"]}), tmp_path / "a.parquet")
    lines = [
        {"id": "a", "text": "a"},
        {"id": "\ud800", "text": "b"},
        {"id": None, "text": "c"},
        {"id": "", "text": "d"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    messages = {"parquet": r"row 1: 'id' .* not UTF-8: b'\\xff'", "jsonl": r"byte 25: 'id' .* valid text: '\\ud800'"}
    for kind, message in messages.items():
        source = {"type": kind, "path": str(tmp_path), "id_field": "id"}
        with pytest.raises(UserError, match=rf"a\.{kind}: .*{message}\. .*clean\.on_bad_row=skip"):
            read(content_of(source))
        _, documents, skipped = read(content_of(source, clean={"on_bad_row": "skip"}))
        assert [document.id for document in documents] == [f"{kind}:a", f"{kind}:"]
        assert [item.reason for item in skipped] == ["bad_row"] * 2


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("a")
    with pytest.raises(UserError, match=r"content\.sources\.0\.path: the name of '.*caf\\udce9\.txt' is not UTF-8"):
        list_files(content_of({"type": "text", "path": str(tmp_path)}))


def test_columns_that_hold_text_and_one_that_does_not(tmp_path: Path) -> None:
    texts = ["a", "b", "a"]
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary()):
        column = pyarrow.array(texts).cast(kind)
        for number, stored in enumerate((column, column.dictionary_encode())):
            parquet.write_table(pyarrow.table({"text": stored}), tmp_path / f"{kind}{number}.parquet")
    _, documents, _ = read(content_of({"type": "parquet", "path": str(tmp_path)}))
    assert sorted(item.data for item in documents) == sorted(text.encode() for text in texts * 6)
    parquet.write_table(pyarrow.table({"text": [["a"], ["b"]]}), tmp_path / "list.parquet")
    with pytest.raises(UserError, match=r"list\.parquet: column 'text' \(text_field\) holds list<.*>, not text"):
        read(content_of({"type": "parquet", "path": str(tmp_path / "list.parquet")}))


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_compressed_file_of_no_bytes(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.jsonl.{ending}").touch()
    (tmp_path / "b.jsonl").touch()  # a file without lines, which is nothing wrong
    with pytest.raises(UserError, match=rf"a\.jsonl\.{ending}: cannot be read: a compressed file is never empty"):
        read(content_of({"type": "jsonl", "path": str(tmp_path)}))


def test_a_file_that_goes_after_it_was_hashed(tmp_path: Path) -> None:
    """No damage to be skipped: whole nodes without a mount would leave their share of the corpus out."""
    for kind in ("jsonl", "parquet", "text"):
        file = tmp_path / f"a.{kind}"
        parquet.write_table(pyarrow.table({"text": ["a"]}), file) if kind == "parquet" else file.write_bytes(LINES)
        config = content_of({"type": kind, "path": str(file)}, clean={"on_unreadable_file": "skip"})
        (piece,) = survey(config, list_files(config)[0]).pieces
        file.unlink()
        with pytest.raises(UserError, match=rf"a\.{kind}: cannot be read now: .*No such file.* no damage"):
            list(read_piece(config, piece))


def test_null_rows_of_a_table(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    source = {"type": "parquet", "path": str(tmp_path)}
    with pytest.raises(UserError, match=r"a\.parquet: row 1: 'text' is null\. .*clean\.on_bad_row=skip"):
        read(content_of(source))
    _, documents, skipped = read(content_of(source, clean={"on_bad_row": "skip"}))
    assert len(documents) == 2
    assert [item.reason for item in skipped] == ["bad_row"]


def test_a_large_document_and_nul_bytes(make_config: MakeConfig, ray_address: str, tmp_path: Path) -> None:
    """A document is never cut, whatever its size against units and shards; NUL is text."""
    from pipeline.shards import TokenDataset
    from pipeline.tokenizer import Tokenizer

    (tmp_path / "texts").mkdir()
    texts = {"a.txt": "nul \x00 here\x00", "b.txt": "ba de fli " * 300_000}
    for name, text in texts.items():
        (tmp_path / "texts" / name).write_text(text)
    settings = {"sources": [{"type": "text", "path": str(tmp_path / "texts")}], "splits": {}}
    prepare(make_config(**settings))
    dataset = TokenDataset.open(tmp_path / "data", "train")
    tokens = dataset.read(0, dataset.n_tokens).tolist()
    decoded = [Tokenizer(dataset.tokenizer_path).decode(part) for part in _split(tokens, dataset.eos_id)]
    assert sorted(decoded) == sorted(texts.values())


def _split(tokens: list[int], end: int) -> Iterator[list[int]]:
    part: list[int] = []
    for token in tokens:
        if token == end:
            yield part
            part = []
        else:
            part.append(token)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A directory and the address at which a web server shows it."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def test_files_of_a_web_server(
    make_config: MakeConfig, ray_address: str, served: tuple[Path, str], tmp_path: Path
) -> None:
    """Workers read what is served; the tokens are those of the same files on disk."""
    folder, address = served
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    digests: list[str] = []
    for place in (f"{address}/a.jsonl.gz", str(folder / "a.jsonl.gz")):
        manifest = prepare(make_config(f"data-{len(digests)}", sources=[{"type": "jsonl", "path": place}], splits={}))
        digests.append(manifest["digest"])
    assert digests[0] == digests[1]


def test_files_in_memory() -> None:
    import fsspec

    with fsspec.open("memory://corpus/a.jsonl", "wb") as file:
        file.write(LINES)
    _, documents, _ = read(content_of({"type": "jsonl", "path": "memory://corpus"}, unit_bytes=2000))
    assert len(documents) == len(ROWS)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A directory laid out like a repository of the hub."""
    folder = tmp_path / "repository"
    (folder / "en").mkdir(parents=True)
    for number in range(2):
        rows = [{"text": f"row {number} {i}", "url": "u"} for i in range(5)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "en" / f"train-0000{number}.parquet")
    parquet.write_table(pyarrow.table({"text": ["held out"]}), folder / "en" / "validation-00000.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: en/train-*.parquet\n"
        "  - split: validation\n    path: en/validation-*.parquet\n---\n"
    )
    return folder


def test_a_repository_of_the_hub(repository: Path) -> None:
    source = {"type": "hub", "path": str(repository), "config": "en"}
    config = content_of(source)
    assert [file.name for file in list_files(config)] == ["en/train-00000.parquet", "en/train-00001.parquet"]
    assert sorted(document.data.decode() for document in read(config)[1]) == [
        f"row {number} {i}" for number in range(2) for i in range(5)
    ]
    assert len(read(content_of({**source, "split": "validation"}))[1]) == 1
    assert config.record() == content_of({**source, "download": True}).record()
    lines = list(describe_sources(config))
    assert lines[0].startswith("hub (hub): 2 files")
    assert any("columns: text: string, url: string" in line for line in lines)
    assert any("first row: hub:en/train-00000.parquet@0: 'row 0 0'" in line for line in lines)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, r"content\.sources\.0\.split: 'test' is no split of .*; it has: train, validation"),
        ({"config": "de"}, r"content\.sources\.0\.config: 'de' of .*: .*Available: \['en'\]"),
        ({"path": "nobody/nothing"}, r"content\.sources\.0\.revision: missing\. nobody/nothing may change"),
    ],
)
def test_what_a_repository_does_not_have(repository: Path, change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        list_files(content_of({"type": "hub", "path": str(repository), "config": "en"} | change))
