"""Models on disk, and the command line that lets them write."""

import io
import json
import os
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
    Sampling,
    Tokenizer,
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


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_file.parent)


@pytest.fixture
def model(tokenizer: Tokenizer) -> FlashLM:
    return build_model(
        ModelConfig(vocab_size=tokenizer.vocab_size, d_model=16, n_layers=2, qk_dim=8, chunk_size=8), seed=1
    )


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
    with pytest.raises(ValueError, match=r"norm\.bias is torch\.int8"):
        save_model(tmp_path / "wrong", model.config, (tensors | {"norm.bias": torch.zeros(16).char()}).items(), "")
    assert not (tmp_path / "wrong").exists()

    directory = resolve_model_directory(run)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "n_layers": 3, "qk_dim": 4}))
    with pytest.raises(ValueError, match=r"(?s)layers\.2\.beta is missing.*layers\.0\.beta has shape"):
        load_model(run)


def test_a_model_that_was_written_in_part_is_none(tmp_path: Path, model: FlashLM, tokenizer_file: Path) -> None:
    tensors = dict(model.named_parameters()) | {"norm.bias": torch.zeros(16, device="meta")}
    with pytest.raises(NotImplementedError):
        save_model(tmp_path / "cut", model.config, tensors.items(), tokenizer_file)
    with pytest.raises(ValueError, match="no model at"):
        load_model(tmp_path / "cut")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"\xff"),
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
        ("temperature", ["--prompt", "x", "--temperature", "nan"]),
        ("top-k", ["--prompt", "x", "--top-k", "0"]),
        ("top-p", ["--prompt", "x", "--top-p", "1.5"]),
        ("max-tokens", ["--prompt", "x", "--max-tokens", "-1"]),
        ("seed", ["--prompt", "x", "--seed", str(2**64)]),
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


def test_the_command_line_writes_prompt_and_text(run: Path, model: FlashLM, tokenizer: Tokenizer) -> None:
    command = [sys.executable, "-m", "flash_model.generate", str(run), "--prompt", "the sea", "--max-tokens", "12"]
    done = subprocess.run([*command, "--seed", "3"], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = generate_text(model, tokenizer, "the sea", max_tokens=12, temperature=0.8, seed=3)
    assert done.stdout.decode() == "the sea" + expected + "\n"
    assert expected


def test_text_that_nobody_reads_any_further_ends_without_a_word(run: Path) -> None:
    command = [sys.executable, "-m", "flash_model.generate", str(run), "--prompt", "the sea", "--max-tokens", "3"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_generation_starts_a_document_and_stops_at_its_end(
    model: FlashLM, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = tokenizer.document_end
    read: list[int] = []
    script = iter([7, 8, end, 9])

    def scripted(_: FlashLM, token: torch.Tensor, *state: None) -> torch.Tensor:
        read.extend(token.flatten().tolist())
        return torch.nn.functional.one_hot(torch.tensor([next(script)]), model.config.vocab_size) * 50.0

    monkeypatch.setattr("flash_model.generate.prefill", lambda model, tokens: (scripted(model, tokens), "state"))
    monkeypatch.setattr("flash_model.generate.step", scripted)
    assert list(generate_tokens(model, tokenizer, [5, 6], max_tokens=10, sampling=Sampling())) == [7, 8]
    assert read == [end, 5, 6, 7, 8]


def test_at_most_max_tokens_are_written_and_no_special_piece(model: FlashLM, tokenizer: Tokenizer) -> None:
    for max_tokens in (0, 1, 9):
        written = generate_tokens(model, tokenizer, [5], max_tokens=max_tokens, sampling=Sampling())
        assert len(list(written)) <= max_tokens
    assert (tokenizer.document_end, tokenizer.never_written) == (1, [0, 2, 3])
    with torch.no_grad():
        model.embedding.weight.zero_()  # every piece is as likely as any other
    written = generate_tokens(model, tokenizer, [5], max_tokens=300, sampling=Sampling(), seed=2)
    assert not {0, 1, 2, 3} & set(written)


def test_a_larger_vocabulary_than_the_tokenizers_is_never_written(tokenizer: Tokenizer) -> None:
    config = ModelConfig(vocab_size=2000, d_model=16, n_layers=1, qk_dim=8, chunk_size=8)
    written = list(generate_tokens(build_model(config), tokenizer, [5], max_tokens=30, sampling=Sampling(), seed=1))
    assert max(written) < tokenizer.vocab_size
    small = build_model(config.model_copy(update={"vocab_size": 100}))
    with pytest.raises(ValueError, match="the model knows 100"):
        generate_text(small, tokenizer, "the")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_that_diverged_is_said_to_have(temperature: float, model: FlashLM, tokenizer: Tokenizer) -> None:
    torch.nn.init.constant_(model.embedding.weight, torch.nan)
    tokens = generate_tokens(model, tokenizer, [], max_tokens=3, sampling=Sampling(temperature))
    with pytest.raises(ValueError, match="diverged"):
        next(tokens)


def test_flash_quad_says_before_the_first_token_that_it_cannot_read_so_far(tokenizer: Tokenizer) -> None:
    config = ModelConfig(
        architecture="flash_quad", norm_length=10, vocab_size=tokenizer.vocab_size, d_model=16, n_layers=1, qk_dim=8
    )
    model = build_model(config)
    options: dict[str, Any] = {"sampling": Sampling(temperature=0)}
    assert len(list(generate_tokens(model, tokenizer, [5] * 4, max_tokens=6, **options))) == 6
    with pytest.raises(ValueError, match="at most 10"):
        generate_tokens(model, tokenizer, [5] * 4, max_tokens=7, **options)


def test_sampling() -> None:
    probabilities = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.4, 0.3, 0.2, 0.1])
    logits = probabilities.log()

    def drawn(sampling: Sampling, times: int = 300) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.bincount(torch.tensor([sampling.draw(logits, generator) for _ in range(times)]), minlength=8)

    assert drawn(Sampling(temperature=0))[4] == 300
    assert drawn(Sampling(temperature=1e-46))[4] == 300  # less than a float32 can be
    assert drawn(Sampling(top_k=2)).nonzero().flatten().tolist() == [4, 5]
    assert drawn(Sampling(top_p=0.65)).nonzero().flatten().tolist() == [4, 5]
    assert drawn(Sampling(top_p=0.75)).nonzero().flatten().tolist() == [4, 5, 6]
    assert drawn(Sampling(top_k=3, top_p=0.5)).nonzero().flatten().tolist() == [4, 5]
    counts = drawn(Sampling(), 4000)
    torch.testing.assert_close(counts / 4000, probabilities, rtol=0, atol=0.03)
    sharp = drawn(Sampling(temperature=0.5), 4000)
    torch.testing.assert_close(sharp / 4000, probabilities**2 / (probabilities**2).sum(), rtol=0, atol=0.03)


@pytest.mark.parametrize("prompt", ["", "the ", "call 漢"])
def test_text_streams_in_whole_characters(prompt: str, tokenizer: Tokenizer) -> None:
    text = " naïve  façade 漢字 🙂🙂 the sea\n and"
    parts = list(stream_text(tokenizer, tokenizer.encode(prompt), iter(tokenizer.encode(text))))
    assert "".join(parts) == text
    assert len(parts) > 5
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


def test_a_character_that_is_never_completed_is_still_shown(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.encode("a🙂")
    assert "".join(stream_text(tokenizer, [], iter(pieces[:-1]))).startswith("a\N{REPLACEMENT CHARACTER}")


def test_the_package_imports_without_what_only_generation_needs() -> None:
    code = "import sys, flash_model.generate; sys.exit('sentencepiece' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
