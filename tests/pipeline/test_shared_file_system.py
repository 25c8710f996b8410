"""What a file system does that several machines share."""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from pipeline import duplicates, encode
from pipeline.config import PrepareConfig
from pipeline.prepare import prepare

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
