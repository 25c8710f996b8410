"""SentencePiece: reserved pieces, exact round trips, determinism, messages."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.config import TrainTokenizer
from pipeline.errors import UserError
from pipeline.tokenizer import Tokenizer, train_tokenizer

CONFIGS = {
    "unigram": TrainTokenizer(vocab_size=330, num_threads=1),
    "bpe": TrainTokenizer(vocab_size=330, num_threads=1, model_type="bpe"),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def tokenizer(request: pytest.FixtureRequest, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(texts, CONFIGS[request.param]))
    return Tokenizer(path)


def test_reserved_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.unk_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 330


@given(text=st.text())
@example("</s><unk><pad><mask><s><0x41>")
@example("▁ a▁▁ \u2585\u2047 ⁇")
@example("\x00\n\r\n\t\ufeff  leading, trailing and  double spaces  ")
def test_any_text_comes_back_and_never_makes_a_special_piece(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids, default=4) > 3
    assert int(tokenizer.utf8_lengths()[ids].sum()) == len(text.encode())


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_training_is_deterministic(texts: list[str], kind: str) -> None:
    assert train_tokenizer(texts, CONFIGS[kind]) == train_tokenizer(iter(texts), CONFIGS[kind])


def test_a_text_without_line_breaks_trains_as_well(texts: list[str], tmp_path: Path) -> None:
    """SentencePiece silently leaves out sentences above its limit."""
    by_line = "\n".join(texts)
    lengths = []
    for number, text in enumerate((by_line, by_line.replace("\n", " "))):
        path = tmp_path / f"{number}.model"
        path.write_bytes(train_tokenizer([text], TrainTokenizer(vocab_size=400, model_type="bpe")))
        lengths.append(len(Tokenizer(path).encode(text)))
    assert lengths[1] < 1.05 * lengths[0] < 0.6 * len(by_line)


def test_vocabulary_too_large_names_the_largest_possible(texts: list[str]) -> None:
    with pytest.raises(UserError, match="largest possible is") as caught:
        train_tokenizer(texts, TrainTokenizer(vocab_size=30000))
    assert "content.tokenizer.train.vocab_size: 30000" in str(caught.value)
    largest = int(str(caught.value).split()[-1])
    train_tokenizer(texts, TrainTokenizer(vocab_size=largest))


def test_vocabulary_too_small_names_the_smallest_possible(texts: list[str]) -> None:
    with pytest.raises(UserError, match="smallest possible is") as caught:
        train_tokenizer(texts, TrainTokenizer(vocab_size=261))
    train_tokenizer(texts, TrainTokenizer(vocab_size=int(str(caught.value).split()[-1])))


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "m")
