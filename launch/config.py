"""The configuration of a run: every key of a run's YAML file, documented where it is declared."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from flash_model.config import ModelConfig
from launch.deepspeed_config import lint_deepspeed
from launch.observation_config import LayerMetricsSection, ProfileSection, SamplesSection
from launch.operation_config import BadStepsSection, CheckpointSection, TrackingSection, WatchdogSection
from pipeline.credentials import redact
from pipeline.errors import UserError
from pipeline.locations import locate
from pipeline.masking import MaskedLM
from pipeline.strict_yaml import StrictModel, load_config

METRIC_GROUPS = ("train", "perf", "layers", "system")
"""What metrics are called that are no validation set's."""


class RunSection(StrictModel):
    """Where a run lives and how it starts."""

    dir: Path = Field(description="directory that holds everything of the run; relative to the working directory")
    name: str | None = Field(default=None, description="name shown in MLflow; default: the name of `dir`")
    seed: int = Field(default=1234, ge=0, lt=2**63, description="seed of initialisation and data order")
    resume: Literal["never", "auto", "must"] = Field(
        default="never",
        description="never: an existing run is refused; auto: continue it if there is one (for supervisors); "
        "must: continue it, an error if there is none. `--resume` on the command line means must",
    )
    max_hours: PositiveFloat | None = Field(
        default=None,
        description="wall-clock limit of each start: so long after its processes began, the run saves and stops with "
        "status 75, to be resumed; leave time for a step and a checkpoint; default: none",
    )
    init_from: Path | None = Field(
        default=None,
        description="checkpoint, or run directory (its newest), whose weights a new run starts from, with a fresh "
        "optimizer, schedule and data order; a run that is resumed does not read it; default: none",
    )


class DatasetRef(StrictModel):
    """A split of a prepared dataset."""

    path: Path = Field(description="dataset directory written by pipeline.prepare")
    split: str = Field(default="valid", description="split to read")
    max_tokens: PositiveInt | None = Field(
        default=None,
        description="score only about so many tokens of a large set, whole windows chosen by its digest: the same ones "
        "at every evaluation and in every run with this data.seq_len; null: all",
    )


class MixtureComponent(StrictModel):
    """A dataset of a mixture."""

    path: Path = Field(description="dataset directory; all of a mixture have the same tokenizer")
    split: str = Field(default="train", description="split to read")
    weight: PositiveFloat = Field(
        default=1.0,
        description="share of the windows, relative to the other weights; exact over every block of at most 65,536",
    )
    name: str | None = Field(
        default=None,
        pattern=r"^[\w.-]+$",
        description="what messages and MLflow call it; default: the directory's name, -SPLIT behind it where not train",
    )


class DataSection(StrictModel):
    """What the model reads: either `path` or `mixture`."""

    path: Path | None = Field(default=None, description="dataset directory written by pipeline.prepare")
    split: str = Field(default="train", description="split of `path` to train on")
    mixture: tuple[MixtureComponent, ...] | None = Field(
        default=None,
        min_length=1,
        description="several datasets instead of `path`, each read in its own order and epochs; changed datasets or "
        "weights are refused on resume",
    )
    seq_len: PositiveInt = Field(description="tokens of a training window")
    masked_lm: MaskedLM | None = Field(
        default=None,
        description="null: predict the next token (model.causal: true). A mapping, {} for BERT's 15 % (80 % mask, 10 % "
        "random piece, 10 % kept): restore hidden tokens (model.causal: false); keys: fraction, mask, random",
    )
    prefetch: int = Field(
        default=2, ge=0, description="steps prepared ahead by a thread, in pinned memory on GPUs; 0: none, no thread"
    )
    validation: dict[str, DatasetRef] = Field(
        default_factory=dict, description="named sets to evaluate; metrics are called NAME/loss and so on"
    )

    @property
    def components(self) -> tuple[MixtureComponent, ...]:
        """The mixture; `path` is a mixture of one."""
        if self.mixture is not None:
            return self.mixture
        assert self.path is not None
        return (MixtureComponent(path=self.path, split=self.split),)

    def problems(self, *, causal: bool) -> list[str]:
        """What does not fit together, with the model's direction too."""
        found = []
        if (self.path is None) == (self.mixture is None):
            given = "neither is given" if self.path is None else "both are given"
            found.append(f"data: {given}: set exactly one of data.path (one dataset) and data.mixture (several)")
        if self.mixture is not None and self.split != "train":
            found.append("data.split: belongs to data.path; give each dataset of data.mixture its own split")
        for name in self.validation:
            if not re.fullmatch(r"[\w.-]+", name) or name in METRIC_GROUPS:
                found.append(
                    f"data.validation: a set cannot be called {name!r}, metrics are called NAME/loss: take letters, "
                    f"digits, '_', '.' and '-', and none of {', '.join(METRIC_GROUPS)}"
                )
        names = [component_name(component) for component in self.mixture or ()]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            found.append(f"data.mixture: two datasets are called {', '.join(repeated)}: give each a `name` of its own")
        if not causal and self.masked_lm is None:
            found.append(
                "model.causal: false cannot be trained to predict the next token; set it to true, or set "
                "data.masked_lm ({} for BERT's 15 %)"
            )
        if causal and self.masked_lm is not None:
            found.append(
                "data.masked_lm: hidden tokens are restored from both sides; set model.causal to false, or "
                "data.masked_lm to null"
            )
        return found


def component_name(component: MixtureComponent) -> str:
    """What messages and MLflow call a dataset of a mixture."""
    suffix = "" if component.split == "train" else f"-{component.split}"
    return component.name or re.sub(r"[^\w.-]", "_", f"{component.path.name}{suffix}")


class TrainSection(StrictModel):
    """How much is trained, in which pieces, and in which precision."""

    tokens: PositiveInt = Field(description="length of the run; rounded up to whole steps")
    tokens_per_step: PositiveInt = Field(
        description="global batch in tokens: a multiple of seq_len × micro_batch × processes; accumulation follows"
    )
    micro_batch: PositiveInt = Field(default=1, description="sequences a process handles at once")
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16",
        description="bf16: parameters and activations in bfloat16, weights, gradients and states kept in float32",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1,
        description="what ZeRO partitions: 0 nothing, 1 optimizer states, 2 also gradients, 3 also parameters",
    )
    activation_checkpointing: Literal["none", "all"] | PositiveInt | tuple[NonNegativeInt, ...] = Field(
        default="none",
        description="layers that keep their input alone, and whose forward pass backward runs again: less memory, at "
        "most a third more time. none; all; a number k: layers 0, k, 2k, …; a list of layers, counted from 0",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none",
        description="optimizer: moments and float32 weights lie in the host's memory, where the update is computed (by "
        "all of its cores); all: with ZeRO-3 the parameters too, brought in layer by layer",
    )
    compile: bool = Field(
        default=False,
        description="torch.compile the model: the first step takes minutes, the others less time and memory. "
        "With ZeRO-3, whose hooks stand around modules, every layer is compiled by itself",
    )
    deterministic: bool = Field(
        default=False, description="on GPUs, deterministic algorithms only: slower, bit-exact resume"
    )
    mock_step: bool | None = Field(
        default=None,
        description="begin with a step on made-up tokens that is thrown away: too little memory is found before data "
        "and tracking start; compiling takes place then. null: on GPUs (where a CPU has too little, nothing is told)",
    )
    log_every: PositiveInt = Field(default=10, description="steps between progress lines")
    peak_tflops: PositiveFloat | None = Field(
        default=None,
        description="peak TFLOP/s of one device in this precision, for the model FLOP utilisation; "
        "default: known for common GPUs, no utilisation elsewhere",
    )


DecayRate = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(StrictModel):
    """AdamW (Loshchilov & Hutter 2019). Defaults are this project's; the paper's are not known with certainty."""

    lr: PositiveFloat = Field(default=7e-4, description="peak learning rate")
    betas: tuple[DecayRate, DecayRate] = Field(default=(0.9, 0.999), description="decay rates of the two moments")
    eps: PositiveFloat = Field(default=1e-6, description="added to the root of the second moment")
    weight_decay: float = Field(
        default=0.01, ge=0, description="applied to matrices only: never to scales, offsets or biases"
    )
    gradient_clip: float = Field(default=0.1, ge=0, description="largest global gradient norm; 0 turns clipping off")


class ScheduleSection(StrictModel):
    """Learning rate as a function of tokens seen, whatever the batch and the number of processes."""

    kind: Literal["linear", "cosine", "wsd"] = Field(
        default="linear", description="decay after warm-up: linear, cosine, or warm-up, stable, decay (linear)"
    )
    warmup_tokens: int = Field(default=0, ge=0, description="linear warm-up from 0")
    decay_tokens: int | None = Field(default=None, ge=0, description="wsd only: length of the final decay")
    final_fraction: float = Field(
        default=0.0, ge=0, le=1, description="learning rate at the end, as a fraction of the peak"
    )


class EvaluateSection(StrictModel):
    """When the validation sets are scored: whole, where data.validation does not say less."""

    every_tokens: PositiveInt | None = Field(
        default=None, description="tokens between evaluations; default: at the end only"
    )
    micro_batch: PositiveInt | None = Field(default=None, description="sequences at once; default: train.micro_batch")


class RunConfig(StrictModel):
    """A whole run."""

    run: RunSection
    model: ModelConfig
    data: DataSection
    train: TrainSection
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    bad_steps: BadStepsSection = BadStepsSection()
    watchdog: WatchdogSection = WatchdogSection()
    samples: SamplesSection = SamplesSection()
    layer_metrics: LayerMetricsSection = LayerMetricsSection()
    profile: ProfileSection = ProfileSection()
    tracking: TrackingSection = TrackingSection()
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="DeepSpeed settings merged last, e.g. zero_optimization.reduce_bucket_size"
    )

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return -(-self.train.tokens // self.train.tokens_per_step)

    @property
    def samples_per_step(self) -> int:
        """Windows in a step, over all processes."""
        return self.train.tokens_per_step // self.data.seq_len

    @property
    def mlflow_store(self) -> str:
        """Address of the MLflow store that records go to."""
        return self.tracking.uri or f"sqlite:///{self.run.dir / 'mlflow.db'}"

    @property
    def recomputed_layers(self) -> frozenset[int]:
        """Layers whose forward pass is run again in backward."""
        chosen, layers = self.train.activation_checkpointing, range(self.model.n_layers)
        if isinstance(chosen, tuple):
            return frozenset(chosen)
        if isinstance(chosen, int):
            return frozenset(layers[::chosen])
        return frozenset(layers if chosen == "all" else ())

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        problems = lint_deepspeed(self.deepspeed)
        train, data, schedule = self.train, self.data, self.schedule
        if train.tokens_per_step % (data.seq_len * train.micro_batch):
            unit = data.seq_len * train.micro_batch
            problems.append(
                f"train.tokens_per_step: {train.tokens_per_step:,} is not a multiple of data.seq_len × "
                f"train.micro_batch = {unit:,}; nearest: {_nearest_multiples(train.tokens_per_step, unit)}"
            )
        if train.precision == "bf16" and train.zero_stage == 0:
            problems.append("train.zero_stage: DeepSpeed supports stage 0 in fp32 only; use stage 1 with bf16")
        problems += self._memory_problems()
        problems += self._store_problems()
        if (schedule.kind == "wsd") != (schedule.decay_tokens is not None):
            problems.append("schedule.decay_tokens: required with schedule.kind: wsd, and with no other kind")
        planned = self.steps * train.tokens_per_step
        if schedule.warmup_tokens + (schedule.decay_tokens or 0) > planned:
            problems.append(f"schedule: warm-up and decay take more than the {planned:,} tokens of the run")
        if self.model.norm_length is not None and self.model.norm_length < data.seq_len:
            problems.append(
                f"model.norm_length: {self.model.norm_length} is shorter than data.seq_len {data.seq_len}; raise it"
            )
        problems += data.problems(causal=self.model.causal)
        problems += self._retention_problems()
        if self.samples.prompts and not self.model.causal:
            problems.append("samples.prompts: a bidirectional model (model.causal: false) cannot write; leave them out")
        problems += [
            f"{key}: {redact(value)}: holds a password or token, which would be written to the run directory and to "
            "MLflow; leave it out and give it by environment variables"
            for key, value in _texts(self.model_dump(mode="json"))
            if redact(value) != value
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _memory_problems(self) -> list[str]:
        stage, offload, layers = self.train.zero_stage, self.train.offload, self.model.n_layers
        found = []
        if beyond := sorted(layer for layer in self.recomputed_layers if layer >= layers):
            found.append(
                f"train.activation_checkpointing: there is no layer {beyond[0]}; the {layers} layers of the model are "
                f"0 to {layers - 1}"
            )
        if offload != "none" and stage == 0:
            found.append(f"train.offload: {offload} needs ZeRO: set train.zero_stage to 1, 2 or 3")
        elif offload == "all" and stage != 3:
            found.append(
                f"train.offload: all needs train.zero_stage 3 (it is {stage}): only there are parameters brought in "
                "when they are used; take 3, or offload: optimizer"
            )
        return found

    def _store_problems(self) -> list[str]:
        folder = str(self.run.dir.absolute())
        own = self.tracking.enabled and self.tracking.uri is None
        if not own or ("?" not in folder and unquote(folder) == folder):
            return []
        return [
            f"run.dir: {folder}: MLflow's sqlite file cannot lie there, since ? and %XX in its address mean something "
            "else; choose another name, or a store by tracking.uri"
        ]

    def _retention_problems(self) -> list[str]:
        best, saving, scoring = self.checkpoint.keep_best, self.checkpoint.every_tokens, self.evaluate.every_tokens
        if best is None:
            return []
        if best not in self.data.validation:
            named = ", ".join(self.data.validation) or "none is given"
            return [f"checkpoint.keep_best: {best!r} is no set of data.validation ({named})"]
        if saving is not None and (scoring is None or saving % scoring):
            return [
                f"checkpoint.keep_best: checkpoints would have no score of their step; make checkpoint.every_tokens "
                f"({saving:,}) a multiple of evaluate.every_tokens ({scoring or 'not set'})"
            ]
        return []


def load_run_config(path: str | Path, overrides: Sequence[str] = (), *, resume: bool = False) -> RunConfig:
    """Read a run's YAML file with its bases and `key=value` overrides; `resume` stands for `--resume`.

    Raises `UserError` with all problems at once. Paths are made absolute against the working directory; ~ is the home.
    """
    config = load_config(RunConfig, path, [*overrides, *(["run.resume=must"] if resume else [])])
    return _with_absolute_paths(config)


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    data, copy_to = config.data, config.checkpoint.copy_to
    paths: dict[str, Any] = {"validation": {name: _absolute(ref) for name, ref in data.validation.items()}}
    if data.mixture is None:
        paths["path"] = _from_home(data.components[0].path)
    else:
        paths["mixture"] = tuple(map(_absolute, data.mixture))
    return config.model_copy(
        update={
            "run": config.run.model_copy(
                update={
                    "dir": _from_home(config.run.dir),
                    "init_from": config.run.init_from and _from_home(config.run.init_from),
                }
            ),
            "data": data.model_copy(update=paths),
            "checkpoint": config.checkpoint.model_copy(update={"copy_to": copy_to and locate(copy_to)}),
        }
    )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text below `value`, with its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, f"{key}.{name}" if key else str(name))


def _absolute(ref: Any) -> Any:
    return ref.model_copy(update={"path": _from_home(ref.path)})


def _from_home(path: Path) -> Path:
    """An absolute path; a shell leaves the ~ of `run.dir=~/runs` as it is. ~name is a name where nobody has it."""
    return Path(os.path.expanduser(path)).absolute()


def accumulation_steps(config: RunConfig, world_size: int) -> int:
    """Micro batches each process accumulates for one step.

    Raises `UserError` that lists what would divide, if the global batch cannot be cut evenly over `world_size`.
    """
    train = config.train
    per_micro_step = config.data.seq_len * train.micro_batch * world_size
    if train.tokens_per_step % per_micro_step:
        sequences = config.samples_per_step
        worlds = [w for w in range(1, sequences + 1) if sequences % (w * train.micro_batch) == 0]
        raise UserError(
            f"train.tokens_per_step: {train.tokens_per_step:,} does not divide over {world_size} processes × "
            f"micro_batch {train.micro_batch} × seq_len {config.data.seq_len}: either tokens_per_step "
            f"{_nearest_multiples(train.tokens_per_step, per_micro_step)}, or one of {_listed(worlds)} processes"
        )
    return train.tokens_per_step // per_micro_step


def _nearest_multiples(value: int, unit: int) -> str:
    below, above = value // unit * unit, -(-value // unit) * unit
    return " or ".join(f"{multiple:,}" for multiple in (below, above) if multiple)


def _listed(numbers: list[int], most: int = 12) -> str:
    shown = ", ".join(str(number) for number in numbers[:most])
    return shown + (", …" if len(numbers) > most else "")
