"""Results on disk and on the screen: one JSON document, and Markdown tables drawn from it."""

import argparse
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

FIGURES = (".png", ".svg", ".pdf")


def results_file(text: str) -> Path:
    """An argument that names a file to be written, for argparse: what is wrong with it shows before the measurements.

    Its directory is made.
    """
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path.parent} cannot be made a directory: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written: name a file in a directory of yours")
    return path


def figure_file(text: str) -> Path:
    """`results_file` of a figure."""
    if Path(text).suffix not in FIGURES:
        raise argparse.ArgumentTypeError(f"{text} is no {', '.join(FIGURES[:-1])} or {FIGURES[-1]}")
    return results_file(text)


def read_results(path: Path, benchmarks: Collection[str]) -> dict[str, Any]:
    """Read what `write_results` wrote; `UserError` when that is not possible or not of one of the benchmarks."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    benchmark = document.get("benchmark") if isinstance(document, dict) else None
    if benchmark not in benchmarks:
        raise UserError(f"{path} holds results of {benchmark}, not of {' or '.join(benchmarks)}")
    return dict(document)


def write_results(path: Path, document: Mapping[str, Any]) -> None:
    """Write `document` aside and rename it, so that what was measured survives a run that is cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(aside, path)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with aligned columns; the first is text, the others are right-aligned."""
    widths = [max(len(cells[column]) for cells in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {first[0]:<{first[1]}} | " + " | ".join(f"{cell:>{width}}" for cell, width in others) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """Say in words what was measured on."""
    sheet = machine["data_sheet_tflops"]
    ceilings = (
        f"copy {machine['copy_gb_per_s']:,.0f} GB/s, bf16 product {machine['matmul_tflops']:,.0f} TFLOP/s measured"
    )
    return [
        f"{machine['device']}, driver {machine['driver'] or 'none'}; torch {machine['torch']}, CUDA "
        f"{machine['cuda'] or 'none'}, triton {machine['triton'] or 'none'}",
        f"{ceilings}{f', {sheet:,.0f} by data sheet' if sheet else ''}; {machine['date']}, "
        f"commit {machine['commit'] or 'unknown'}",
    ]


def number(value: float | None, form: str = ",.1f") -> str:
    """Format a number; a dash where there is none."""
    return "–" if value is None else format(value, form)


class DispatchLog(logging.Handler):
    """Collects, in `lines`, what the ops say about the implementation that they run."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logger = logging.getLogger("flash_model.ops")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
