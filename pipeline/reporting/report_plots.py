"""The report's plots, as SVG that takes the page's colours."""

import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from math import ceil, pi
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import MaxNLocator

from pipeline.reporting.plots import smooth

INK = "#010203"
"""Of text, axes and grids: the page puts its own colour in its place."""
PALETTE = ("#2f74c0", "#d9772b", "#2e9b74", "#c2497a", "#8569c7", "#a0851c", "#2f9fc4", "#96603f")
GREY = "#8a8a8a"
POINTS = 400
"""That a curve is drawn with."""
NAME = 30
"""Letters in a line of a name."""
LETTER = 0.065
"""Of a panel's height."""


@dataclass(frozen=True)
class Look:
    """How a row of the table is shown everywhere."""

    letter: str
    name: str
    colour: str
    dashes: str = "-"


@dataclass(frozen=True)
class Bar:
    look: Look
    mean: float
    interval: tuple[float, float] | None
    values: list[float]
    """Of the single seeds."""


def looks(rows: Sequence[tuple[str, str]]) -> list[Look]:
    """One for each row, in their order. rows: name and model."""
    found, coloured = [], 0
    for number, (name, model) in enumerate(rows):
        letter = chr(ord("A") + number) if number < 26 else f"{chr(ord('A') + number // 26 - 1)}{chr(ord('A') + number % 26)}"
        if model == "distilled":
            found.append(Look(letter, name, PALETTE[coloured % len(PALETTE)], ("-", "--", "-.", ":")[coloured // len(PALETTE) % 4]))
            coloured += 1
        else:
            found.append(Look(letter, name, GREY, {"teacher": "-", "sft": "--"}.get(model, ":")))
    return found


def bars(panels: Sequence[tuple[str, Sequence[Bar]]]) -> Figure:
    """A panel a figure, a bar a row; its interval as a line, its seeds as circles."""

    def draw(axis: Axes, y: int, bar: Bar) -> None:
        axis.barh(y, bar.mean, height=0.62, color=bar.look.colour, alpha=0.55)
        if bar.interval:
            axis.plot(bar.interval, (y, y), color=INK, linewidth=1.3, solid_capstyle="butt", marker="|", markersize=6)
        if len(bar.values) > 1:
            axis.plot(bar.values, [y] * len(bar.values), linestyle="none", marker="o", markersize=2.8, color=INK, markerfacecolor="none", markeredgewidth=0.8)
        axis.annotate(f"{bar.mean:.3f}", (max([bar.mean, *(bar.interval or ()), *bar.values]), y), (4, 0), textcoords="offset points", va="center", fontsize=8)

    figure, axes = _rows_of_panels(panels, draw)
    for axis in axes:
        axis.margins(x=0.16)
        axis.set_xlim(left=0)
    return figure


def differences(panels: Sequence[tuple[str, Sequence[Bar]]]) -> Figure:
    """A panel a figure: each row's difference and its interval, around a line at 0."""

    def draw(axis: Axes, y: int, bar: Bar) -> None:
        low, high = bar.interval or (bar.mean, bar.mean)
        axis.plot((low, high), (y, y), color=bar.look.colour, linewidth=2.2, solid_capstyle="butt")
        axis.plot(bar.mean, y, marker="o", markersize=5.5, color=bar.look.colour, markerfacecolor=bar.look.colour if not low <= 0 <= high else "none", markeredgewidth=1.5)
        axis.annotate(f"{bar.mean:+.3f}".replace("-", "−"), (bar.mean, y), (0, 4.5), textcoords="offset points", ha="center", va="bottom", fontsize=8)

    figure, axes = _rows_of_panels(panels, draw)
    for axis in axes:
        axis.axvline(0, color=INK, linewidth=0.9, zorder=1)
        axis.margins(x=0.08)
    return figure


def _rows_of_panels(panels: Sequence[tuple[str, Sequence[Bar]]], draw: Callable[[Axes, int, Bar], None]) -> tuple[Figure, list[Axes]]:
    """Two panels beside each other, with the rows' names once."""
    every = list(dict.fromkeys(bar.look for _, found in panels for bar in found))
    across = min(len(panels), 2)
    down = ceil(len(panels) / across)
    names = [_name(look) for look in every]
    lines = sum(name.count("\n") + 1 for name in names)
    figure = Figure(figsize=(9.6, down * (0.75 + 0.2 * lines + 0.12 * len(every))), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False, sharey=True).ravel())
    for axis, (title, found) in zip(axes, panels, strict=False):
        for bar in found:
            draw(axis, every.index(bar.look), bar)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_yticks(range(len(every)), names, fontsize=8.5)
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.grid(axis="x", linewidth=0.6)
        axis.tick_params(axis="y", length=0)
    axes[0].set_ylim(len(every) - 0.4, -0.6)
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure, axes[: len(panels)]


def curves(panels: Sequence[tuple[str, Sequence[tuple[Look, Sequence[tuple[np.ndarray, np.ndarray]]]]]]) -> Figure:
    """A panel a loss; of each row the mean over seeds, smoothed, and the range. panels: title, and of each row its seeds' steps and values."""
    across = min(len(panels), 2)
    down = ceil(len(panels) / across)
    figure = Figure(figsize=(4.8 * across, 3.1 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for axis, (title, rows) in zip(axes, panels, strict=False):
        ends, lowest, highest = [], [], []
        for look, seeds in rows:
            steps = np.array(sorted(set.intersection(*(set(steps.tolist()) for steps, _ in seeds))))
            smoothed = np.stack([smooth(values)[np.isin(of, steps)] for of, values in seeds])
            shown = np.unique(np.linspace(0, len(steps) - 1, POINTS).round().astype(int))
            steps, smoothed = steps[shown], smoothed[:, shown]
            if len(seeds) > 1:
                axis.fill_between(steps, smoothed.min(0), smoothed.max(0), color=look.colour, alpha=0.15, linewidth=0)
            axis.plot(steps, smoothed.mean(0), color=look.colour, linestyle=look.dashes, linewidth=1.4, marker="o" if len(steps) == 1 else "")
            ends.append((look, float(smoothed.mean(0)[-1])))
            lowest.append(smoothed[:, len(steps) // 20 :].min())
            highest.append(smoothed[:, len(steps) // 20 :].max())
        axis.set_title(title, loc="left", fontsize=10, parse_math=False)
        axis.set_xlabel("optimizer step", fontsize=8.5)
        axis.grid(linewidth=0.6)
        low, high = min(lowest), max(highest)  # the very beginning may leave the frame
        axis.set_ylim(low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1))
        _letters_at_the_end(axis, ends)
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def lines(panels: Sequence[tuple[str, str, Sequence[str], Sequence[tuple[Look, Sequence[float | None]]]]]) -> Figure:
    """Two panels beside each other, a line a row. panels: title, what stands below, its places, and of each row the value at each place."""
    figure = Figure(figsize=(9.6, 3.1 * ceil(len(panels) / 2)), layout="constrained")
    axes = figure.subplots(ceil(len(panels) / 2), 2, squeeze=False).ravel()
    for axis, (title, below, places, rows) in zip(axes, panels, strict=False):
        ends = []
        for look, values in rows:
            known = [(place, value) for place, value in enumerate(values) if value is not None]
            if known:
                axis.plot(*zip(*known, strict=True), color=look.colour, linestyle=look.dashes, linewidth=1.4, marker="o", markersize=3)
                ends.append((look, known[-1][1]))
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel(below, fontsize=8.5)
        crowded = sum(map(len, places)) > 50
        axis.set_xticks(range(len(places)), places, rotation=35 if crowded else 0, ha="right" if crowded else "center")
        axis.set_xlim(-0.3, len(places) - 0.7)
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.grid(linewidth=0.6)
        if ends:
            _letters_at_the_end(axis, ends)
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def radar(titles: Sequence[str], rows: Sequence[tuple[Look, Sequence[float]]]) -> Figure:
    """A spoke a figure, a line a row; the circle at 1 is the teacher. Bars where two spokes or one would make no area."""
    if len(titles) < 3:
        return bars([(title, [Bar(look, values[number], None, []) for look, values in rows]) for number, title in enumerate(titles)])
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axis = figure.add_subplot(projection="polar")
    assert isinstance(axis, PolarAxes)
    angles = np.linspace(0, 2 * pi, len(titles), endpoint=False)
    closed = np.append(angles, angles[0])
    axis.set_theta_offset(pi / 2)
    axis.set_theta_direction(-1)
    axis.plot(np.linspace(0, 2 * pi, 200), np.ones(200), color=INK, linewidth=1.1)
    for look, values in rows:
        axis.plot(closed, [*values, values[0]], color=look.colour, linestyle=look.dashes, linewidth=1.6, marker="o", markersize=3)
    top = max(1.0, *(max(values) for _, values in rows))
    rings = np.arange(0.25, top + 0.26, 0.25) if top < 2 else np.linspace(0, ceil(top), 5)[1:]
    axis.set_ylim(0, max(1.05, top * 1.05))
    axis.set_yticks(rings[rings <= max(1.05, top * 1.05)], [f"{ring:.0%}" for ring in rings[rings <= max(1.05, top * 1.05)]], fontsize=7.5)
    axis.set_rlabel_position(180 / len(titles))
    axis.set_xticks(angles, [textwrap.fill(title, 16) for title in titles], fontsize=9)
    axis.tick_params(axis="x", pad=10)
    axis.grid(linewidth=0.6)
    axis.spines["polar"].set_visible(False)
    return figure


def reliability(rows: Sequence[tuple[Look, np.ndarray, float]]) -> Figure:
    """A small panel a row: how often the most likely token follows, by its probability; the bars are how many positions each bin has.

    rows: bins as `calibration` gives them, and the calibration error.
    """
    across = min(len(rows), 4)
    down = ceil(len(rows) / across)
    figure = Figure(figsize=(2.4 * max(across, 2), 2.4 * down + 0.45), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for axis, (look, bins, error) in zip(axes, rows, strict=False):
        positions, probability, followed = bins.T
        there = positions > 0
        middles = (np.arange(len(bins)) + 0.5) / len(bins)
        axis.bar(middles, positions / positions.sum(), width=0.8 / len(bins), color=look.colour, alpha=0.25)
        axis.plot((0, 1), (0, 1), color=INK, linewidth=0.8, linestyle=":")
        axis.plot(probability[there] / positions[there], followed[there] / positions[there], color=look.colour, marker="o", markersize=3.2, linewidth=1.2)
        axis.set_title(f"{look.letter}: error {error:.3f}", fontsize=9, loc="left")
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axis.grid(linewidth=0.6)
    for number, axis in enumerate(axes[: len(rows)]):
        axis.tick_params(labelbottom=number + across >= len(rows), labelleft=number % across == 0)
    figure.supxlabel("probability of the most likely token", fontsize=8.5)
    figure.supylabel("how often it follows", fontsize=8.5)
    for axis in axes[len(rows) :]:
        axis.remove()
    return figure


@contextmanager
def style(salt: str) -> Iterator[None]:
    """In which the plots are to be made and written."""
    settings: Any = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK) | {"grid.color": INK, "grid.alpha": 0.17, "axes.axisbelow": True}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "xtick.labelsize": 8, "ytick.labelsize": 8}
    settings |= {"svg.hashsalt": salt, "svg.fonttype": "path", "text.parse_math": False, "axes.facecolor": "none", "figure.facecolor": "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a letter that the font lacks: the page has the whole name
        yield


def as_svg(figure: Figure, name: str) -> str:
    """To stand in a page: no colours of its own but those of the rows, no addresses, and names inside that no other plot has."""
    text = StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| version="[^"]*"', "", svg, count=3).replace("xlink:href=", "href=")
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'(<svg [^>]*?)width="([\d.]+)pt" height="[\d.]+pt"', r'\1style="width: \2pt"', svg, count=1).replace("<svg ", '<svg role="img" ', 1)
    return svg.replace(INK, "currentColor")


def _name(look: Look) -> str:
    """Letter and name, on two lines at most; the letter alone where the font lacks one of the name's."""
    font = get_font(findfont("DejaVu Sans"))
    if any(not font.get_char_index(ord(letter)) for letter in look.name if letter.isprintable()):
        return look.letter
    lines = textwrap.wrap(look.name, NAME) or [""]
    if len(lines) > 2:
        lines = [lines[0], lines[1][: NAME - 1].rstrip() + "…"]
    return f"{chr(10).join(lines)}  {look.letter}"


def _letters_at_the_end(axis: Axes, ends: Sequence[tuple[Look, float]]) -> None:
    """Beside the curves' ends, apart where these are close."""
    low, high = axis.get_ylim()
    wanted = sorted(((end - low) / (high - low), number) for number, (_, end) in enumerate(ends))
    heights: list[float] = []
    for height, _ in wanted:
        heights.append(max(height, heights[-1] + LETTER) if heights else height)
    moved = float(np.mean([height - want for height, (want, _) in zip(heights, wanted, strict=True)]))
    moved = max(min(moved, heights[0]), heights[-1] - 1)  # around where they end, but inside the frame
    for (_, number), height in zip(wanted, heights, strict=True):
        look = ends[number][0]
        axis.annotate(look.letter, (1.01, height - moved), xycoords="axes fraction", va="center", fontsize=8.5, color=look.colour, fontweight="bold")
