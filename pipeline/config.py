"""Configuration: YAML with bases and `key=value` overrides, checked whole; and the schema of a data preparation."""

import difflib
import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeline.errors import UserError

T = TypeVar("T", bound=BaseModel)
Key = tuple[str | int, ...]

_INTERPOLATION_PREFIX = "KeyError raised while resolving interpolation: "


class StrictModel(BaseModel):
    """A frozen pydantic model that refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TextSource(StrictModel):
    """Plain text: one document a file."""

    type: Literal["text"]
    name: str = Field(default="text", description="Names the source in document ids and in the manifest.")
    path: str | tuple[str, ...] = Field(
        description="Files, directories, globs or fsspec URLs (or `package:NAME/DIR`: files of an installed package)."
    )
    pattern: str = Field(
        default="*.txt", description="Which files of a directory are read. .gz, .bz2 and .xz are unpacked."
    )


class JsonlSource(StrictModel):
    """JSON lines: one document a line."""

    type: Literal["jsonl"]
    name: str = Field(default="jsonl", description="Names the source in document ids and in the manifest.")
    path: str | tuple[str, ...] = Field(description="Files, directories, globs, fsspec URLs or `package:NAME/DIR`.")
    pattern: str = Field(
        default="*.jsonl*", description="Which files of a directory are read. .gz, .bz2 and .xz are unpacked."
    )
    text_field: str = Field(default="text", description="The field that holds the document.")
    id_field: str | None = Field(
        default=None, description="The field that names the document; null: file and byte offset."
    )


class ParquetSource(StrictModel):
    """Parquet files: one document a row."""

    type: Literal["parquet"]
    name: str = Field(default="parquet", description="Names the source in document ids and in the manifest.")
    path: str | tuple[str, ...] = Field(description="Files, directories, globs, fsspec URLs or `package:NAME/DIR`.")
    pattern: str = Field(default="*.parquet", description="Which files of a directory are read.")
    text_field: str = Field(default="text", description="The column that holds the document.")
    id_field: str | None = Field(
        default=None, description="The column that names the document; null: file and row number."
    )


class DatasetsSource(StrictModel):
    """A directory written by `datasets`' `save_to_disk`: one document a row."""

    type: Literal["datasets"]
    name: str = Field(default="datasets", description="Names the source in document ids and in the manifest.")
    path: str = Field(description="The directory.")
    split: str | None = Field(
        default=None, description="The split of a DatasetDict; null: the directory is one Dataset."
    )
    text_field: str = Field(default="text", description="The column that holds the document.")
    id_field: str | None = Field(
        default=None, description="The column that names the document; null: split and row number."
    )


Source = Annotated[TextSource | JsonlSource | ParquetSource | DatasetsSource, Field(discriminator="type")]


class Clean(StrictModel):
    """What happens to a document's text before it is tokenized. Empty documents are always dropped and counted."""

    on_invalid_utf8: Literal["error", "skip"] = Field(
        default="error", description="skip: such documents are left out, counted."
    )
    unicode: Literal["none", "NFC", "NFKC"] = Field(default="none", description="Unicode normalisation.")


class TrainTokenizer(StrictModel):
    """A SentencePiece model trained on a sample of the training split."""

    model_type: Literal["unigram", "bpe"] = "unigram"
    vocab_size: int = Field(ge=261, description="All pieces, the 4 special and 256 byte pieces included.")
    sample_bytes: int = Field(
        default=100_000_000, ge=1, description="About how much text it is trained on, in UTF-8 bytes."
    )
    character_coverage: float = Field(
        default=0.9995, gt=0, le=1, description="Rarer characters are spelt in byte pieces."
    )
    num_threads: int = Field(default=2, ge=1, description="A content key: the unigram trainer's result depends on it.")


class TokenizerChoice(StrictModel):
    """Either `train` or `path`."""

    train: TrainTokenizer | None = Field(default=None, description="Train one.")
    path: str | None = Field(
        default=None, description="Take an existing SentencePiece .model with unknown and end pieces."
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> "TokenizerChoice":
        if (self.train is None) == (self.path is None):
            raise ValueError("give exactly one of `train` (train a tokenizer) and `path` (an existing .model)")
        return self


class Content(StrictModel):
    """All that the bytes of the shards depend on, beside the sources themselves."""

    sources: tuple[Source, ...] = Field(min_length=1)
    clean: Clean = Clean()
    tokenizer: TokenizerChoice
    splits: dict[str, float] = Field(
        default={"valid": 0.01},
        description="Held-out splits: the fraction of the documents of each, chosen by a keyed hash of the document "
        "id. The rest is `train`.",
    )
    shard_tokens: int = Field(
        default=100_000_000, ge=1, description="A shard is closed once it holds this many tokens."
    )
    unit_bytes: int = Field(
        default=8 << 20, ge=1, description="Text a task reads at once, in bytes: the grain of the work."
    )
    seed: int = Field(default=0, ge=0, description="Splits, sample and order of the documents follow from it.")

    @field_validator("splits")
    @classmethod
    def _splits_leave_training_text(cls, splits: dict[str, float]) -> dict[str, float]:
        for name, fraction in splits.items():
            if name == "train" or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"{name!r} cannot name a held-out split: use letters, digits, - and _, not 'train'")
            if not 0 < fraction < 1:
                raise ValueError(f"{name}: {fraction} must lie between 0 and 1")
        if sum(splits.values()) >= 1:
            raise ValueError(f"the fractions sum to {sum(splits.values())}; nothing is left for train")
        return splits

    @field_validator("sources")
    @classmethod
    def _names_differ(cls, sources: tuple[Source, ...]) -> tuple[Source, ...]:
        names = [source.name for source in sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two sources are named {', '.join(repeated)}: give each its own `name`")
        return sources

    def record(self) -> dict[str, Any]:
        """What the digest covers: everything but keys named `path`; relative names and hashes stand for those."""
        return _without_paths(self.model_dump(mode="json", exclude_none=True))


class Execution(StrictModel):
    """How and where the work is done; the bytes do not depend on it."""

    output: Path = Field(description="The dataset's directory, on a file system that all workers see.")
    workers: int | None = Field(
        default=None, ge=1, description="Tasks at a time; null: as many as the Ray cluster has CPUs."
    )
    ray_address: str | None = Field(
        default=None,
        description="An existing Ray cluster; null: RAY_ADDRESS if set, else a Ray of its own on this machine.",
    )
    object_store_bytes: int = Field(default=512 << 20, ge=80 << 20, description="Object store of a Ray of its own.")


class PrepareConfig(StrictModel):
    """A data preparation."""

    content: Content
    execution: Execution


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items() if key != "path"}
    return [_without_paths(item) for item in value] if isinstance(value, list) else value


def load_config(model: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a YAML file (its `base:` files first), apply `key=value` overrides, and check the whole against `model`.

    `base` is one path or a list, relative to the file that names it. Types are strict: "8" is no integer.

    Raises:
        UserError: with every problem found, each with its dotted key, what was found and what is allowed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = _read_yaml(Path(path), ())
    problems: list[str] = []
    overridden: list[str] = []
    for override in overrides:
        dotted_key, equals, _ = override.partition("=")
        try:
            if not equals or not all(dotted_key.split(".")):
                raise ValueError("not of the form key=value (dotted key)")
            value = OmegaConf.from_dotlist([f"value{override[len(dotted_key) :]}"])._get_node("value")
            OmegaConf.update(config, dotted_key, value, merge=False)
            overridden.append(dotted_key)
        except (OmegaConfBaseException, ValueError, TypeError, IndexError, AttributeError) as error:
            problems.append(f"override {override!r}: {str(error).splitlines()[0]}")
        except Exception as error:
            if not type(error).__module__.startswith("yaml"):
                raise
            problems.append(f"override {override!r}: its value is not valid YAML")
    data, unresolved = _resolve(config)
    problems += [f"{_dotted(key)}: {message}" for key, message in unresolved.items()]
    try:
        # Checked as JSON, where a list is right for a tuple and a string for a path, but "8" is no number.
        checked = model.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            key = _key_of(item["loc"], data)
            # A list whose items are wrong also counts as too short.
            if any(key[: len(bad)] == bad for bad in unresolved) or (item["type"] == "too_short" and item["input"]):
                continue
            dotted = _dotted(key)
            origin = " (command line)" if any(dotted == o or dotted.startswith(f"{o}.") for o in overridden) else ""
            problems.append(f"{dotted}{origin}: {_explain(model, key, item, data)}")
    if problems:
        count = f"{len(problems)} problem" + "s" * (len(problems) > 1)
        raise UserError("\n  ".join([f"{path}: {count}", *problems]))
    return checked


def _read_yaml(path: Path, parents: tuple[Path, ...]) -> Any:
    from omegaconf import DictConfig, ListConfig, OmegaConf

    named_by = f" (base of {parents[-1]})" if parents else ""
    if path.resolve() in (parent.resolve() for parent in parents):
        raise UserError(f"{path}: is its own base: {' → '.join(str(p) for p in (*parents, path))}")
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}{named_by}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}{named_by}: cannot be read: {error}") from None
    except Exception as error:
        if not type(error).__module__.startswith(("yaml", "omegaconf")):
            raise
        raise UserError(f"{path}{named_by}: not valid YAML: {error}") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{path}{named_by}: must be a mapping of keys to values")
    bases = config.pop("base", None)
    if bases is None:
        return config
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, ListConfig | list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{path}: base: must be one path or a list of paths")
    merged = [_read_yaml(path.parent / base, (*parents, path)) for base in bases]
    return OmegaConf.merge(*merged, config)


def _resolve(config: Any) -> tuple[Any, dict[Key, str]]:
    """Plain data with interpolations resolved; those that cannot be are None and reported by key."""
    from omegaconf import DictConfig, ListConfig
    from omegaconf.errors import OmegaConfBaseException

    failed: dict[Key, str] = {}

    def visit(node: Any, key: Key) -> Any:
        if not isinstance(node, DictConfig | ListConfig):
            return node
        names: list[Any] = list(node.keys() if isinstance(node, DictConfig) else range(len(node)))
        values: dict[Any, Any] = {}
        for name in names:
            try:
                values[name] = visit(node[name], (*key, name))
            except OmegaConfBaseException as error:
                values[name] = None
                failed[(*key, name)] = str(error).splitlines()[0].removeprefix(_INTERPOLATION_PREFIX)
        return values if isinstance(node, DictConfig) else list(values.values())

    return visit(config, ()), failed


def _key_of(location: Sequence[str | int], data: Any) -> Key:
    """The key of an error: pydantic's location without the names of union members, which the data does not hold."""
    key: list[str | int] = []
    for position, part in enumerate(location):
        is_last = position == len(location) - 1
        if isinstance(data, dict) and (part in data or is_last):
            key.append(part)
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            key.append(part)
            data = data[part]
    return tuple(key)


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key) or "(top level)"


def _explain(model: type[BaseModel], key: Key, item: Any, data: Any) -> str:
    if item["type"] == "missing":
        return "missing, and it has no default"
    if item["type"] == "extra_forbidden":
        return _explain_unknown(model, key, data)
    message = str(item["msg"]).removeprefix("Value error, ")
    found = item["input"]
    if isinstance(found, dict | list):
        return message if item["type"] == "value_error" else f"{message}; found a {type(found).__name__}"
    return f"{message}; found {found!r}"


def _explain_unknown(model: type[BaseModel], key: Key, data: Any) -> str:
    siblings = sorted({name for owner in _models_at(model, key[:-1], data) for name in owner.model_fields})
    near = difflib.get_close_matches(str(key[-1]), siblings, n=1)
    if near:
        return f"unknown key; did you mean {_dotted((*key[:-1], near[0]))}?"
    elsewhere = [known for known in _known_keys(model, ()) if known[-1] == key[-1]]
    if elsewhere:
        return f"unknown key; did you mean {_dotted(elsewhere[0])}?"
    return f"unknown key; known here: {', '.join(siblings)}"


def _members(annotation: Any) -> Iterator[Any]:
    """The types of an annotation without Annotated and unions around them."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for argument in get_args(annotation):
            yield from _members(argument)
    else:
        yield annotation


def _models_at(annotation: Any, key: Key, data: Any) -> Iterator[type[BaseModel]]:
    """The models that may stand at `key`; of a union with a `type` key the one that the data names."""
    for member in _members(annotation):
        if isinstance(member, type) and issubclass(member, BaseModel):
            tag = member.model_fields.get("type")
            if tag is not None and isinstance(data, dict) and data.get("type") not in get_args(tag.annotation):
                continue
            if not key:
                yield member
            elif (field := member.model_fields.get(str(key[0]))) is not None:
                below = data.get(key[0]) if isinstance(data, dict) else None
                yield from _models_at(field.annotation, key[1:], below)
        elif get_origin(member) in (tuple, list) and key and isinstance(key[0], int):
            yield from _models_at(get_args(member)[0], key[1:], data[key[0]] if isinstance(data, list) else None)


def _known_keys(model: type[BaseModel], prefix: Key) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        yield (*prefix, name)
        for member in _members(field.annotation):
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield from _known_keys(member, (*prefix, name))
