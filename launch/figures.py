"""Figures of a run, drawn from its metrics.jsonl."""

from pathlib import Path
from typing import Any

from launch.records import whole_records


def loss_curves(metrics: Path) -> Any | None:
    """Training and validation loss over tokens as a matplotlib figure; None before anything was logged."""
    series: dict[str, dict[int, tuple[float, float]]] = {}
    for record in whole_records(metrics):
        values = record.get("metrics", {})
        for name, value in values.items():
            if name.endswith("/loss") and "train/tokens" in values:
                series.setdefault(name, {})[record["step"]] = (values["train/tokens"], value)
    if not series:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in sorted(series.items()):
        tokens, losses = zip(*(points[step] for step in sorted(points)), strict=True)
        validation = name != "train/loss"
        axes.plot(tokens, losses, label=name, marker="o" if validation else None, linewidth=2 if validation else 1)
    axes.set(xlabel="tokens", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure
