"""The configuration of a data preparation."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.strict_yaml import StrictModel


class TextSource(StrictModel):
    """Plain text: one document a file."""

    type: Literal["text"]
    name: str = Field(default="text", description="Names the source in document ids and in the manifest.")
    path: str | tuple[str, ...] = Field(
        description="Files, directories, globs or fsspec URLs (or `package:NAME/DIR`: files of an installed package)."
    )
    pattern: str = Field(
        default="*.txt", description="Which files of a directory are read. .gz, .bz2, .xz and .zst are unpacked."
    )


class JsonlSource(StrictModel):
    """JSON lines: one document a line."""

    type: Literal["jsonl"]
    name: str = Field(default="jsonl", description="Names the source in document ids and in the manifest.")
    path: str | tuple[str, ...] = Field(description="Files, directories, globs, fsspec URLs or `package:NAME/DIR`.")
    pattern: str = Field(
        default="*.jsonl*", description="Which files of a directory are read. .gz, .bz2, .xz and .zst are unpacked."
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


class HubSource(StrictModel):
    """A dataset of the Hugging Face hub: one document a row of its parquet or JSON-lines files."""

    type: Literal["hub"]
    name: str = Field(default="hub", description="Names the source in document ids and in the manifest.")
    path: str = Field(description="The repository (`owner/name`), or a local directory laid out like one.")
    config: str | None = Field(default=None, description="The configuration (subset); null: the default one.")
    revision: str | None = Field(
        default=None,
        description="The commit (or branch, tag, refs/convert/parquet) to read; required for a repository.",
    )
    split: str = Field(default="train", description="The repository's split to read.")
    text_field: str = Field(default="text", description="The column that holds the document.")
    id_field: str | None = Field(
        default=None, description="The column that names the document; null: file and row number."
    )
    download: bool = Field(
        default=False,
        description="true: fetch the files into the `datasets` cache first (on a file system that all workers see); "
        "false: workers read them where they lie. The bytes of the shards are the same.",
    )


Source = Annotated[TextSource | JsonlSource | ParquetSource | DatasetsSource | HubSource, Field(discriminator="type")]


class NearDuplicates(StrictModel):
    """MinHash over word n-grams: of documents that resemble an earlier one, only the earlier one stays."""

    threshold: float = Field(default=0.8, gt=0, lt=1, description="Jaccard similarity from which documents are alike.")
    permutations: int = Field(default=128, ge=16, description="Hash values a document is described by.")
    ngram: int = Field(default=5, ge=1, description="Words in a row that count as one feature.")


class Clean(StrictModel):
    """What happens to a document's text before it is tokenized, in this order; all of it off unless asked for.

    Empty documents are always dropped; everything dropped is counted by reason in the manifest.
    """

    on_unreadable_file: Literal["error", "skip"] = Field(
        default="error", description="skip: files, or parts of files, that cannot be read are left out, counted."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="skip: rows without the field, null or not JSON are left out, counted."
    )
    on_invalid_utf8: Literal["error", "skip"] = Field(
        default="error", description="skip: such documents are left out, counted."
    )
    unicode: Literal["none", "NFC", "NFKC"] = Field(default="none", description="Unicode normalisation.")
    function: str | None = Field(
        default=None,
        description="`package.module:function` of one's own, called with (document id, text); returns the text to "
        "keep, or None to drop the document. The hash of its file counts as content.",
    )
    min_characters: int | None = Field(default=None, ge=1, description="Shorter documents are dropped.")
    max_characters: int | None = Field(default=None, ge=1, description="Longer documents are dropped.")
    min_letter_ratio: float | None = Field(
        default=None, gt=0, le=1, description="Least fraction of letters (with marks) among characters but white space."
    )
    max_digit_ratio: float | None = Field(
        default=None, ge=0, lt=1, description="Largest fraction of digits among characters but white space."
    )
    max_symbol_ratio: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="Largest fraction of characters that are no letter, mark, digit or white space.",
    )
    exact_duplicates: bool = Field(
        default=False, description="true: of documents with the same text in all sources, only the first stays."
    )
    near_duplicates: NearDuplicates | None = Field(default=None, description="Given: near duplicates are dropped.")

    @model_validator(mode="after")
    def _lengths_are_in_order(self) -> "Clean":
        if self.min_characters and self.max_characters and self.min_characters > self.max_characters:
            raise ValueError(f"min_characters {self.min_characters} is more than max_characters {self.max_characters}")
        return self


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
            if name == "train" or not is_split_name(name):
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
        """What the digest covers: everything but paths, for which relative names and hashes stand."""
        where: dict[str, Any] = {"sources": {"__all__": {"path", "download"}}, "tokenizer": {"path"}}
        return self.model_dump(mode="json", exclude_none=True, exclude=where)


class TaskResources(StrictModel):
    """What Ray reserves for each task."""

    num_cpus: float = Field(default=1.0, gt=0, description="Logical CPUs.")
    memory_bytes: int | None = Field(default=None, ge=1, description="Memory Ray sets aside; null: not counted.")
    resources: dict[str, float] = Field(
        default_factory=dict, description="Custom resources of the cluster, by name: where tasks may run."
    )
    retries: int = Field(default=20, ge=0, description="How often a task is run again whose worker died.")


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
    task: TaskResources = TaskResources()
    dropped_samples: int = Field(
        default=0, ge=0, description="How many dropped documents of each reason are shown in dropped.jsonl."
    )


class PrepareConfig(StrictModel):
    """A data preparation."""

    content: Content
    execution: Execution


def is_split_name(name: str) -> bool:
    """Whether a split, and with it its directory, may be called so: letters, digits, - and _."""
    return name.replace("-", "").replace("_", "").isalnum()
