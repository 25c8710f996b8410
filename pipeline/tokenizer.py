"""SentencePiece: training on a sample, loading, and encoding that comes back exactly."""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.config import TrainTokenizer
from pipeline.errors import UserError

UNK_ID, EOS_ID, PAD_ID, MASK_ID = range(4)
_MASK_PIECE = "<mask>"
_SPACE = "▁"  # SentencePiece's spelling of a space, which it cannot tell from the character itself
_SENTENCE_CHARACTERS = 1024


def train_tokenizer(texts: Iterable[str], config: TrainTokenizer) -> bytes:
    """Train a SentencePiece model and return it serialized; the same texts and config give the same bytes.

    Ids 0 to 3 are unknown, `</s>`, padding and mask, all control pieces: text that spells one encodes as plain text.
    Characters outside the vocabulary are spelt in byte pieces; nothing is normalised.

    Raises:
        UserError: the text is too small for `vocab_size`, or `vocab_size` too small for the text's characters.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            num_threads=config.num_threads,
            max_sentence_length=4 * _SENTENCE_CHARACTERS,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=UNK_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            bos_id=-1,
            control_symbols=[_MASK_PIECE],
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(_explain(str(error), config)) from None
    return model.getvalue()


def _explain(message: str, config: TrainTokenizer) -> str:
    key = f"content.tokenizer.train.vocab_size: {config.vocab_size}"
    if largest := re.search(r"Vocabulary size too high.*?<= *(\d+)", message):
        return f"{key} is more than the training text supports; the largest possible is {largest[1]}"
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"{key} cannot hold the text's characters and the special pieces; the smallest possible is {smallest[1]}"
    return f"content.tokenizer.train: SentencePiece cannot train on this text: {message}"


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, and of long lines pieces that end before a space: SentencePiece would leave long sentences out."""
    for text in texts:
        for line in text.split("\n"):
            start = 0
            while len(line) - start > _SENTENCE_CHARACTERS:
                latest = start + _SENTENCE_CHARACTERS
                space = line.rfind(" ", start + 1, latest)
                stop = space if space > 0 else latest
                yield line[start:stop]
                start = stop
            if start < len(line):
                yield line[start:]


class Tokenizer:
    """A SentencePiece model with unknown and end pieces.

    Attributes:
        pad_id: the end piece's id where the model has no padding piece.
        mask_id: -1 where the model has no `<mask>` piece.
    """

    def __init__(self, path: str | Path) -> None:
        import sentencepiece

        self.path = Path(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a SentencePiece model that can be loaded: {error}") from None
        self.vocab_size: int = self._model.vocab_size()
        self.unk_id: int = self._model.unk_id()
        self.eos_id: int = self._model.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{path}: the model has no end-of-sentence piece, which has to close each document")
        self.pad_id: int = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos_id
        mask = self._model.piece_to_id(_MASK_PIECE)
        self.mask_id: int = mask if mask != self.unk_id else -1

    @cached_property
    def _space_spelt_in_bytes(self) -> list[int] | None:
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        return None if self.unk_id in ids else ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end piece."""
        if self._space_spelt_in_bytes is None or _SPACE not in text:
            ids: list[int] = self._model.encode(text)
            return ids
        first, *rest = self._model.encode(text.split(_SPACE))
        for part in rest:
            first += self._space_spelt_in_bytes + part
        return list(first)

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text and the end piece that closes it: (n,) int32."""
        if self._space_spelt_in_bytes is None or _SPACE not in text:
            # Without a Python object for every id: nearly half the time of `encode`.
            ids = np.asarray(self._model.encode(text, out_type="numpy"))
        else:
            ids = np.array(self.encode(text))
        return np.append(ids, self.eos_id).astype(np.int32, copy=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special pieces have none."""
        text: str = self._model.decode(list(ids))
        return text

    def utf8_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: how many UTF-8 bytes of text each piece stands for; special pieces: 0."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for i in range(self.vocab_size):
            if self._model.is_byte(i):
                lengths[i] = 1
            elif not (self._model.is_control(i) or self._model.is_unknown(i)):
                lengths[i] = len(self._model.id_to_piece(i).replace(_SPACE, " ").encode())
        return lengths

    def byte_pieces(self) -> np.ndarray:
        """(vocab_size,) bool: the pieces that spell a single byte."""
        return np.array([self._model.is_byte(i) for i in range(self.vocab_size)], np.bool_)

    def special_pieces(self) -> np.ndarray:
        """(vocab_size,) bool: the pieces that stand for no text: unknown and control pieces."""
        return np.array(
            [self._model.is_control(i) or self._model.is_unknown(i) for i in range(self.vocab_size)], np.bool_
        )
