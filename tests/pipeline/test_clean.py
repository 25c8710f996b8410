"""Cleaning: which documents are dropped, why, and the user's own function."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.clean import Dropped, clean, load_function
from pipeline.config import Clean, PrepareConfig
from pipeline.errors import UserError
from pipeline.shards import MANIFEST


@pytest.fixture(autouse=True)
def _fresh() -> None:
    load_function.cache_clear()


@pytest.mark.parametrize(
    ("rule", "kept", "dropped", "reason"),
    [
        ({"min_characters": 4}, "four", "née", "too_short"),
        ({"max_characters": 4}, "fünf", "fives", "too_long"),
        ({"min_letter_ratio": 0.5}, "ab 12", "ab 123", "few_letters"),
        ({"min_letter_ratio": 1.0}, "e\u0301 \n ß", "a.", "few_letters"),
        ({"max_digit_ratio": 0.5}, "ab 12", "a 12", "many_digits"),
        ({"max_digit_ratio": 0.0}, "ab", "٣b", "many_digits"),
        ({"max_symbol_ratio": 0.25}, "abc.", "ab.", "many_symbols"),
        ({"max_symbol_ratio": 0.0}, "ab 1\n", "ab\x00", "many_symbols"),
        ({"max_symbol_ratio": 0.5}, "𝔘𝟙 \u3000🙂", "a🙂🙂", "many_symbols"),
    ],
)
def test_rules(rule: dict[str, float], kept: str, dropped: str, reason: str) -> None:
    config = Clean.model_validate(rule)
    assert clean("d", kept.encode(), config) == kept
    assert clean("d", dropped.encode(), config) == Dropped(reason, dropped)


def test_white_space_alone_has_no_ratios() -> None:
    assert clean("d", b" \n", Clean(max_digit_ratio=0.1)) == " \n"


def test_lengths_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="min_characters 5 is more than max_characters 4"):
        Clean(min_characters=5, max_characters=4)


HOOKS = """
def upper(document_id, text):
    return None if document_id == "drop" else text.upper()
def number(document_id, text):
    return 3
def broken(document_id, text):
    return {}[document_id]
def half(document_id, text):
    return "é" + chr(0xD800)
value = 1
"""


@pytest.fixture
def hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory."""
    (tmp_path / "my_hooks.py").write_text(HOOKS)
    monkeypatch.chdir(tmp_path)
    return "my_hooks"


def test_a_function_changes_and_drops(hooks: str) -> None:
    config = Clean(function=f"{hooks}:upper", min_characters=2)
    assert clean("keep", b"text", config) == "TEXT"
    assert clean("drop", b"text", config) == Dropped("function", "text")
    assert clean("keep", b"t", config) == Dropped("too_short", "T")  # what it returns is what is measured


def test_ratios_of_a_long_text_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.clean._BLOCK_CHARACTERS", 7)
    assert clean("d", b"ab1 " * 25, Clean(max_digit_ratio=1 / 3)) == "ab1 " * 25
    assert clean("d", b"ab1 " * 25 + b"1", Clean(max_digit_ratio=1 / 3)) == Dropped("many_digits", "ab1 " * 25 + "1")


def test_a_function_runs_in_tasks_and_its_file_is_content(
    hooks: str, make_config: Callable[..., PrepareConfig], ray_address: str, texts: list[str], tmp_path: Path
) -> None:
    """On a cluster that was started elsewhere; a changed function is refused."""
    config = tmp_path / "config.json"
    config.write_text(make_config(clean={"function": f"{hooks}:upper"}).model_dump_json())

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipeline.prepare", str(config)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env=os.environ | {"RAY_ADDRESS": ray_address, "PYTHONPATH": str(Path(__file__).parents[2])},
        )

    first = run()
    assert first.returncode == 0, first.stderr
    written = json.loads((tmp_path / "data" / MANIFEST).read_text())["splits"].values()
    assert sum(split["utf8_bytes"] for split in written) == sum(len(text.upper().encode()) for text in texts)
    (tmp_path / "my_hooks.py").write_text(HOOKS + "# changed\n")
    again = run()
    assert again.returncode == 2
    assert "content.clean.function_sha256: was " in again.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_hooks:number", "content.clean.function: my_hooks:number returned a int for doc"),
        ("my_hooks:broken", "content.clean.function: my_hooks:broken failed on doc: KeyError"),
        ("my_hooks:half", r"content.clean.function: my_hooks:half returned for doc .* surrogate \(U\+D800 at 1\)"),
        ("my_hooks:none", "content.clean.function: my_hooks:none: cannot be imported: AttributeError"),
        ("my_hooks:value", "content.clean.function: my_hooks:value: not a function but a int"),
        ("no_such_module:f", "content.clean.function: no_such_module:f: cannot be imported: ModuleNotFoundError"),
        ("my_hooks", "content.clean.function: 'my_hooks' is not of the form package.module:function"),
    ],
)
def test_functions_that_do_not_serve(hooks: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        clean("doc", b"text", Clean(function=name))
