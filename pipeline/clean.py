"""From a document's bytes to the text that is tokenized, or to the reason why it is dropped."""

import unicodedata
from dataclasses import dataclass

from pipeline.config import Clean
from pipeline.errors import UserError

EMPTY = "empty"
INVALID_UTF8 = "invalid_utf8"


@dataclass(frozen=True)
class Dropped:
    """A document that is left out, and why (`reason` is a key of the manifest's counts)."""

    reason: str


def clean(document_id: str, data: bytes, config: Clean) -> str | Dropped:
    """The text of one document, or why it is dropped.

    Raises:
        UserError: it is not UTF-8 and `on_invalid_utf8` is `error`.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        if config.on_invalid_utf8 == "skip":
            return Dropped(INVALID_UTF8)
        raise UserError(
            f"{document_id}: not valid UTF-8 (byte {data[error.start]:#04x} at {error.start}). "
            "Mend the file, or leave such documents out with content.clean.on_invalid_utf8=skip."
        ) from None
    if config.unicode != "none":
        text = unicodedata.normalize(config.unicode, text)
    return text or Dropped(EMPTY)
