"""Cleaning: which documents are dropped, why, and the user's own function."""

from pathlib import Path

import pytest

from pipeline.clean import Dropped, clean, load_function
from pipeline.config import Clean
from pipeline.errors import UserError


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_hooks:number", "content.clean.function: my_hooks:number returned a int for doc"),
        ("my_hooks:broken", "content.clean.function: my_hooks:broken failed on doc: KeyError"),
        ("my_hooks:none", "content.clean.function: my_hooks:none: cannot be imported: AttributeError"),
        ("my_hooks:value", "content.clean.function: my_hooks:value: not a function but a int"),
        ("no_such_module:f", "content.clean.function: no_such_module:f: cannot be imported: ModuleNotFoundError"),
        ("my_hooks", "content.clean.function: 'my_hooks' is not of the form package.module:function"),
    ],
)
def test_functions_that_do_not_serve(hooks: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        clean("doc", b"text", Clean(function=name))
