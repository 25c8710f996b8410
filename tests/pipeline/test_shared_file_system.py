"""What a file system does that several machines share."""

import io
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path

import pytest

from pipeline import duplicates, encode
from pipeline.config import Content, PrepareConfig
from pipeline.encode import survey_files
from pipeline.errors import UserError
from pipeline.locations import SourceFile
from pipeline.output_directory import Log
from pipeline.prepare import LOG, prepare
from pipeline.shards import MANIFEST
from pipeline.sources import Survey, list_files

MakeConfig = Callable[..., PrepareConfig]


def test_files_that_workers_wrote_may_be_invisible_for_a_while(
    make_config: MakeConfig, ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS remembers for up to a minute that a file is not there: here this process never sees the ledgers."""
    settings = {"clean": {"exact_duplicates": True}, "tokenizer": {"train": {"vocab_size": 330, "num_threads": 1}}}
    visible = prepare(make_config("visible", **settings))
    monkeypatch.setattr(encode, "unit_ledger", lambda *_: tmp_path / "nowhere")
    monkeypatch.setattr(duplicates, "_ledger", lambda *_: tmp_path / "nowhere")
    with redirect_stdout(io.StringIO()) as printed:
        assert prepare(make_config(**settings))["digest"] == visible["digest"]
    assert "60 documents" in printed.getvalue()


def test_an_output_that_a_machine_of_the_cluster_does_not_see(make_config: MakeConfig, tmp_path: Path) -> None:
    content = make_config().content
    with pytest.raises(UserError, match=r"execution\.output: .*here is not seen from .*: name a directory on a file"):
        survey_files(content, list_files(content), tmp_path / "here" / ".work")


def test_a_source_that_a_machine_of_the_cluster_does_not_see(
    make_config: MakeConfig, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where unreadable files are skipped, what is only missing there would be left out too."""

    def survey_there(content: Content, file: SourceFile) -> Survey:
        return Survey(file, None, None, (), {"unreadable_file": 1})

    monkeypatch.setattr(encode, "survey", survey_there)
    monkeypatch.setattr("pipeline.prepare.run_tasks", lambda function, jobs, *_: (function(*job) for job in jobs))
    with pytest.raises(UserError, match=r"00\.txt: can be read here, but not on another machine of the cluster"):
        prepare(make_config(clean={"on_unreadable_file": "skip"}))


def test_a_source_that_changes_while_it_is_read(
    make_config: MakeConfig, ray_address: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest must not give tokens of the new content the hash of the old one."""
    shutil.copytree(corpus, tmp_path / "texts")
    file = tmp_path / "texts" / "07.txt"
    config = make_config(sources=[{"type": "text", "path": str(tmp_path / "texts")}])
    read_ledger = encode.read_ledger

    def write(workspace: Path, number: int) -> encode.Ledger | None:
        """Encoding begins."""
        file.write_text("another text")
        return read_ledger(workspace, number)

    def touch(workspace: Path, number: int) -> encode.Ledger | None:
        os.utime(file)
        return read_ledger(workspace, number)

    monkeypatch.setattr(encode, "read_ledger", write)
    with pytest.raises(UserError, match=r"07\.txt: changed after it was hashed"):
        prepare(config)
    assert not (tmp_path / "data" / MANIFEST).exists()
    monkeypatch.setattr(encode, "read_ledger", read_ledger)
    with pytest.raises(UserError, match=r"source file text:07\.txt: changed"):
        prepare(config)

    shutil.copy(corpus / file.name, file)
    shutil.rmtree(tmp_path / "data")
    monkeypatch.setattr(encode, "read_ledger", touch)
    with pytest.raises(UserError, match=r"If only its time did, run the same command again"):
        prepare(config)
    monkeypatch.setattr(encode, "read_ledger", read_ledger)
    prepare(config)


def test_a_function_that_changes_while_it_is_used(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash in the manifest is that of what made the text. To take the change back, as for a dataset that is there,
    would go on with what the changed function may have made.
    """
    hooks = tmp_path / "hooks_that_change.py"
    hooks.write_text("def keep(document_id, text):\n    open(__file__, 'a').write('# changed\\n')\n    return text\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("pipeline.prepare.ray_cluster", lambda execution: nullcontext(1))
    monkeypatch.setattr("pipeline.prepare.run_tasks", lambda function, jobs, *_: (function(*job) for job in jobs))
    with pytest.raises(UserError, match=r"content\.clean\.function_sha256: was .*: delete .*\.work"):
        prepare(make_config(clean={"function": "hooks_that_change:keep"}))
    assert not (tmp_path / "data" / MANIFEST).exists()


def test_the_log_holds_no_password(tmp_path: Path) -> None:
    with suppress(UserError), Log(tmp_path / LOG) as say:
        say("scan: https://me:secret@host/a.jsonl")
        raise UserError("https://host/a.jsonl?token=secret: cannot be read")
    logged = (tmp_path / LOG).read_text()
    assert logged.count("***") == 2
    assert "secret" not in logged
