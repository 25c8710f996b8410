"""From a document's bytes to the text that is tokenized, or to the reason why it is dropped."""

import importlib
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import Clean
from pipeline.errors import UserError

_KEY = "content.clean.function"
_SPACE, _LETTER, _DIGIT, _SYMBOL = range(4)
_BLOCK_CHARACTERS = 1 << 20  # of which numpy holds a few copies, whatever the document's size


@dataclass(frozen=True)
class Dropped:
    """A document that is left out, and why (`reason` is a key of the manifest's counts); `data` is what it held."""

    reason: str
    data: str | bytes = ""


def clean(document_id: str, data: bytes, config: Clean) -> str | Dropped:
    """The text of one document, or why it is dropped.

    Raises:
        UserError: it is not UTF-8 and `on_invalid_utf8` is `error`, or the user's own function fails.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if config.on_invalid_utf8 == "skip":
            return Dropped("invalid_utf8", data)
        raise UserError(
            f"{document_id}: not valid UTF-8 (byte {data[error.start]:#04x} at {error.start}). "
            "Mend the file, or leave such documents out with content.clean.on_invalid_utf8=skip."
        ) from None
    if config.unicode != "none":
        text = unicodedata.normalize(config.unicode, text)
    if config.function is not None:
        kept = _call(config.function, document_id, text)
        if kept is None:
            return Dropped("function", text)
        text = kept
    if not text:
        return Dropped("empty")
    if config.min_characters is not None and len(text) < config.min_characters:
        return Dropped("too_short", text)
    if config.max_characters is not None and len(text) > config.max_characters:
        return Dropped("too_long", text)
    reason = _bad_ratio(text, config)
    return Dropped(reason, text) if reason else text


def _bad_ratio(text: str, config: Clean) -> str | None:
    if config.min_letter_ratio is None and config.max_digit_ratio is None and config.max_symbol_ratio is None:
        return None
    letters, digits, symbols = _count_kinds(text)
    total = letters + digits + symbols or 1
    if config.min_letter_ratio is not None and letters < config.min_letter_ratio * total:
        return "few_letters"
    if config.max_digit_ratio is not None and digits > config.max_digit_ratio * total:
        return "many_digits"
    if config.max_symbol_ratio is not None and symbols > config.max_symbol_ratio * total:
        return "many_symbols"
    return None


def _count_kinds(text: str) -> tuple[int, int, int]:
    """How many letters (with marks), digits and symbols there are; white space is none of them."""
    kinds, counts = _kinds(), np.zeros(4, np.int64)
    for start in range(0, len(text), _BLOCK_CHARACTERS):
        codes = np.frombuffer(text[start : start + _BLOCK_CHARACTERS].encode("utf-32-le"), "<u4")
        counts += np.bincount(kinds[codes], minlength=4)
    return int(counts[_LETTER]), int(counts[_DIGIT]), int(counts[_SYMBOL])


@lru_cache(maxsize=1)
def _kinds() -> np.ndarray:
    """(code points,) uint8: the kind of every character."""
    kinds = {"L": _LETTER, "M": _LETTER, "N": _DIGIT}
    return np.array(
        [
            _SPACE if (character := chr(code)).isspace() else kinds.get(unicodedata.category(character)[0], _SYMBOL)
            for code in range(sys.maxunicode + 1)
        ],
        np.uint8,
    )


@lru_cache(maxsize=1)
def load_function(name: str) -> Callable[[str, str], Any]:
    """The function that `package.module:function` names; modules in the working directory are found.

    Raises:
        UserError: it cannot be imported or called.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"{_KEY}: {name!r} is not of the form package.module:function")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:
        raise UserError(f"{_KEY}: {name}: cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise UserError(f"{_KEY}: {name}: not a function but a {type(found).__name__}")
    function: Callable[[str, str], Any] = found
    return function


def function_file(name: str) -> Path:
    """The file that defines the module of `package.module:function`."""
    load_function(name)
    file = sys.modules[name.partition(":")[0]].__file__
    if file is None:
        raise UserError(f"{_KEY}: {name}: its module has no file whose content could be recorded")
    return Path(file)


def _call(name: str, document_id: str, text: str) -> str | None:
    try:
        kept = load_function(name)(document_id, text)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{_KEY}: {name} failed on {document_id}: {type(error).__name__}: {error}") from error
    if kept is not None and not isinstance(kept, str):
        raise UserError(
            f"{_KEY}: {name} returned a {type(kept).__name__} for {document_id}; it must return the text, or None"
        )
    try:
        if kept is not None and not kept.isascii():
            kept.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{_KEY}: {name} returned for {document_id} what is no valid text: a lone surrogate "
            f"(U+{ord(error.object[error.start]):04X} at {error.start})"
        ) from None
    return kept
