"""Results as Markdown: `python -m benchmarks.table FILE.json …`."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.loop_table import loop_report
from benchmarks.report import machine_lines, markdown_table, number, read_results
from benchmarks.soak import soak_report
from pipeline.errors import run_command


def best_of(rows: Sequence[Mapping[str, Any]], group: str, context: int) -> Mapping[str, Any] | None:
    """Return the fastest measured row of a group at a context."""
    measured = [row for row in rows if row["status"] == "ok" and (row["group"], row["context"]) == (group, context)]
    return max(measured, key=lambda row: float(row["tokens_per_second"]), default=None)


def step_report(document: Mapping[str, Any]) -> str:
    """Return the tables of a `benchmarks.step` document."""
    parts = [f"Training step, size {document['size']}, compiled: {document['compile']}"]
    parts.append("\n".join([*machine_lines(document["machine"]), *document["dispatch"]]))
    if document["rows"]:
        parts.append(_step_table(document))
        parts.append("\n".join(_ratios(document["rows"])))
    if "profile" in document:
        parts.append(_profile_table(document["profile"]))
    return "\n\n".join(part for part in parts if part)


def _step_table(document: Mapping[str, Any]) -> str:
    rows, machine = document["rows"], document["machine"]
    sheet = machine["data_sheet_tflops"]
    cells = []
    for row in rows:
        start = [row["title"], f"{row['context']:,}"]
        if row["status"] != "ok":
            cells.append([*start, row["status"], *["–"] * 7])
            continue
        peer = best_of(rows, "Transformer++", row["context"])
        cells.append(
            [
                *start,
                f"{row['tokens_per_step']:,}",
                number(row["ms"]),
                number(row["tokens_per_second"], ",.0f"),
                number(row["tokens_per_second"] / peer["tokens_per_second"] if peer else None, ".2f"),
                number(row["peak_gib"]),
                number(row["model_tflops"]),
                number(100 * row["model_tflops"] / machine["matmul_tflops"], ".1f"),
                number(sheet and 100 * row["model_tflops"] / sheet, ".1f"),
            ]
        )
    header = ["model", "context", "tokens/step", "ms", "tokens/s", "× T++", "GiB", "TFLOP/s", "MFU %", "of sheet %"]
    return markdown_table(header, cells)


def _ratios(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    contexts = sorted({row["context"] for row in rows})
    for context in contexts:
        flash = best_of(rows, "FLASH", context)
        compared = []
        for group in ("Transformer++", "Transformer++, wide heads", "FLASH in plain torch"):
            peer = best_of(rows, group, context)
            if flash and peer:
                ratio = flash["tokens_per_second"] / peer["tokens_per_second"]
                compared.append(f"{ratio:.2f}× {peer['title']}")
        if compared:
            yield f"{context:,}: FLASH is {', '.join(compared)}"
    measured = [best for context in contexts if (best := best_of(rows, "FLASH", context))]
    if len(measured) > 1:
        share = measured[-1]["tokens_per_second"] / measured[0]["tokens_per_second"]
        yield f"FLASH at {measured[-1]['context']:,} has {share:.1%} of its speed at {measured[0]['context']:,}"


def _profile_table(profile: Mapping[str, Any]) -> str:
    groups = [stage for stage in profile["stages"] if "inside" not in stage]
    total = sum(stage["ms"] for stage in groups)
    cells = []
    for stage in profile["stages"]:
        floor = stage["floor_ms"]
        cells.append(
            [
                f"· {stage['stage']}" if "inside" in stage else stage["stage"],
                number(stage["calls"], ",.0f"),
                number(stage["ms"], ".2f"),
                number(100 * stage["ms"] / total if total else None, ".1f"),
                number(floor, ".2f"),
                number(stage["ms"] / floor if floor else None, ".2f"),
            ]
        )
    cells.append(["all kernels", "", number(total, ".2f"), "", "", ""])
    title = (
        f"A step of {profile['title']} at {profile['context']:,}, {profile['tokens_per_step']:,} tokens: "
        f"{profile['ms']:.1f} ms without the profiler"
    )
    return title + "\n\n" + markdown_table(["stage", "calls", "ms", "%", "floor ms", "× floor"], cells)


def op_report(document: Mapping[str, Any]) -> str:
    """Return the tables of a `benchmarks.op` document; two numbers in a cell: forward, forward + backward."""
    copy = document["machine"]["copy_gb_per_s"]
    parts = ["The ops alone", "\n".join([*machine_lines(document["machine"]), *document["dispatch"]])]
    for section in dict.fromkeys(row["section"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["section"] == section]
        compared = next(row["compared"] for row in rows)
        header = ["forward / forward + backward of", "B × T", "ms", "TFLOP/s", "GB/s", "% of copy", compared]
        parts.append(f"{section}\n\n{markdown_table(header, [_op_cells(row, copy) for row in rows])}")
    if document["left_out"]:
        parts.append(f"Left out, no time: {'; '.join(document['left_out'])}")
    return "\n\n".join(parts)


def _op_cells(row: Mapping[str, Any], copy: float) -> list[str]:
    passes = [row[name] for name in ("forward", "both") if name in row]

    def pair(form: str, values: Sequence[float | None]) -> str:
        return " / ".join(number(value, form) for value in values) or "–"

    traffic = [measured["gb_per_s"] for measured in passes]
    return [
        row["case"],
        f"{row['B']} × {row['T']:,}",
        pair(",.3f", [measured["ms"] for measured in passes]),
        pair(",.0f", [measured["tflops"] for measured in passes]),
        pair(",.0f", traffic) if any(traffic) else "–",
        pair(".0f", [rate and 100 * rate / copy for rate in traffic]) if any(traffic) else "–",
        pair(".2f", [measured["ratio"] for measured in passes]) if row["status"] == "ok" else row["status"],
    ]


def tracking_report(document: Mapping[str, Any]) -> str:
    """Return the tables of a `benchmarks.tracking` document."""
    placed = "all processes share all processors" if document["together"] else "the trainer has a processor of its own"
    title = (
        f"A training step by where its record goes: {document['rounds']} blocks of {document['steps']} steps each in "
        f"turns, {placed}; a slow server is {document['slow_seconds']:g} s late each way"
    )
    cells = []
    for row in document["rows"]:
        share = row["cpu_share"]
        cells.append(
            [
                row["place"],
                number(row["wall"]["ms"], ".2f"),
                _more(row["wall"]),
                number(row["processor"]["ms"], ".2f"),
                _more(row["processor"]),
                number(row["record_ms"], ".3f"),
                number(row["start_cpu_seconds"]),
                number(share and 100 * share),
                number(row["close_seconds"]),
            ]
        )
    header = ["record", "step, ms", "% more", "CPU, ms", "% more", "record, ms"]
    header += ["sender's start, CPU s", "then, % of a core", "end, s"]
    backlog = [
        [
            row["store"],
            f"{row['points']:,}",
            number(row["seconds"]),
            number(row["points_per_second"], ",.0f"),
            number(row["restart_seconds"], ".2f"),
        ]
        for row in document["backlog"]
    ]
    files = document["files"]
    reading = (
        f"metrics.jsonl of {files['steps']:,} steps, {files['megabytes']:,.0f} MB: read from the start in "
        f"{files['read_seconds']:.1f} s; what a restart reads of it takes {files['last_record_ms']:.2f} ms"
    )
    sent = ["a backlog sent to", "points", "s", "points/s", "then a restart, s"]
    return "\n\n".join(
        [
            title,
            "\n".join(machine_lines(document["machine"])),
            markdown_table(header, cells),
            markdown_table(sent, backlog),
            reading,
        ]
    )


def _more(compared: Mapping[str, Any]) -> str:
    """Percent above the base, with the 95 % interval."""
    shown = [f"{100 * (ratio - 1):+.2f}" for ratio in (compared["ratio"], *compared["ratio_interval"])]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def memory_report(document: Mapping[str, Any]) -> str:
    """Return the table of a `benchmarks.memory` document."""
    cells = []
    for row in document["rows"]:
        peak, planned, measured = row.get("peak_gib"), row["planned_gib"], row["status"] == "ok"
        cells.append(
            [
                f"{row['size']}, {row['setting']}",
                f"{row['parameters'] / 1e6:,.1f} M",
                f"{row['tokens_per_micro_batch']:,}",
                number(peak) if measured else row["status"],
                number(planned),
                number(planned / peak if measured and peak else None, ".2f"),
                number(row["tokens_per_second"] if measured else None, ",.0f"),
            ]
        )
    header = ["size, setting", "parameters", "tokens/micro batch", "GiB", "planned GiB", "planned / GiB", "tokens/s"]
    title = f"Memory of training, bf16, one device, compiled: {'yes' if document['compile'] else 'no'}"
    return "\n\n".join([title, "\n".join(machine_lines(document["machine"])), markdown_table(header, cells)])


def convergence_report(document: Mapping[str, Any]) -> str:
    """Return the table of a `benchmarks.convergence` document."""
    cells = [
        [
            row["dtype"],
            number(row["loss_reference"], ".4f"),
            number(row["loss_kernels"], ".4f"),
            number(row["difference"], "+.5f"),
            number(row["noise"], ".5f"),
            number(100 * row["share_within_two_noises"], ".0f"),
        ]
        for row in document["summary"]
    ]
    steps, seeds = len(document["runs"][0]["losses"]), len({run["seed"] for run in document["runs"]})
    title = (
        f"Loss of the last quarter of {steps} steps, nats per token, mean of {seeds} seeds; noise: the standard "
        "deviation that other initial weights make"
    )
    header = ["dtype", "reference", "kernels", "difference", "noise", "% of steps within two"]
    return "\n\n".join([title, "\n".join(machine_lines(document["machine"])), markdown_table(header, cells)])


REPORTS = {
    "step": step_report,
    "op": op_report,
    "convergence": convergence_report,
    "loop": loop_report,
    "memory": memory_report,
    "tracking": tracking_report,
    "soak": soak_report,
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    for file in parser.parse_args().files:
        document = read_results(file, REPORTS)
        print(REPORTS[document["benchmark"]](document), end="\n\n")
    return 0


if __name__ == "__main__":
    run_command(main)
