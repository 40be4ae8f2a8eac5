"""Results as tables: text, Markdown and CSV."""

import csv
import io
from collections.abc import Sequence
from textwrap import wrap
from typing import Any
from unicodedata import combining, east_asian_width

COLUMNS = {
    "bits_per_byte": ("bits per byte", "{:.3f}"),
    "kl_to_teacher": ("KL to teacher (nats)", "{:.3f}"),
    "top1_agreement": ("top-1 agreement", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "accuracy_interval": ("95 % interval", "{}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
    "peak_memory_mb": ("peak memory (MB)", "{:,.0f}"),
}


QUALITY = ("kl_to_teacher", "bits_per_byte", "top1_agreement", "accuracy")
SPREAD = ("mean", "lowest", "highest", "deviation")
NOTHING = "–"
NAME = 36
"""Columns that a name may take before it goes on in the next line."""
MARKS = {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {mark: f"\\{mark}" for mark in "\\|*_`[]#~"}


def results_table(results: dict[str, Any]) -> str:
    """One row a model; what a model was not measured for is a dash."""
    present = {key: column for key, column in COLUMNS.items() if any(key in row for row in results["models"].values())}
    lines = ["| model | " + " | ".join(title for title, _ in present.values()) + " |", "|---|" + "---:|" * len(present)]
    for name, row in results["models"].items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(key), form) for key, (_, form) in present.items()) + " |")
    cache = results["cache"]
    lines += ["", f"Cache: {cache['tokens']:,} tokens, {cache['bytes_per_token']:.0f} bytes per token. Held out: {results['heldout_records']} records."]
    return "\n".join(lines) + "\n"


def comparison_table(rows: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """As Markdown. rows: what `comparison.compared` gives."""
    lines = ["| variant | seeds | " + " | ".join(COLUMNS[key][0] for key in QUALITY) + " |", "|---|" + "---:|" * (len(QUALITY) + 1)]
    for row in rows:
        cells = ["<br>".join(_lines(row, key)) for key in QUALITY]
        lines.append(f"| {_in_markdown(row['variant'])} | {row['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + "".join(f"\n{_in_markdown(note)}\n" for note in _legend(rows, notes))


def comparison_text(rows: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """In aligned columns."""
    cells = [[["variant"], ["seeds"], *([COLUMNS[key][0]] for key in QUALITY)]]
    cells += [[wrap(printable(row["variant"]), NAME) or [""], [str(row["seeds"])], *(_lines(row, key) for key in QUALITY)] for row in rows]
    widths = [max(_width(line) for row in cells for line in row[column]) for column in range(len(QUALITY) + 2)]
    lines = []
    for row in cells:
        for n in range(max(map(len, row))):
            parts = [(cell[n] if n < len(cell) else "") for cell in row]
            padded = [(" " * (width - _width(part)), part) for part, width in zip(parts, widths, strict=True)]
            lines.append("  ".join(pad + part if column else part + pad for column, (pad, part) in enumerate(padded)).rstrip())
    return "\n".join(lines) + "\n" + "".join(f"\n{printable(note)}\n" for note in _legend(rows, notes))


def comparison_csv(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row of the table."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = ("interval_low", "interval_high", "difference", "difference_low", "difference_high", "difference_paired")
    writer.writerow(["variant", "seeds", *(f"{key}_{what}" for key in QUALITY for what in (*SPREAD, *ends)), "model", "baseline"])
    for row in rows:
        values: list[Any] = []
        for key in QUALITY:
            figure = row[key] or {}
            difference = figure.get("difference") or {}
            values += [figure.get(what) for what in SPREAD]
            values += [*(figure.get("interval") or (None, None)), difference.get("mean"), *(difference.get("interval") or (None, None)), difference.get("paired")]
        writer.writerow([printable(row["variant"]), row["seeds"], *("" if value is None else value for value in values), row["model"], row["baseline"]])
    return text.getvalue()


def _lines(row: dict[str, Any], key: str) -> list[str]:
    """The figure and its spread; its interval; its difference from the baseline and whether that can be nothing."""
    figure = row[key]
    if figure is None:
        return [NOTHING]
    spread = f" ({figure['lowest']:.3f}–{figure['highest']:.3f})" if figure["lowest"] < figure["highest"] else ""
    lines = [f"{figure['mean']:.3f}{spread}"]
    if figure["interval"]:
        low, high = figure["interval"]
        lines.append(f"[{low:.3f}, {high:.3f}]")
    difference = figure["difference"]
    if difference and difference["interval"]:
        low, high = difference["interval"]
        lines.append(f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]{' *' if difference['excludes_zero'] else ''}")
    return lines


def _legend(rows: Sequence[dict[str, Any]], notes: Sequence[str]) -> list[str]:
    shown = [row[key] for row in rows for key in QUALITY if row[key]]
    said = []
    if any(figure["lowest"] < figure["highest"] for figure in shown):
        said.append("(lowest–highest over the seeds)")
    if any(figure["interval"] for figure in shown):
        said.append("[95 % interval: bootstrap over the held-out records, and over the seeds where there are several]")
    if any(figure["difference"] and figure["difference"]["interval"] for figure in shown):
        base = next(row["variant"] for row in rows if row["baseline"])
        said.append(f"+ or -: the difference from {base}; * its interval excludes 0")
    return [*(["; ".join(said) + "."] if said else []), *notes]


def _width(text: str) -> int:
    """Columns of a terminal."""
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in text if not combining(letter))


def printable(text: str) -> str:
    """On one line, and without what a terminal would obey."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _in_markdown(text: str) -> str:
    """A name cannot end a cell, begin a tag or set other type."""
    return "".join(MARKS.get(letter, letter) for letter in printable(text))


def _cell(value: Any, form: str) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, list):
        return "–".join(f"{part:.3f}" for part in value)
    return form.format(value)
