"""Configuration from YAML: base files, `key=value` overrides, and all problems at once."""

import difflib
import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.credentials import redact
from pipeline.errors import UserError

T = TypeVar("T", bound=BaseModel)
Key = tuple[str | int, ...]

_INTERPOLATION_PREFIX = "KeyError raised while resolving interpolation: "


class StrictModel(BaseModel):
    """A frozen pydantic model that refuses keys it does not know, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
        except IndexError:
            problems.append(f"override {override!r}: the list has no such item; give the whole list, KEY=[ITEM, …]")
        except (OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
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
            key = _key_of(item["loc"], data, missing=item["type"] == "missing")
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


def _key_of(location: Sequence[str | int], data: Any, *, missing: bool) -> Key:
    """The key of an error: pydantic's location without the names of union members, which the data does not hold.

    missing: the data does not hold the last part either.
    """
    key: list[str | int] = []
    for position, part in enumerate(location):
        is_last = position == len(location) - 1
        if isinstance(data, dict) and (part in data or (missing and is_last)):
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
        if isinstance(item["loc"][-1], int):
            return f"too few values; found {item['input']!r}"
        return "missing, and it has no default"
    if item["type"] == "extra_forbidden":
        return _explain_unknown(model, key, data)
    message = str(item["msg"]).removeprefix("Value error, ")
    found = item["input"]
    if isinstance(found, dict | list):
        return message if item["type"] == "value_error" else f"{message}; found a {type(found).__name__}"
    return f"{message}; found {redact(repr(found))}"


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
