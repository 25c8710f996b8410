"""The benchmark of reading: its rows read what they say, on made-up data and on a dataset of one's own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("own", [False, True], ids=["made up", "own dataset"])
def test_rows_read_the_same_batches(tmp_path: Path, prepared_data: Path, own: bool) -> None:
    command = [sys.executable, "-m", "benchmarks.reading", "--json", str(tmp_path / "r.json"), "--rounds", "2"]
    command += ["--tokens", "300000", "--round-tokens", "100000", "--seq-len", "64"]
    done = subprocess.run(
        [*command, *(["--corpus", str(prepared_data)] if own else [])], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r.json").read_text())
    rows = results["batches"]
    assert set(rows) == {"next token", "next token, prepared 2 steps ahead", "mixture of two", "masked LM, 15 %"}
    checksums = {name: row["checksum"] for name, row in rows.items()}
    assert checksums["next token"] == checksums["next token, prepared 2 steps ahead"]
    assert len(set(checksums.values())) == 3
    assert set(results["order"]) == {"one dataset", "mixture of five"}
    for text in ("M tokens/s", "order at 10^12 tokens", *rows):
        assert text in done.stdout
