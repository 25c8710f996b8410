"""Text that the model writes while it is trained, from the weights as they lie on the devices."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from flash_model.generate import Sampling, Tokenizer, generate_tokens, stream_text
from flash_model.lm import FlashLM
from launch.config import RunConfig
from launch.console import say
from launch.engine import Processes
from pipeline.atomic import write_aside
from pipeline.errors import UserError

SHOWN_CHARACTERS = 120


def read_prompts(config: RunConfig, tokenizer: Path) -> tuple[Tokenizer | None, list[list[int]]]:
    """The tokenizer and the pieces of each prompt; None and nothing where there are no prompts.

    Raises `UserError` if the model cannot read them.
    """
    settings, model = config.samples, config.model
    if not settings.prompts:
        return None, []
    try:
        loaded = Tokenizer(tokenizer)
    except ValueError as error:
        raise UserError(f"samples.prompts: {error}") from error
    prompts = [loaded.encode(prompt) for prompt in settings.prompts]
    longest = max(map(len, prompts)) + settings.max_tokens
    if model.architecture == "flash_quad" and model.norm_length is not None and longest > model.norm_length:
        raise UserError(
            f"samples.max_tokens: flash_quad reads at most model.norm_length {model.norm_length} tokens; the longest "
            f"prompt and {settings.max_tokens} more are {longest}"
        )
    return loaded, prompts


class Samples:
    """Lets the model go on from each prompt of `samples.prompts`. Called by all processes, which all do the same."""

    def __init__(self, config: RunConfig, tokenizer: Path, engine: Any, processes: Processes) -> None:
        self._settings, self._directory = config.samples, config.run.dir / "samples"
        self._engine, self._processes = engine, processes
        self._tokenizer, self._prompts = read_prompts(config, tokenizer)

    def write(self, step: int, tokens: int, beat: Callable[[], None]) -> Path | None:
        """Write samples/step-….md and return its path, None where there are no prompts. `beat` comes before a token."""
        if self._tokenizer is None:
            return None
        texts = self._generate(self._tokenizer, beat)
        path = self._directory / f"step-{step:08d}.md"
        self._processes.once(lambda: self._keep(path, f"# Step {step:,}, {tokens:,} tokens", texts))
        for prompt, text in zip(self._settings.prompts, texts, strict=True):
            say(f"sample: {_short(prompt)} → {_short(text)}")
        return path

    def _generate(self, tokenizer: Tokenizer, beat: Callable[[], None]) -> list[str]:
        settings = self._settings
        sampling = _SharedSampling(settings.temperature, None, settings.top_p, share=self._share, beat=beat)
        model = cast(FlashLM, _Gathered(self._engine))
        texts = []
        self._engine.eval()
        try:
            # The model's own compiled code is for whole batches.
            with torch.compiler.set_stance("force_eager"):
                for prompt in self._prompts:
                    drawn = generate_tokens(
                        model,
                        tokenizer,
                        prompt,
                        max_tokens=settings.max_tokens,
                        sampling=sampling,
                        seed=settings.seed,
                    )
                    texts.append("".join(stream_text(tokenizer, prompt, drawn)))
        finally:
            self._engine.train()
        return texts

    def _share(self, draw: Callable[[], int]) -> int:
        return draw() if self._processes.world_size == 1 else self._processes.once(draw)

    def _keep(self, path: Path, title: str, texts: list[str]) -> None:
        parts = [title]
        for prompt, text in zip(self._settings.prompts, texts, strict=True):
            parts.append(f"**{_short(prompt)}**\n\n````text\n{prompt}{text}\n````")
        path.parent.mkdir(exist_ok=True)
        with write_aside(path) as file:
            file.write(("\n\n".join(parts) + "\n").encode())


@dataclass(frozen=True)
class _SharedSampling(Sampling):
    """The first process draws for all: with ZeRO-3 they must go on together, whatever the last bit of a logit is."""

    share: Callable[[Callable[[], int]], int] = lambda draw: draw()
    beat: Callable[[], None] = lambda: None

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        self.beat()
        return self.share(lambda: Sampling.draw(self, logits, generator))


class _Gathered:
    """The model as decoding uses it; with ZeRO-3 a layer's parameters are whole while it is at work."""

    def __init__(self, engine: Any) -> None:
        self._model: FlashLM = engine.module
        self._partitioned = engine.zero_optimization_stage() == 3

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def layers(self) -> Iterator[torch.nn.Module]:
        """The layers, one after another."""
        for layer in self._model.layers:
            with self._whole(layer):
                yield layer

    def _whole(self, layer: torch.nn.Module) -> Any:
        if not self._partitioned:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(list(layer.parameters()))


def _short(text: str) -> str:
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted if len(quoted) <= SHOWN_CHARACTERS else quoted[: SHOWN_CHARACTERS - 1] + "…"
