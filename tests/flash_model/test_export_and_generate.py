"""Models on disk, and the command line that lets them write."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch

from flash_model.config import ModelConfig
from flash_model.export import load_model, resolve_model_directory, save_model
from flash_model.generate import (
    DOCUMENT_END,
    Sampling,
    generate_text,
    generate_tokens,
    load_tokenizer,
    main,
    stream_text,
)
from flash_model.lm import FlashLM, build_model

VOCABULARY = 330


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = ["the sea was calm and the ship was slow", "a plain façade, 5 and 6", "call me later she said"] * 20
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model, vocab_size=VOCABULARY, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        character_coverage=1.0, unk_id=0, bos_id=-1, eos_id=1, pad_id=2, control_symbols=["<mask>"],
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return file


@pytest.fixture
def model(tokenizer_file: Path) -> FlashLM:
    size = load_tokenizer_size(tokenizer_file)
    return build_model(ModelConfig(vocab_size=size, d_model=16, n_layers=2, qk_dim=8, chunk_size=8), seed=1)


def load_tokenizer_size(file: Path) -> int:
    return sentencepiece.SentencePieceProcessor(model_file=str(file)).vocab_size()


@pytest.fixture
def run(tmp_path: Path, model: FlashLM, tokenizer_file: Path) -> Path:
    """A run directory with one checkpoint that `latest` names."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000010"
    save_model(checkpoint / "model", model.config, model.named_parameters(), tokenizer_file)
    (checkpoint.parent / "latest").write_text("step-00000010\n")
    return tmp_path / "run"


def test_a_saved_model_is_loaded_from_run_checkpoint_or_model_directory(run: Path, model: FlashLM) -> None:
    checkpoint = run / "checkpoints" / "step-00000010"
    for path in (run, checkpoint, checkpoint / "model"):
        assert resolve_model_directory(path) == checkpoint / "model"
        loaded = load_model(path)
        assert loaded.config == model.config
        for (name, expected), (loaded_name, found) in zip(
            model.named_parameters(), loaded.named_parameters(), strict=True
        ):
            assert name == loaded_name
            assert torch.equal(expected, found)
    assert {p.dtype for p in load_model(run, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert sorted(p.name for p in (checkpoint / "model").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.model",
    ]  # fmt: skip


def test_what_is_no_model_directory_is_told_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)config\.json.*model.*checkpoints.*latest"):
        resolve_model_directory(tmp_path / "nothing")


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path, model: FlashLM, run: Path, tokenizer_file: Path) -> None:
    tensors = dict(model.named_parameters())
    wrong = {**tensors, "extra": torch.zeros(1), "norm.weight": torch.zeros(7)}
    del wrong["layers.1.gamma"]
    problems = r"(?s)layers\.1\.gamma is missing.*extra is no parameter.*norm\.weight has shape \(7,\), not \(16,\)"
    with pytest.raises(ValueError, match=problems):
        save_model(tmp_path / "wrong", model.config, wrong.items(), tokenizer_file)
    assert not (tmp_path / "wrong").exists()

    directory = resolve_model_directory(run)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "n_layers": 3, "qk_dim": 4}))
    with pytest.raises(ValueError, match=r"(?s)layers\.2\.beta is missing.*layers\.0\.beta has shape"):
        load_model(run)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"d_model": "wide"}'),
        ("model.safetensors", b"not tensors"),
        ("tokenizer.model", b"not a tokenizer"),
    ],
)
def test_the_command_line_names_a_broken_file(
    file: str, content: bytes, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (resolve_model_directory(run) / file).write_bytes(content)
    assert main([str(run), "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert file in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("named", "options"),
    [
        ("no model at", ["--prompt", "x"]),
        ("temperature", ["--prompt", "x", "--temperature", "-1"]),
        ("top-k", ["--prompt", "x", "--top-k", "0"]),
        ("top-p", ["--prompt", "x", "--top-p", "1.5"]),
        ("max-tokens", ["--prompt", "x", "--max-tokens", "-1"]),
        ("--device", ["--prompt", "x", "--device", "abacus"]),
    ],
)
def test_the_command_line_says_what_is_wrong_in_one_line(
    named: str, options: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "elsewhere" if named == "no model at" else run
    assert main([str(path), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err


def test_the_command_line_writes_prompt_and_text(run: Path, model: FlashLM, tokenizer_file: Path) -> None:
    command = [sys.executable, "-m", "flash_model.generate", str(run), "--prompt", "the sea", "--max-tokens", "12"]
    first, second = (subprocess.run([*command, "--seed", "3"], capture_output=True, timeout=120) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    tokenizer = load_tokenizer(tokenizer_file.parent)
    expected = generate_text(model, tokenizer, "the sea", max_tokens=12, temperature=0.8, seed=3)
    assert first.stdout.decode() == "the sea" + expected + "\n"
    assert expected


def test_generation_starts_a_document_and_stops_at_its_end(model: FlashLM, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[int]] = []
    script = iter([7, 8, DOCUMENT_END, 9])

    def prefill(_: FlashLM, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        read.append(tokens[0].tolist())
        return scripted(), None

    def scripted(*_: Any) -> torch.Tensor:
        logits = torch.zeros(1, model.config.vocab_size)
        logits[0, next(script)] = 50.0
        return logits

    monkeypatch.setattr("flash_model.generate.prefill", prefill)
    monkeypatch.setattr("flash_model.generate.step", scripted)
    assert list(generate_tokens(model, [5, 6], max_tokens=10, sampling=Sampling())) == [7, 8]
    assert read == [[DOCUMENT_END, 5, 6]]


def test_at_most_max_tokens_are_written(model: FlashLM) -> None:
    for max_tokens in (0, 1, 9):
        sampling = Sampling()
        assert len(list(generate_tokens(model, [5], max_tokens=max_tokens, sampling=sampling))) <= max_tokens
    tokens = list(generate_tokens(model, [5], max_tokens=40, sampling=Sampling(), seed=1))
    assert not {0, DOCUMENT_END, 2, 3} & set(tokens)


def test_sampling() -> None:
    probabilities = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.4, 0.3, 0.2, 0.1])
    logits = probabilities.log()

    def drawn(sampling: Sampling, times: int = 300) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.bincount(torch.tensor([sampling.draw(logits, generator) for _ in range(times)]), minlength=8)

    assert drawn(Sampling(temperature=0))[4] == 300
    assert drawn(Sampling(top_k=2)).nonzero().flatten().tolist() == [4, 5]
    assert drawn(Sampling(top_p=0.65)).nonzero().flatten().tolist() == [4, 5]
    assert drawn(Sampling(top_p=0.75)).nonzero().flatten().tolist() == [4, 5, 6]
    assert drawn(Sampling(top_k=3, top_p=0.5)).nonzero().flatten().tolist() == [4, 5]
    counts = drawn(Sampling(), 4000)
    torch.testing.assert_close(counts / 4000, probabilities, rtol=0, atol=0.03)
    sharp = drawn(Sampling(temperature=0.5), 4000)
    torch.testing.assert_close(sharp / 4000, probabilities**2 / (probabilities**2).sum(), rtol=0, atol=0.03)


@pytest.mark.parametrize("prompt", ["", "the ", "call 漢"])
def test_text_streams_in_whole_characters(prompt: str, tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_file.parent)
    text = " naïve  façade 漢字 🙂🙂 the sea\n and"
    parts = list(stream_text(tokenizer, tokenizer.encode(prompt), iter(tokenizer.encode(text))))
    assert "".join(parts) == text
    assert len(parts) > 5
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


def test_a_character_that_is_never_completed_is_still_shown(tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_file.parent)
    pieces = tokenizer.encode("a🙂")
    assert "".join(stream_text(tokenizer, [], iter(pieces[:-1]))).startswith("a\N{REPLACEMENT CHARACTER}")


def test_the_package_imports_without_what_only_generation_needs() -> None:
    code = "import sys, flash_model.generate; sys.exit('sentencepiece' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
