"""The text that `benchmarks.pipeline` prepares: parquet files, repeated under other ids."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import UserError

_DOCUMENTS_A_ROW_GROUP = 16


def repeat_corpus(corpus: Path, text_field: str, megabytes: float, target: Path) -> tuple[list[Path], int]:
    """Write `corpus` again and again under other ids; returns the files and the bytes of text in them."""
    import pyarrow
    from pyarrow import parquet

    sources = sorted(corpus.rglob("*.parquet"))
    if not sources:
        raise UserError(f"--corpus: {corpus} holds no .parquet file")
    schema = pyarrow.schema([("id", pyarrow.string()), ("text", pyarrow.large_string())])
    target.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    written, turn, wanted = 0, 0, megabytes * 1e6
    while written < wanted:
        for source in sources:
            if written >= wanted:
                break
            files.append(target / f"part-{turn:03d}-{source.stem}.parquet")
            with parquet.ParquetWriter(files[-1], schema) as writer:
                row = 0
                for batch in parquet.ParquetFile(source).iter_batches(_DOCUMENTS_A_ROW_GROUP, columns=[text_field]):
                    texts: list[str] = []
                    for text in batch.column(0).to_pylist():
                        if text and written < wanted:
                            texts.append(text)
                            written += len(text.encode())
                    if texts:
                        ids = [f"{turn}-{source.stem}-{row + i}" for i in range(len(texts))]
                        writer.write_table(pyarrow.table([ids, texts], schema))
                        row += len(texts)
        turn += 1
    return files, written


def documents_of(files: Sequence[Path]) -> Iterator[str]:
    """The texts of the repeated corpus."""
    from pyarrow import parquet

    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(_DOCUMENTS_A_ROW_GROUP, columns=["text"]):
            yield from batch.column(0).to_pylist()
