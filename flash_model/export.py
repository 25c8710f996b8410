"""Models on disk: config.json, model.safetensors and tokenizer.model in one directory."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from flash_model.config import ModelConfig
from flash_model.lm import FlashLM, build_model

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.model"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


def save_model(
    directory: Path | str, config: ModelConfig, named_tensors: Iterable[tuple[str, Tensor]], tokenizer_path: Path | str
) -> None:
    """Write the model into `directory`, which is made if need be; each file is written aside, fsynced and renamed.

    named_tensors: the model's parameters under their names, in the floating dtype that is to be stored. ValueError,
    before anything is written, when they are not those of `config`.
    """
    files = model_files(config, {name: tensor.detach() for name, tensor in named_tensors}, tokenizer_path)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        aside = directory / f"{name}.partial"
        with aside.open("wb") as file:
            for part in content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(directory / name)


def model_files(
    config: ModelConfig, tensors: Mapping[str, Tensor], tokenizer_path: Path | str
) -> dict[str, Iterable[bytes | memoryview]]:
    """Return the files of a model directory: their names, and what is to be written into each, part by part.

    The config, by which a directory is known as a model's, comes last. Tensors are copied to the CPU one at a time,
    when they are asked for. ValueError when they are not the parameters of `config`.
    """
    problems = _compare(config, tensors)
    problems += [f"{name} is {x.dtype}, no floating dtype" for name, x in tensors.items() if x.dtype not in _DTYPES]
    if problems:
        raise ValueError(f"cannot save the model: {'; '.join(problems)}")
    return {
        WEIGHTS: _safetensors(tensors),
        TOKENIZER: [Path(tokenizer_path).read_bytes()],
        CONFIG: [config.model_dump_json(indent=2).encode() + b"\n"],
    }


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The parts of a safetensors file: the size of its header, the header, each tensor.

    Its own writer makes a second copy of all tensors, and holds the interpreter until the last one is on disk.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors.values():
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def resolve_model_directory(path: Path | str) -> Path:
    """Return the model directory that `path` is or holds.

    path: a model directory, a checkpoint directory (with model/ in it) or a run directory (with checkpoints/latest in
    it, a text file that names a checkpoint). ValueError, with what was looked for, when it is none of them.
    """
    path = Path(path)
    looked_for = [path / CONFIG, path / "model" / CONFIG]
    latest = path / "checkpoints" / "latest"
    if latest.is_file():
        looked_for.append(latest.parent / latest.read_text().strip() / "model" / CONFIG)
    for candidate in looked_for:
        if candidate.is_file():
            return candidate.parent
    if not latest.is_file():
        looked_for.append(latest)
    raise ValueError(f"no model at {path}: there is none of {', '.join(map(str, looked_for))}")


def load_model(path: Path | str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> FlashLM:
    """Load the model at `path` (see `resolve_model_directory`) as `dtype`, in evaluation mode.

    ValueError with every problem when files are missing or unreadable, or do not hold the config's parameters.
    """
    directory = resolve_model_directory(path)
    config = load_config(directory)
    try:
        tensors = load_file(directory / WEIGHTS, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory / WEIGHTS} cannot be read: {error}") from error
    problems = _compare(config, tensors)
    if problems:
        raise ValueError(f"{directory / WEIGHTS} does not fit {CONFIG}: {'; '.join(problems)}")
    model = build_model(config, device="meta", dtype=dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return model.eval()


def load_config(directory: Path | str) -> ModelConfig:
    """Read the config of the model in `directory`; ValueError when it is missing or wrong."""
    file = Path(directory) / CONFIG
    try:
        return ModelConfig.model_validate(json.loads(file.read_text()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
        raise ValueError(f"{file} is not a model config: {'; '.join(problems)}") from error


def _compare(config: ModelConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """List how tensors differ in name and shape from the parameters of a model of `config`."""
    expected = {name: tuple(p.shape) for name, p in build_model(config, device="meta").named_parameters()}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"{name} is no parameter of the model" for name in sorted(tensors.keys() - expected.keys())]
    for name in sorted(expected.keys() & tensors.keys()):
        if tuple(tensors[name].shape) != expected[name]:
            problems.append(f"{name} has shape {tuple(tensors[name].shape)}, not {expected[name]}")
    return problems
