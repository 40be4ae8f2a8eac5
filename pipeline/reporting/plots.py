"""Plots as PNG files."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.files import appears_whole

COLOURS = {"teacher": "#555555", "student_before": "#b0b0b0", "sft": "#d98c3f", "distilled": "#2f6db3"}


def plot_curves(path: Path, metrics: dict[str, list[dict[str, float]]], results: dict[str, Any]) -> None:
    """Training losses over the steps, and the held-out divergence and bits per byte of every model."""
    losses = sorted(
        {key for rows in metrics.values() for row in rows for key in row}
        - {"step", "loss", "learning_rate", "temperature", "gradient_norm"}
        - {key for rows in metrics.values() for row in rows for key in row if "/" in key}
    )
    bars = [("kl_to_teacher", "held-out KL to teacher (nats)"), ("bits_per_byte", "held-out bits per byte")]
    figure = Figure(figsize=(4 * (len(losses) + len(bars)), 3.6), layout="constrained")
    axes = figure.subplots(1, len(losses) + len(bars), squeeze=False)[0]
    for axis, loss in zip(axes, losses, strict=False):
        for name, rows in metrics.items():
            points = [(row["step"], row[loss]) for row in rows if loss in row]
            if points:
                steps, values = np.array(points).T
                axis.plot(steps, values, color=COLOURS[name], alpha=0.25, linewidth=0.8)
                axis.plot(steps, smooth(values), color=COLOURS[name], label=name)
        axis.set(xlabel="optimizer step", ylabel="nats", title=f"training: {loss}")
        axis.legend(frameon=False)
    for axis, (key, title) in zip(axes[len(losses) :], bars, strict=True):
        heights = {name: row[key] for name, row in results["models"].items() if row.get(key) is not None}
        found = axis.bar(range(len(heights)), list(heights.values()), color=[COLOURS[name] for name in heights])
        axis.bar_label(found, fmt="%.2f")
        axis.set_xticks(range(len(heights)), [name.replace("_", "\n") for name in heights])
        axis.set(title=title)
        axis.margins(y=0.12)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    with appears_whole(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def plot_cache(path: Path, shown: dict[str, Any]) -> None:
    """How much of the teacher's mass is kept, and what a position's bytes go into. shown: what `inspection.cache` gives."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    mass, size = figure.subplots(1, 2, width_ratios=(1, 1.15))
    shares = [100 * row["share"] for row in shown["kept_mass"]]
    bars = mass.bar(range(len(shares)), shares, color=COLOURS["distilled"], width=0.86)
    mass.bar_label(bars, labels=[f"{share:.1f}" if share else "" for share in shares], padding=2, fontsize=9)
    mass.set_xticks(range(len(shares)), [f"{row['from']:g}–\n{row['to']:g}" for row in shown["kept_mass"]])
    mass.set(xlabel="probability mass of the kept tokens, temperature 1", ylabel="share of positions (%)")
    mass.set_title(f"kept mass: {shown['mean_kept_mass']:.3f} in {shown['mean_kept']:.1f} tokens on the average", fontsize=11)
    mass.margins(y=0.12)

    columns = shown["columns"][::-1]
    values = [row["per_position"] for row in columns]
    bars = size.barh(range(len(columns)), values, color=COLOURS["sft"], height=0.78)
    size.bar_label(bars, labels=[f"{row['per_position']:.2f} ({row['share']:.1%})" for row in columns], padding=3, fontsize=9)
    size.set_yticks(range(len(columns)), [row["column"] for row in columns])
    size.set(xlabel="bytes a position, compressed")
    size.set_title(f"logits and ranks files: {shown['bytes_per_position']:.1f} bytes a position", fontsize=11)
    size.margins(x=0.24)
    for axis in (mass, size):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{shown['teacher']}: {shown['positions']:,} positions of {shown['tokens']:,} tokens, {shown['records']:,} records", fontsize=12)
    with appears_whole(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def plot_attention(path: Path, shown: list[Any], id: str) -> None:
    """Each side's rows as a map, keys from left to right, on one scale of the weights' square root. shown: what `inspection_attention.sides` gives."""
    rows, width = shown[0].weights.shape
    figure = Figure(figsize=(min(24.0, 2.5 + len(shown) * max(3.5, 0.16 * width)), min(20.0, 1.8 + max(2.5, 0.16 * rows))), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    image = None
    for axis, side in zip(axes, shown, strict=True):
        image = axis.imshow(np.sqrt(side.weights), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set_title(side.title, fontsize=9)
        axis.set_xlabel("key")
        if width <= 120:
            axis.set_xticks(range(width), [name[:14] for name in side.tokens], rotation=90, fontsize=5, parse_math=False)
    axes[0].set_ylabel("query")
    if rows <= 120:
        axes[0].set_yticks(range(rows), [name[:14] for name in shown[0].queries], fontsize=5, parse_math=False)
    if image is not None:
        bar = figure.colorbar(image, ax=axes, shrink=0.7)
        bar.set_ticks([0, 0.1**0.5, 0.5, 0.5**0.5, 1], labels=["0", "0.1", "0.25", "0.5", "1"])
        bar.set_label("weight")
    figure.suptitle(id, fontsize=10, parse_math=False)
    with appears_whole(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean over about a twentieth of the run."""
    share = 1 / max(len(values) / 20, 1)
    smoothed = np.empty(len(values))
    mean = values[0]
    for i, value in enumerate(values):
        mean += share * (value - mean)
        smoothed[i] = mean
    return smoothed
