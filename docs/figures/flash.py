"""Draw docs/figures/flash.png, the picture in the README: which tokens FLASH reads by which path, and what that costs.

python docs/figures/flash.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle

from flash_model.config import ModelConfig, flops_per_token

INK, FAINT = "#22303c", "#8a96a1"
LOCAL, GLOBAL = "#1f5fa8", "#f7cf9b"
QUAD, SOFTMAX = "#7b9fc9", "#c0504d"

N_CHUNKS, CHUNK = 6, 6  # of the drawn sequence

D_MODEL, VOCABULARY, GAU_LAYERS = 768, 32_768, 24
CONTEXTS = [2**power for power in range(9, 18)]


def draw_pattern(axes: Axes) -> None:
    """Every square is one token that reads another: its own chunk directly, earlier chunks through their states."""
    length = N_CHUNKS * CHUNK
    for reader in range(N_CHUNKS):
        top = reader * CHUNK
        for read in range(reader):
            axes.add_patch(Rectangle((read * CHUNK, top), CHUNK, CHUNK, fc=GLOBAL, ec="white", lw=1.6))
        for row in range(CHUNK):
            for column in range(row + 1):
                axes.add_patch(Rectangle((top + column, top + row), 1, 1, fc=LOCAL, ec="white", lw=0.5))
    axes.add_patch(Polygon([(0, 0), (length, 0), (length, length)], closed=True, fc="#f4f6f8", ec="none", zorder=0))

    axes.text(
        0.3 * CHUNK,
        5 * CHUNK,
        "across chunks: linear.\nEarlier chunks are read as one\nstate, the mean of their $k^{\\top}v$",
        ha="left",
        va="center",
        color="#7a4a0c",
        fontsize=10.5,
        linespacing=1.4,
        bbox={"fc": GLOBAL, "ec": "none", "pad": 3},
    )
    axes.text(
        2.85 * CHUNK,
        0.9 * CHUNK,
        "inside a chunk: quadratic.\nEvery pair is scored,\n$\\mathrm{relu}^2(qk^{\\top}/C + b)$",
        ha="left",
        va="center",
        color=LOCAL,
        fontsize=10.5,
        linespacing=1.4,
    )
    axes.plot([2.55 * CHUNK, 2.85 * CHUNK], [2.3 * CHUNK, 1.55 * CHUNK], color=LOCAL, lw=1)
    axes.text(-0.4, length + 1.3, "token that is read →", color=FAINT, fontsize=9.5, va="top")
    axes.text(-0.9, 0, "← token that reads", color=FAINT, fontsize=9.5, rotation=90, ha="right", va="top")
    axes.set(xlim=(-2.4, length + 0.5), ylim=(length + 2.4, -0.5), aspect="equal")
    axes.axis("off")
    axes.set_title("Mixed chunk attention, causal", loc="left", color=INK, fontsize=13, fontweight="bold", pad=12)


def flash_cost(architecture: str, context: int) -> float:
    """Forward GFLOP per token of 24 gated attention units."""
    config = ModelConfig.model_validate(
        {
            "architecture": architecture,
            "vocab_size": VOCABULARY,
            "d_model": D_MODEL,
            "n_layers": GAU_LAYERS,
            "norm_length": context,
        }
    )
    return flops_per_token(config, context).forward / 1e9


def transformer_cost(context: int) -> float:
    """Forward GFLOP per token of a Transformer++ of the same size: a layer of 12 d² weights for every two units."""
    layer = 2 * 12 * D_MODEL**2 + 4 * context * D_MODEL / 2  # causal scores and their product with v count half
    return (GAU_LAYERS // 2 * layer + 2 * D_MODEL * VOCABULARY) / 1e9


def draw_cost(axes: Axes) -> None:
    """Cost of a token over the context length."""
    curves = {
        "Transformer++": (SOFTMAX, [transformer_cost(context) for context in CONTEXTS]),
        "FLASH-Quad": (QUAD, [flash_cost("flash_quad", context) for context in CONTEXTS]),
        "FLASH": (LOCAL, [flash_cost("flash", context) for context in CONTEXTS]),
    }
    for name, (color, costs) in curves.items():
        axes.plot(CONTEXTS, costs, color=color, lw=2.6, marker="o", ms=4.5, solid_capstyle="round")
        axes.annotate(
            f"{name}\n{costs[-1]:.2g} GFLOP",
            (CONTEXTS[-1], costs[-1]),
            (9, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=10.5,
            linespacing=1.35,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(
        CONTEXTS[::2], [f"{context // 1024}k" if context >= 1024 else str(context) for context in CONTEXTS[::2]]
    )
    axes.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
    axes.minorticks_off()
    axes.set_xlim(CONTEXTS[0] * 0.85, CONTEXTS[-1] * 1.15)
    axes.set_xlabel("context length in tokens", color=INK, fontsize=10.5)
    axes.set_ylabel("forward GFLOP per token", color=INK, fontsize=10.5)
    axes.grid(axis="y", color="#e3e8ec", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0, labelsize=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.set_title("What a token costs", loc="left", color=INK, fontsize=13, fontweight="bold", pad=12)
    axes.text(
        0,
        -0.2,
        f"computed from the formulas, not measured: d = {D_MODEL}, {GAU_LAYERS} units or {GAU_LAYERS // 2} layers, "
        f"chunk 256, {VOCABULARY // 1024}k vocabulary",
        transform=axes.transAxes,
        color=FAINT,
        fontsize=9,
    )


def main() -> None:
    """Draw and save."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12.4, 5.2), width_ratios=[1, 1.12], facecolor="white")
    draw_pattern(left)
    draw_cost(right)
    figure.subplots_adjust(left=0.02, right=0.885, top=0.9, bottom=0.17, wspace=0.16)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=140)


if __name__ == "__main__":
    main()
