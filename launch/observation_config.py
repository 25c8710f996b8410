"""Sections of a run's configuration for those who want to look into it: samples, norms of layers, profiles."""

from typing import Literal

from pydantic import Field, PositiveInt

from pipeline.strict_yaml import StrictModel


class SamplesSection(StrictModel):
    """Text that a causal model writes after each evaluation: samples/ in the run directory, and MLflow."""

    prompts: tuple[str, ...] = Field(
        default=(), description="what it goes on from, each at the start of a document; none: nothing is written"
    )
    max_tokens: PositiveInt = Field(default=100, description="the most tokens that are written after a prompt")
    temperature: float = Field(default=0.8, ge=0, description="divides the logits; 0: always the likeliest token")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="draw from the likeliest tokens that reach this probability; null: all"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="of the draws alone: training has the same bits with or without them"
    )


class LayerMetricsSection(StrictModel):
    """Norms layer by layer, to see where a run goes wrong."""

    every_steps: PositiveInt | None = Field(
        default=None,
        description="steps between them: layers/grad_norm/… before clipping, which cost nothing, and root mean square "
        "and largest absolute value of each layer's output, layers/activation_rms/… and activation_max/…: one more "
        "forward pass, not compiled, of each process's first micro batch. null: none",
    )


class ProfileSection(StrictModel):
    """Where the time and the memory of single steps go."""

    steps: tuple[PositiveInt, ...] = Field(
        default=(),
        description="steps, counted from 1, of which torch.profiler writes a trace: profiles/rank0-step10.json.gz in "
        "the run directory, for https://ui.perfetto.dev or chrome://tracing. Those steps are slower, the next ones not",
    )
    memory_steps: tuple[PositiveInt, ...] = Field(
        default=(),
        description="GPU: steps of which all allocations are recorded: profiles/rank0-step10-memory.pickle, for "
        "https://pytorch.org/memory_viz",
    )
    memory_history: bool = Field(
        default=False,
        description="GPU: record allocations throughout, so that the snapshot of an out-of-memory error, which is "
        "written in any case, shows where each one came from; costs some speed and host memory",
    )
    ranks: Literal["first", "all"] = Field(default="first", description="which processes write traces and snapshots")
