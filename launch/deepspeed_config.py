"""DeepSpeed's settings: derived from the run's config, with its `deepspeed:` section merged last and checked.

DeepSpeed 0.19.8 ignores unknown keys at the top, and in sections like aio, in silence, and refuses others when the
devices are in use already: all are checked here, from a table, without importing it.
"""

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from launch.deepspeed_keys import ACCEPTED, ANY, REFUSED, REMOVED, SHORT_NAMES

if TYPE_CHECKING:
    from launch.config import RunConfig

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list"}


def lint_deepspeed(section: Mapping[str, Any]) -> list[str]:
    """Problems of a `deepspeed:` section and all sections in it, one line each: keys that are unknown, removed or set
    elsewhere, and values of the wrong kind.
    """
    return list(_problems(section, ACCEPTED, ()))


def _problems(section: Mapping[str, Any], accepted: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[str]:
    for key, value in section.items():
        name = ".".join((*above, str(key)))
        kind = accepted.get(key)
        if name in REFUSED:
            yield f"deepspeed.{name}: {REFUSED[name]}"
        elif name in REMOVED:
            yield f"deepspeed.{name}: removed from DeepSpeed 0.19.8; delete it"
        elif kind is None:
            yield f"deepspeed.{name}: unknown key; {_hint(str(key), accepted, above)}"
        elif isinstance(kind, Mapping):
            if isinstance(value, Mapping):
                yield from _problems(value, kind, (*above, key))
            else:
                yield f"deepspeed.{name}: {value!r} is not a mapping of settings"
        elif not _is_a(value, kind):
            yield f"deepspeed.{name}: {value!r} is not {KINDS[kind]}"
        elif key == "device" and value != "nvme":
            yield f"deepspeed.{name}: {value}: only nvme is set here; use train.offload instead"


def _hint(key: str, accepted: Mapping[str, Any], above: tuple[str, ...]) -> str:
    if above == ("zero_optimization",) and key in SHORT_NAMES:
        return f"did you mean stage3_{key}?"
    here = ".".join((*above, ""))
    refused = [name.removeprefix(here) for name in REFUSED if name.startswith(here)]
    close = difflib.get_close_matches(key, [*accepted, *refused], n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(accepted))}"


def _is_a(value: Any, kind: type) -> bool:
    if value is None or kind is ANY:
        return True
    if kind in (int, float):
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return number and (kind is float or value == int(value))
    return isinstance(value, kind)


def deepspeed_config(config: "RunConfig", accumulation: int) -> dict[str, Any]:
    """DeepSpeed's settings for a run whose processes accumulate `accumulation` micro batches a step."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": accumulation,
        # DeepSpeed clips at 1.0 when the key is absent.
        "gradient_clipping": config.optimizer.gradient_clip,
        "zero_optimization": _zero_optimization(config),
        "steps_per_print": None,
        # Without this, offload insists on DeepSpeed's own CPU Adam, a build of minutes.
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.train.precision == "bf16":
        # Left alone, DeepSpeed accumulates and reduces bf16 gradients in bf16.
        settings |= {
            "bf16": {"enabled": True, "check_grad_overflow": False},  # the loop has looked before
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return _merged(settings, config.deepspeed)


def _zero_optimization(config: "RunConfig") -> dict[str, Any]:
    # DeepSpeed's default, five times that, takes 2 GB all the time and up to 4 GB while gradients are reduced.
    settings: dict[str, Any] = {"stage": config.train.zero_stage, "reduce_bucket_size": 100_000_000}
    if config.train.offload != "none":
        settings["offload_optimizer"] = {"device": "cpu"}
    if config.train.offload == "all":
        # Brought in again for backward: by default models of up to a billion parameters stay on the device whole.
        settings |= {"offload_param": {"device": "cpu"}}
        settings |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 100_000_000}
    return settings


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
