"""A dataset's profile as one picture, drawn without a display. Places and sizes are in inches."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from pipeline.profile import Counts, Profile

_INK, _MUTED, _RULE, _FILL, _ACCENT = "#1f2933", "#6b7785", "#d5dbe1", "#4878a8", "#c8553d"
_WIDTH, _MARGIN, _GAP = 13.0, 0.4, 0.75
_PLOT_HEIGHT, _ROW, _HEADING = 2.9, 0.27, 0.62
_LEFT_WIDTH = 7.4
_RIGHT_WIDTH = _WIDTH - 2 * _MARGIN - _GAP - _LEFT_WIDTH
_TITLE_HEIGHT, _LABEL_HEIGHT, _SPACE = 0.95, 0.5, 0.35
_MOST_ROWS, _MOST_REASONS = 12, 24
_UNITS = ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k"))
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "text.parse_math": False,  # names may hold dollar signs
}


@dataclass(frozen=True)
class _Row:
    """A line of a table: a name, the size that its bar shows, and its cells."""

    name: str
    size: int
    cells: tuple[str, ...]


def draw(profile: Profile, file: BinaryIO) -> None:
    """Draw a profile as PNG into an open file."""
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Names in letters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        _Page(profile).figure.savefig(file, format="png")


class _Page:
    """Two plots above, tables below that are as high as their rows."""

    def __init__(self, profile: Profile) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        splits = _split_rows(profile)
        sources = _source_rows(profile)
        reasons = _merge_last([_Row(k, n, (f"{n:,}",)) for k, n in profile.dropped.items()], _MOST_REASONS, "reasons")
        left = 2 * _HEADING + (len(splits) + max(len(sources), 1)) * _ROW + _SPACE
        tables = max(left, _HEADING + max(len(reasons), 1) * _ROW)
        self.height = _TITLE_HEIGHT + _HEADING + _PLOT_HEIGHT + _LABEL_HEIGHT + _SPACE + tables + _MARGIN
        self.figure = Figure(figsize=(_WIDTH, self.height), dpi=130, facecolor="white")
        FigureCanvasAgg(self.figure)
        self._title(profile)

        right = _MARGIN + _LEFT_WIDTH + _GAP
        top = _TITLE_HEIGHT
        note = f"in tokens, with the end token; {_count(sum(profile.lengths.counts), 'document')}"
        self._heading(_MARGIN, top, "Document lengths", note)
        _plot_lengths(self._axes(_MARGIN + 0.55, top + _HEADING, _LEFT_WIDTH - 0.55, _PLOT_HEIGHT), profile)
        self._heading(right, top, "Vocabulary use", _counted_in(profile))
        _plot_vocabulary(self._axes(right + 0.55, top + _HEADING, _RIGHT_WIDTH - 0.55, _PLOT_HEIGHT), profile)

        top += _HEADING + _PLOT_HEIGHT + _LABEL_HEIGHT + _SPACE
        columns = ("tokens", "share", "documents", "bytes/token", "shards")
        self._heading(_MARGIN, top, "Splits", "")
        self._table(_MARGIN, top, _LEFT_WIDTH, splits, columns, "no splits")
        below = top + _HEADING + len(splits) * _ROW + _SPACE
        self._heading(_MARGIN, below, "Sources", "")
        unknown = "unknown: the manifest does not say which source the documents came from"
        self._table(_MARGIN, below, _LEFT_WIDTH, sources, (*columns[:4], ""), unknown)
        self._heading(right, top, "Dropped", _dropped_note(profile) if reasons else "")
        self._table(right, top, _RIGHT_WIDTH, reasons, ("",), "nothing was dropped")

    def _title(self, profile: Profile) -> None:
        total = profile.counts
        facts = [_count(total.documents, "document"), _count(total.tokens, "token")]
        facts.append("bytes of text unknown" if total.utf8_bytes is None else f"{total.utf8_bytes:,} bytes of text")
        facts.append(f"digest {profile.digest[:16]}…")
        self._text(_MARGIN, 0.38, _clip(profile.name, 80), fontsize=16, fontweight="bold")
        self._text(_MARGIN, 0.66, "   ·   ".join(facts), fontsize=9.5, color=_MUTED)

    def _text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Text on a baseline, y downwards from the top."""
        style = {"va": "baseline", **style}
        self.figure.text(x / _WIDTH, 1 - y / self.height, text, **style)

    def _heading(self, x: float, top: float, title: str, note: str) -> None:
        self._text(x, top + 0.2, title, fontsize=11, fontweight="bold")
        self._text(x, top + 0.42, note, fontsize=8.5, color=_MUTED)

    def _axes(self, x: float, top: float, width: float, height: float) -> Any:
        box = (x / _WIDTH, 1 - (top + height) / self.height, width / _WIDTH, height / self.height)
        return self.figure.add_axes(box)

    def _table(
        self,
        x: float,
        top: float,
        width: float,
        rows: Sequence[_Row],
        columns: Sequence[str],
        otherwise: str,
    ) -> None:
        """Rows of a name, a bar and cells that are right-aligned under their columns."""
        if not rows:
            self._text(x, top + _HEADING - 0.12, otherwise, color=_MUTED)
            return
        name_width, cell_width = 1.95, 0.88
        bar_width = width - name_width - len(columns) * cell_width
        ends = [x + width - (len(columns) - 1 - number) * cell_width for number in range(len(columns))]
        for end, column in zip(ends, columns, strict=True):
            self._text(end, top + 0.42, column, ha="right", fontsize=8.5, color=_MUTED)
        axes = self._axes(x + name_width, top + _HEADING - 0.1, bar_width, len(rows) * _ROW)
        axes.barh(range(len(rows)), [row.size for row in rows], color=_FILL, height=0.6)
        axes.set(xlim=(0, max(1, *(row.size for row in rows)) * 1.02), ylim=(len(rows) - 0.5, -0.5))
        axes.set_axis_off()
        axes.axvline(0, color=_RULE, linewidth=1.2)
        for number, row in enumerate(rows):
            y = top + _HEADING - 0.1 + (number + 0.5) * _ROW
            self._text(x, y, _clip(row.name), va="center_baseline")
            for end, cell in zip(ends, row.cells, strict=False):
                self._text(end, y, cell, va="center_baseline", ha="right")


def _split_rows(profile: Profile) -> list[_Row]:
    splits = profile.splits.items()
    total = profile.counts.tokens
    rows = [_Row(name, s.counts.tokens, (*_cells(s.counts, total), f"{s.shards:,}")) for name, s in splits]
    return _merge_last(rows, _MOST_ROWS, "splits")


def _source_rows(profile: Profile) -> list[_Row]:
    total = profile.counts.tokens
    rows = [_Row(name, counts.tokens, _cells(counts, total)) for name, counts in (profile.sources or {}).items()]
    return _merge_last(rows, _MOST_ROWS, "sources", total)


def _cells(counts: Counts, total: int) -> tuple[str, ...]:
    ratio = counts.bytes_per_token
    share = f"{counts.tokens / max(total, 1):.1%}"
    return _digits(counts.tokens), share, _digits(counts.documents), "unknown" if ratio is None else f"{ratio:.2f}"


def _merge_last(rows: list[_Row], most: int, what: str, total: int | None = None) -> list[_Row]:
    """At most `most` rows: of more the last ones are added up."""
    if len(rows) <= most:
        return rows
    rest = rows[most - 1 :]
    size = sum(row.size for row in rest)
    share = () if total is None else (f"{size / max(total, 1):.1%}",)
    return [*rows[: most - 1], _Row(f"{len(rest):,} more {what}", size, (_digits(size), *share))]


def _counted_in(profile: Profile) -> str:
    vocabulary = profile.vocabulary
    pieces = _count(vocabulary.size - vocabulary.special, "piece")
    if vocabulary.tokens == vocabulary.of_tokens:
        return f"{pieces}, counted in all {_short(vocabulary.tokens)} tokens"
    return f"{pieces}, counted in {_short(vocabulary.tokens)} of {_short(vocabulary.of_tokens)} tokens"


def _dropped_note(profile: Profile) -> str:
    dropped = sum(profile.dropped.values())
    return f"{_count(dropped, 'document')}, {dropped / (dropped + profile.counts.documents):.1%} of those read"


def _plot_lengths(axes: Any, profile: Profile) -> None:
    lengths = profile.lengths
    low, high = np.log10(lengths.edges[0]), np.log10(lengths.edges[-1])
    span = max(high - low, 0.3)
    axes.stairs(lengths.counts, lengths.edges, fill=True, color=_FILL, alpha=0.85)
    axes.set_xscale("log")
    # Room to the right for the longest document's label.
    axes.set_xlim(10 ** (low - 0.06 * span), 10 ** (high + 0.2 * span))
    _name_decades(axes.xaxis, fine=span < 2.5)
    highest = max(lengths.counts)
    axes.set_ylim(0, highest * 1.5)
    _whole_numbers(axes.yaxis)
    axes.set(xlabel="tokens", ylabel="documents")
    marks = {"median": lengths.median, "p90": lengths.p90, "p99": lengths.p99, "longest": lengths.maximum}
    # Downwards from the shortest: no line crosses a label.
    for row, (name, value) in enumerate(marks.items()):
        height = highest * (1.45 - 0.1 * row)
        axes.vlines(value, 0, height, color=_ACCENT, linewidth=1)
        place = {"xytext": (4, -3), "textcoords": "offset points", "va": "center"}
        axes.annotate(f"{name} {value:,}", (value, height), color=_ACCENT, fontsize=8.5, **place)


def _plot_vocabulary(axes: Any, profile: Profile) -> None:
    vocabulary = profile.vocabulary
    pieces = max(vocabulary.size - vocabulary.special, 1)
    occurrences = np.sort(vocabulary.occurrences[vocabulary.occurrences > 0])[::-1]
    axes.plot(np.arange(1, len(occurrences) + 1), occurrences, color=_FILL, linewidth=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, vocabulary.size * 1.3)
    # Room below the curve for the numbers.
    axes.set_ylim(0.7, max(int(occurrences[0]), 10) ** 1.05)
    for axis in (axes.xaxis, axes.yaxis):
        _name_decades(axis)
    axes.set(xlabel="pieces, the most frequent first", ylabel="times used")
    rows = [(f"used {times} or more times", f"{used:,}", used / pieces) for times, used in vocabulary.used.items()]
    rows[0] = ("used at all", *rows[0][1:])
    rows.append(("unused", f"{vocabulary.unused:,}", vocabulary.unused / pieces))
    rows.append(("tokens that spell one byte", "", vocabulary.byte_fallback_share))
    if vocabulary.unknown_tokens:
        share = vocabulary.unknown_tokens / max(vocabulary.tokens, 1)
        rows.append(("unknown tokens", f"{_short(vocabulary.unknown_tokens)}", share))
    for row, (label, count, share) in enumerate(rows):
        height = 0.04 + 0.075 * (len(rows) - 1 - row)
        for place, text, side in ((0.03, label, "left"), (0.62, count, "right"), (0.76, f"{share:.1%}", "right")):
            axes.text(place, height, text, transform=axes.transAxes, ha=side, va="bottom", fontsize=8.5)


def _name_decades(axis: Any, *, fine: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if fine else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(NullFormatter())


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))


def _short(value: float) -> str:
    """At most three digits and a unit; below a thousand the number itself."""
    for size, unit in _UNITS:
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"


def _digits(value: int) -> str:
    """As `_short`, but always three digits: under each other they compare."""
    for size, unit in _UNITS:
        if value >= size * 0.9995:
            return f"{value / size:#.3g}".removesuffix(".") + unit
    return f"{value}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _clip(text: str, most: int = 26) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
