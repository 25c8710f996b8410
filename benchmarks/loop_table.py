"""The tables of a `benchmarks.loop` document."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.report import machine_lines, markdown_table, number


def loop_report(document: Mapping[str, Any]) -> str:
    """Return the table of a `benchmarks.loop` document."""
    parts = ["The training loop", "\n".join([*machine_lines(document["machine"]), *document["dispatch"]])]
    if "loop" in document:
        parts += _loop_parts(document["loop"])
    if "checkpoints" in document:
        parts += _checkpoint_parts(document["checkpoints"])
    return "\n\n".join(parts)


def _loop_parts(loop: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{loop['parameters'] / 1e6:,.1f} M parameters, {loop['tokens_per_step']:,} tokens a step in windows of "
        f"{loop['seq_len']:,}, accumulation {loop['accumulation']}, {loop['precision']}, ZeRO {loop['zero_stage']}, "
        f"{'compiled' if loop['compile'] else 'not compiled'}, MLflow {'on' if loop['tracking'] else 'off'}; "
        f"{len(loop['bare_ms'])} blocks of {loop['block']} steps of each, in turn"
    )
    rows = [
        [title, *(number(value, ",.2f") for value in (statistics.median(ms), min(ms), max(ms)))]
        for title, ms in (("trainer", loop["trainer_ms"]), ("bare loop", loop["bare_ms"]))
    ]
    yield markdown_table(["ms a step", "median", "fastest block", "slowest block"], rows)
    yield f"overhead of the trainer, median over pairs of blocks: {loop['overhead']:+.2%}"


def _checkpoint_parts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        f"Checkpoints of {rows[0]['parameters'] / 1e9:,.2f} B parameters, {rows[0]['bytes'] / 2**30:,.2f} GiB; seconds "
        "(write, hash and fsync summed over threads)"
    )
    keys = ("stall", "copy", "export", "wait", "commit", "written", "write", "hash", "sync")
    cells = []
    for row in rows:
        beside = row["step_ms_beside"]
        cells.append(
            [
                "in the background" if row["background"] else "training waits",
                *(number(row[key], ",.2f") for key in keys),
                number(row["step_ms"], ",.0f"),
                number(beside, ",.0f"),
                number(row["peak_host_gib"]),
            ]
        )
    header = ["checkpoint", "training stands still", "copy", "export", "wait", "commit", "all written after"]
    yield markdown_table([*header, "write", "hash", "fsync", "step, ms", "beside it, ms", "host peak, GiB"], cells)
