"""What `benchmarks.pipeline` compares this project with: SentencePiece alone, Megatron-LM's loop, datatrove."""

import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pipeline_corpus import documents_of

_MEGATRON_CHUNK = 32  # documents handed to a process of the pool at once


def _encode_bare(
    model: str, files: Sequence[Path], kind: str, share: tuple[int, int], ready: Any, results: Any
) -> None:
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)
    mine = [text for i, text in enumerate(documents_of(files)) if i % share[1] == share[0]]
    ready.wait()
    began = time.perf_counter()
    tokens = sum(len(tokenizer.encode(text, out_type=int if kind == "list" else "numpy")) for text in mine)
    results.put((time.perf_counter() - began, tokens, len(mine)))


def measure_bare(model: Path, files: Sequence[Path], kind: str, workers: int) -> dict[str, Any]:
    """Encode in `workers` processes, each with its documents in memory before the clock starts."""
    context = multiprocessing.get_context("spawn")
    ready, results = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(target=_encode_bare, args=(str(model), files, kind, (i, workers), ready, results))
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {"seconds": max(item[0] for item in found), "tokens": sum(item[1] + item[2] for item in found)}


_megatron_tokenizer: Any = None


def _start_megatron(model: str) -> None:
    import sentencepiece

    global _megatron_tokenizer
    _megatron_tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode_megatron(line: str) -> list[int]:
    ids: list[int] = _megatron_tokenizer.encode(json.loads(line)["text"])
    return [*ids, _megatron_tokenizer.eos_id()]


def measure_megatron(model: Path, files: Sequence[Path], workers: int, folder: Path) -> dict[str, Any]:
    """JSON lines → pool of `workers` → one indexed dataset, as Megatron-LM's preprocessing describes itself."""
    from pipeline.shards import ShardWriter

    lines, tokens = folder / "megatron.jsonl", 0
    with open(lines, "w") as file:
        for text in documents_of(files):
            file.write(json.dumps({"text": text}) + "\n")
    vocab_size = 1 << 15
    began = time.perf_counter()
    pool = multiprocessing.get_context("spawn").Pool(workers, _start_megatron, (str(model),))
    with pool, open(lines) as file, ShardWriter(folder / "megatron", vocab_size) as writer:
        for ids in pool.imap(_encode_megatron, file, _MEGATRON_CHUNK):
            writer.append(np.array(ids), np.array([len(ids)]))
            tokens += len(ids)
    seconds = time.perf_counter() - began
    lines.unlink()
    return {"seconds": seconds, "tokens": tokens}


def _write_fast_tokenizer(model: Path, target: Path) -> None:
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # type: ignore[import-not-found, unused-ignore]

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    scored = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.vocab_size())]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=pieces.unk_id(), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    tokenizer.save(str(target))


def measure_datatrove(model: Path, files: Sequence[Path], workers: int, folder: Path) -> dict[str, Any] | None:
    """datatrove's reader and tokenizer step in `workers` local tasks; None where it is not installed."""
    try:
        import loguru  # type: ignore[import-not-found, unused-ignore]
        from datatrove.executor import LocalPipelineExecutor  # type: ignore[import-not-found, unused-ignore]
        from datatrove.pipeline.readers import ParquetReader  # type: ignore[import-not-found, unused-ignore]
        from datatrove.pipeline.tokens import DocumentTokenizer  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    loguru.logger.disable("datatrove")
    _write_fast_tokenizer(model, folder / "tokenizer.json")
    output = folder / "datatrove"
    began = time.perf_counter()
    LocalPipelineExecutor(
        pipeline=[
            ParquetReader(str(files[0].parent), id_key="id"),
            DocumentTokenizer(
                str(output),
                tokenizer_name_or_path=str(folder / "tokenizer.json"),
                eos_token="</s>",
                shuffle_documents=True,
                batch_size=100,  # of its default, 10,000 documents, whole books take 12 GB a process
            ),
        ],
        tasks=workers,
        workers=workers,
        logging_dir=str(folder / "datatrove-logs"),
    ).run()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": sum(file.stat().st_size for file in output.rglob("*.ds")) // 2}
