"""Speed over context length, drawn from results: `python -m benchmarks.plot step.json … --out FILE`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import figure_file, read_results
from benchmarks.table import best_of
from pipeline.errors import UserError, run_command

INK, FAINT, GRID = "#22303c", "#8a96a1", "#e3e8ec"
LINES = {
    "FLASH": ("#1f5fa8", "-"),
    "FLASH in plain torch": ("#e08a1e", "-"),
    "FLASH-Quad": ("#7b9fc9", "-"),
    "Transformer++": ("#c0504d", "-"),
    "Transformer++, wide heads": ("#c0504d", ":"),
}


def draw(documents: Sequence[Mapping[str, Any]]) -> Any:
    """Return a matplotlib figure: tokens/s over context length, a panel for each size, a line for each group."""
    from matplotlib.figure import Figure

    rows_by_size: dict[str, list[Mapping[str, Any]]] = {}
    for document in documents:
        rows_by_size.setdefault(document["size"], []).extend(document["rows"])
    figure = Figure(figsize=(7.4 * len(rows_by_size), 5.0), facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(rows_by_size), squeeze=False)[0]
    for axes, (size, rows) in zip(panels, rows_by_size.items(), strict=True):
        _draw_size(axes, size, rows)
    machine = documents[0]["machine"]
    figure.supxlabel(
        f"training steps on one {machine['device']}: forward, backward, AdamW, bfloat16, compiled\n"
        f"torch {machine['torch']}, {machine['date'][:10]}",
        color=FAINT,
        fontsize=9,
    )
    return figure


def _draw_size(axes: Any, size: str, rows: Sequence[Mapping[str, Any]]) -> None:
    contexts = sorted({row["context"] for row in rows})
    for group, (color, style) in LINES.items():
        best = [row for context in contexts if (row := best_of(rows, group, context))]
        if not best:
            continue
        where = [row["context"] for row in best]
        speed = [row["tokens_per_second"] / 1e3 for row in best]
        axes.plot(where, speed, style, color=color, lw=2.6, marker="o", ms=4.5, solid_capstyle="round", label=group)
        if len(best) > 1:
            end, offset = (where[-1], speed[-1]), (9, 0)
            axes.annotate(f"{speed[-1]:,.0f}k", end, offset, textcoords="offset points", va="center", color=color)
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{context // 1024}k" if context >= 1024 else str(context) for context in contexts])
    axes.set_xlim(contexts[0] * 0.85, contexts[-1] * 1.5)
    axes.set_ylim(bottom=0)
    axes.minorticks_off()
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.set_xlabel("context length in tokens", color=INK, fontsize=10.5)
    axes.set_ylabel("thousand tokens per second", color=INK, fontsize=10.5)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="lower left")
    axes.set_title(f"Training speed, {size.upper()}", loc="left", color=INK, fontsize=13, fontweight="bold", pad=12)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="step.json")
    parser.add_argument("--out", type=figure_file, required=True, metavar="FILE", help=".png, .svg or .pdf")
    arguments = parser.parse_args()
    documents = []
    for file in arguments.files:
        documents.append(read_results(file, ["step"]))
        if all(row["status"] != "ok" for row in documents[-1]["rows"]):
            raise UserError(f"{file} has no row that was measured: there is nothing to draw")
    draw(documents).savefig(arguments.out, dpi=140)
    return 0


if __name__ == "__main__":
    run_command(main)
