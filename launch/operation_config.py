"""Sections of a run's configuration that keep it going: checkpoints, bad steps, the watchdog, MLflow."""

import os
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from pipeline.strict_yaml import StrictModel


class CheckpointSection(StrictModel):
    """When the run is saved, and what is kept."""

    every_tokens: PositiveInt | None = Field(
        default=None, description="tokens between checkpoints; default: at the end only"
    )
    keep: PositiveInt = Field(
        default=2,
        description="newest checkpoints kept; older ones are deleted after a new one counts, never the one that the "
        "run was resumed from",
    )
    keep_every_steps: PositiveInt | None = Field(
        default=None, description="of every so many steps the first checkpoint is kept for good; default: none"
    )
    keep_best: str | None = Field(
        default=None,
        description="a set of data.validation: the checkpoint with the lowest loss on it is kept; default: none",
    )
    copy_to: str | None = Field(
        default=None,
        description="directory or fsspec URL (s3://…) of this run's own, to which checkpoints are copied in the "
        "background; nothing is deleted there; default: none",
    )
    background: bool = Field(
        default=True,
        description="training goes on while a checkpoint is written, from a copy in host memory as large as the files "
        "of the node's processes; false: it waits, and nothing is copied",
    )
    export_model: bool = Field(
        default=True,
        description="also write model/ (float32 safetensors, config, tokenizer), which generate and others read",
    )


class BadStepsSection(StrictModel):
    """Steps that are not learnt from: they change neither weights nor optimizer, but count as steps and tokens."""

    budget: int = Field(
        default=3,
        ge=0,
        description="bad steps that are skipped among `budget_steps` steps; one more stops the run with status 70",
    )
    budget_steps: PositiveInt = Field(default=1000, description="steps over which `budget` counts")
    spike_threshold: PositiveFloat | None = Field(
        default=None,
        description="a loss further above the median of the last ones, in robust standard deviations, is bad too (20 "
        "is far); null: only a loss or gradient norm that is not finite",
    )
    spike_window: int = Field(
        default=100, ge=4, description="last losses that a loss is compared with, once there are as many"
    )
    rollback: bool = Field(
        default=False,
        description="a run that stopped over its budget and is resumed goes back to the checkpoint before the bad "
        "steps and passes over their samples. `--rollback` on the command line means this and run.resume=must",
    )


class WatchdogSection(StrictModel):
    """Seconds that a process may stay in a phase before the job ends with status 71; null: as long as it likes."""

    data: PositiveFloat | None = Field(default=300, description="waiting for the next step's batches")
    forward: PositiveFloat | None = Field(default=300, description="the forward pass of a micro batch")
    backward: PositiveFloat | None = Field(default=300, description="the backward pass of a micro batch")
    step: PositiveFloat | None = Field(default=300, description="the sums over all processes and the update")
    save: PositiveFloat | None = Field(default=1800, description="a checkpoint")
    evaluate: PositiveFloat | None = Field(default=300, description="a batch of a validation set")
    other: PositiveFloat | None = Field(
        default=1800, description="start, the whole first step (which compiles), waiting for others, the end"
    )


TRACKING_SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "azureml", "arn")
"""How the address of an MLflow store begins; a database may name its driver too, as in postgresql+psycopg."""


class TrackingSection(StrictModel):
    """MLflow. Records go to metrics.jsonl in the run directory first, whatever the server does."""

    enabled: bool = Field(default=True, description="send records to MLflow")
    uri: str | None = Field(
        default=None,
        description="store; default: sqlite in the run directory (mlflow.db). http://HOST:PORT is a server, "
        "sqlite:////PATH/mlflow.db a file that several runs can share, their artifacts beside it. A server's password "
        "or token is given by MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN",
    )
    experiment: str = Field(default="flash-pretrain", min_length=1, description="MLflow experiment")
    system_metrics_seconds: PositiveFloat | None = Field(
        default=10,
        description="interval at which each node's CPU, memory, disk, network and GPUs are sampled; null: they are not",
    )
    close_seconds: PositiveFloat = Field(
        default=60,
        description="how long the end of a run waits at most for MLflow to take what is left; it does not wait for a "
        "server that is dead",
    )

    @field_validator("uri")
    @classmethod
    def _of_a_store(cls, uri: str | None) -> str | None:
        """Found here, since a run does not wait for its store: it would train for weeks, and MLflow show nothing."""
        if uri is None:
            return None
        scheme, _, rest = uri.partition(":")
        no_file = scheme == "sqlite" and (not rest.startswith("///") or rest == "///")
        if scheme.partition("+")[0] not in TRACKING_SCHEMES or no_file:
            raise ValueError("no address of an MLflow store: take http://HOST:PORT or sqlite:////PATH/mlflow.db")
        if scheme == "sqlite":
            return f"sqlite:///{Path(os.path.expanduser(rest[3:])).absolute()}"
        return uri
