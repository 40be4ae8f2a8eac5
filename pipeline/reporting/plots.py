"""Plots as PNG files."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.files import appears_whole

COLOURS = {"teacher": "#555555", "student_before": "#b0b0b0", "sft": "#d98c3f", "distilled": "#2f6db3"}


def plot_curves(path: Path, metrics: dict[str, list[dict[str, float]]], results: dict[str, Any]) -> None:
    """Training losses over the steps, and the held-out divergence and bits per byte of every model."""
    losses = sorted({key for rows in metrics.values() for row in rows for key in row} - {"step", "loss", "learning_rate", "temperature", "gradient_norm"})
    bars = [("kl_to_teacher", "held-out KL to teacher (nats)"), ("bits_per_byte", "held-out bits per byte")]
    figure = Figure(figsize=(4 * (len(losses) + len(bars)), 3.6), layout="constrained")
    axes = figure.subplots(1, len(losses) + len(bars), squeeze=False)[0]
    for axis, loss in zip(axes, losses, strict=False):
        for name, rows in metrics.items():
            points = [(row["step"], row[loss]) for row in rows if loss in row]
            if points:
                steps, values = np.array(points).T
                axis.plot(steps, values, color=COLOURS[name], alpha=0.25, linewidth=0.8)
                axis.plot(steps, _smooth(values), color=COLOURS[name], label=name)
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


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean over about a twentieth of the run."""
    share = 1 / max(len(values) / 20, 1)
    smooth = np.empty(len(values))
    mean = values[0]
    for i, value in enumerate(values):
        mean += share * (value - mean)
        smooth[i] = mean
    return smooth
