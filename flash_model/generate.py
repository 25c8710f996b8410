"""Let a trained model write: `python -m flash_model.generate CHECKPOINT --prompt TEXT`."""

import argparse
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flash_model.decode import DecodeState, prefill, step
from flash_model.export import TOKENIZER, load_model, resolve_model_directory
from flash_model.lm import FlashLM


class Tokenizer:
    """The SentencePiece model beside a language model.

    Attributes:
        document_end: the piece that opens a document as an input and closes it as a target.
        never_written: pieces without text, never a target in training: unknown, padding, mask.
    """

    def __init__(self, file: Path) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{file} cannot be read as a SentencePiece model: {error}") from error
        self.vocab_size: int = self._model.vocab_size()
        self.document_end: int = self._model.eos_id()
        if self.document_end < 0:
            raise ValueError(f"{file} has no end piece </s>: a model trained with it could not start a document")
        self.never_written = [
            piece
            for piece in range(self.vocab_size)
            if piece != self.document_end and (self._model.is_control(piece) or self._model.is_unknown(piece))
        ]

    def encode(self, text: str) -> list[int]:
        """Return the pieces of text, without an end."""
        pieces: list[int] = self._model.encode(text)
        return pieces

    def decode(self, pieces: list[int]) -> str:
        """Return the text of pieces."""
        text: str = self._model.decode(pieces)
        return text


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. ValueError for values that mean nothing."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Draw from this many most likely tokens."""
    top_p: float | None = None
    """Draw from the fewest most likely tokens whose probabilities reach this sum."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be a number, not negative: it is {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k must be at least 1: it is {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be above 0 and at most 1: it is {self.top_p}")

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """Draw a token from logits (V,) of float32."""
        if self.temperature == 0:
            return int(logits.argmax())
        # The highest becomes 0 and the rest is float64: however low the temperature, nothing overflows.
        probabilities, tokens = ((logits - logits.max()).double() / self.temperature).softmax(-1).sort(descending=True)
        if self.top_k is not None:
            probabilities[self.top_k :] = 0
        if self.top_p is not None:
            reached_before = probabilities.cumsum(0) - probabilities
            probabilities[reached_before >= self.top_p * probabilities.sum()] = 0
        return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def generate_tokens(
    model: FlashLM, tokenizer: Tokenizer, prompt: Sequence[int], *, max_tokens: int, sampling: Sampling, seed: int = 0
) -> Iterator[int]:
    """Iterate over up to max_tokens tokens that follow a document start and the prompt; a document end stops it.

    ValueError, before the first token, when model and tokenizer do not fit or flash_quad cannot read that far; at any
    token when its logits are NaN.
    """
    config = model.config
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} pieces, the model knows {config.vocab_size}")
    if max_tokens < 0:
        raise ValueError(f"max-tokens must not be negative: it is {max_tokens}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be a number from 0 to 2^64 - 1: it is {seed}")
    to_read = len(prompt) + max(1, max_tokens)
    if config.architecture == "flash_quad" and config.norm_length is not None and to_read > config.norm_length:
        raise ValueError(
            f"max-tokens: flash_quad reads at most {config.norm_length} tokens; the prompt has {len(prompt)}, so "
            f"{max_tokens} more are too many"
        )
    return _continue(model, tokenizer, prompt, max_tokens, sampling, seed)


def _continue(
    model: FlashLM, tokenizer: Tokenizer, prompt: Sequence[int], max_tokens: int, sampling: Sampling, seed: int
) -> Iterator[int]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    state: DecodeState | None = None
    token = tokenizer.document_end
    for _ in range(max_tokens):
        if state is None:
            logits, state = prefill(model, torch.tensor([[token, *prompt]], device=device))
        else:
            logits = step(model, torch.tensor([token], device=device), state)
        allowed = logits[0].float().cpu()
        if allowed.isnan().any():
            raise ValueError("the model's logits are not numbers: it diverged in training, or its weights are damaged")
        allowed[tokenizer.never_written] = -torch.inf
        allowed[tokenizer.vocab_size :] = -torch.inf
        token = sampling.draw(allowed, generator)
        if token == tokenizer.document_end:
            return
        yield token


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    """Yield the text of `tokens`, which follow the prompt's, in parts, as soon as their characters are complete."""
    context, pending = list(prompt)[-8:], []
    known = tokenizer.decode(context)
    for token in tokens:
        pending.append(token)
        text = tokenizer.decode(context + pending)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character of several byte pieces is not whole yet
            yield text[len(known) :]
            context, pending = pending[-8:], []
            known = tokenizer.decode(context)
    if pending:
        yield tokenizer.decode(context + pending)[len(known) :]


def generate_text(
    model: FlashLM,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> str:
    """Return what the model writes after `prompt`, without the prompt, at the start of a document.

    max_tokens: the most to be written; a document end stops earlier. ValueError for sampling values that mean nothing,
    and for a sequence that flash_quad cannot read.
    """
    pieces = tokenizer.encode(prompt)
    sampling = Sampling(temperature, top_k, top_p)
    tokens = generate_tokens(model, tokenizer, pieces, max_tokens=max_tokens, sampling=sampling, seed=seed)
    return "".join(stream_text(tokenizer, pieces, tokens))


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer of a model directory; ValueError when it cannot be read or has no end piece."""
    return Tokenizer(directory / TOKENIZER)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 2 after one line about what the user can mend, 141 when nobody reads any further."""
    parser = argparse.ArgumentParser(prog="python -m flash_model.generate", description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a run, a checkpoint or a model directory")
    parser.add_argument("--prompt", required=True, help="text to go on from; may be empty")
    parser.add_argument("--max-tokens", type=int, default=200, help="the most tokens to write (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="draw from this many likeliest tokens")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens that reach this probability")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="for instance cuda (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        sampling = Sampling(options.temperature, options.top_k, options.top_p)
        directory = resolve_model_directory(options.checkpoint)
        tokenizer = load_tokenizer(directory)
        model = load_model(directory, device=_device(options.device))
        pieces = tokenizer.encode(options.prompt)
        tokens = generate_tokens(
            model, tokenizer, pieces, max_tokens=options.max_tokens, sampling=sampling, seed=options.seed
        )
        print(options.prompt, end="", flush=True)
        for text in stream_text(tokenizer, pieces, tokens):
            print(text, end="", flush=True)
        print()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is not written yet would fail again
        return 128 + signal.SIGPIPE
    return 0


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


if __name__ == "__main__":
    sys.exit(main())
