"""See what a dataset holds: as tables with documents to read, as a picture, as JSON.

python -m pipeline.inspect DIR [--split S] [--samples N] [--figure FILE.png] [--json FILE]
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from pipeline.atomic import write_aside, write_json
from pipeline.errors import UserError, run_command
from pipeline.profile import SAMPLE_TOKENS, UNKNOWN, Lengths, Profile, profile_dataset

_PIPE_COLUMNS = 120


def print_profile(profile: Profile, console: Any | None = None) -> None:
    """Print a profile as tables and text to a rich console; default: the terminal, or what stands for it."""
    from rich.console import Console
    from rich.text import Text

    if console is None:
        # In a pipe or file rich would assume 80 columns, in which long numbers break.
        console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
    console.print(Text(f"{profile.name}  {profile.digest}", style="bold"))
    splits = [(name, split.counts, split.lengths, f"{split.shards:,}") for name, split in profile.splits.items()]
    if len(splits) > 1:
        shards = sum(split.shards for split in profile.splits.values())
        splits.append(("all", profile.counts, profile.lengths, f"{shards:,}"))
    console.print(
        _table(
            "Splits",
            ["split", "documents", "tokens", "text bytes", "bytes/token", "shards"],
            [[name, *counts.cells(), shards] for name, counts, _, shards in splits],
        )
    )
    console.print(
        _table(
            "Document lengths in tokens",
            ["split", "shortest", "median", "p90", "p99", "longest"],
            [[name, *_percentiles(lengths)] for name, _, lengths, _ in splits],
        )
    )
    if profile.sources is None:
        console.print(Text(f"Sources: {UNKNOWN} (the manifest does not record them)\n"))
    else:
        tokens = max(profile.counts.tokens, 1)
        rows = [[name, *counts.cells(), f"{counts.tokens / tokens:.1%}"] for name, counts in profile.sources.items()]
        console.print(
            _table("Sources", ["source", "documents", "tokens", "text bytes", "bytes/token", "of all tokens"], rows)
        )
    if profile.dropped:
        rows = [[reason, f"{count:,}"] for reason, count in profile.dropped.items()]
        console.print(_table("Dropped", ["reason", "documents"], rows))
    else:
        console.print(Text("Dropped: nothing\n"))
    console.print(_table(f"Vocabulary, in {looked_at(profile)}", ["pieces", ""], _vocabulary_rows(profile)))
    for sample in profile.samples:
        label = f"{sample.split}, document {sample.document:,}, {sample.tokens:,} tokens"
        console.print(Text(label, style="bold"))
        console.print(Text(sample.text + "\n"))


def looked_at(profile: Profile) -> str:
    """Says which tokens the vocabulary's use was counted in."""
    vocabulary = profile.vocabulary
    if vocabulary.tokens == vocabulary.of_tokens:
        return f"all {vocabulary.tokens:,} tokens"
    return f"a sample of {vocabulary.tokens:,} of {vocabulary.of_tokens:,} tokens"


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _percentiles(lengths: Lengths) -> list[str]:
    values = lengths.minimum, lengths.median, lengths.p90, lengths.p99, lengths.maximum
    return [f"{value:,}" for value in values]


def _vocabulary_rows(profile: Profile) -> list[list[str]]:
    vocabulary = profile.vocabulary
    pieces = vocabulary.size - vocabulary.special
    rows = [["in the vocabulary (special ones not counted)", f"{pieces:,}"]]
    for times, used in vocabulary.used.items():
        rows.append([f"used at least {times} time{'s' * (times > 1)}", f"{used:,} ({used / pieces:.1%})"])
    rows.append(["unused", f"{vocabulary.unused:,} ({vocabulary.unused / pieces:.1%})"])
    rows.append(["tokens that spell a single byte", f"{vocabulary.byte_fallback_share:.3%}"])
    if vocabulary.unknown_tokens:
        rows.append(["unknown tokens: text that is lost", f"{vocabulary.unknown_tokens:,}"])
    return rows


def save_figure(profile: Profile, path: Path) -> None:
    """Draw a profile into a PNG file, which appears whole or not at all."""
    from pipeline.profile_figure import draw

    with write_aside(path) as file:
        draw(profile, file)


def _writable(text: str) -> Path:
    path = Path(text).absolute()
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent}: no such directory; make it first")
    return path


def _png(text: str) -> Path:
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text}: a PNG file is written: let its name end in .png")
    return _writable(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: not a number of 0 or more")
    return int(text)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.inspect", description="See what a dataset holds.")
    parser.add_argument("directory", metavar="DIR", type=Path, help="the dataset: where manifest.json lies")
    parser.add_argument("--split", metavar="S", help="look at this split only; default: all of them")
    parser.add_argument("--samples", metavar="N", type=_count, default=3, help="documents to show; default: 3")
    parser.add_argument(
        "--sample-tokens",
        metavar="N",
        type=_count,
        default=SAMPLE_TOKENS,
        help="the most tokens to read for the vocabulary's use; default: 50 million",
    )
    parser.add_argument("--figure", metavar="FILE.png", type=_png, help="also draw it")
    parser.add_argument("--json", metavar="FILE", type=_writable, help="also write the numbers and samples as JSON")
    arguments = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # documents may hold what the terminal's encoding lacks
    profile = profile_dataset(
        arguments.directory,
        split=arguments.split,
        samples=arguments.samples,
        sample_tokens=max(arguments.sample_tokens, 1),
    )
    print_profile(profile)
    for name, path, write in (
        ("numbers", arguments.json, lambda path: write_json(path, profile.to_dict())),
        ("figure", arguments.figure, lambda path: save_figure(profile, path)),
    ):
        if path:
            try:
                write(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be written: {error.strerror}") from None
            print(f"{name}: {path}")
    return 0


if __name__ == "__main__":
    run_command(main)
