"""Results as tables: text, Markdown and CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any
from unicodedata import combining, east_asian_width

COLUMNS = {
    "bits_per_byte": ("bits per byte", "{:.3f}"),
    "kl_to_teacher": ("KL to teacher (nats)", "{:.3f}"),
    "top1_agreement": ("top-1 agreement", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "accuracy_interval": ("95 % interval", "{}"),
    "token_accuracy": ("token accuracy", "{:.3f}"),
    "rougeL": ("ROUGE-L", "{:.3f}"),
    "bleu1": ("BLEU-1", "{:.1f}"),
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
    lines = _table("model", [title for title, _ in present.values()], {name: [_cell(row.get(key), form) for key, (_, form) in present.items()] for name, row in results["models"].items()})
    cache = results["cache"]
    lines += ["", f"Cache: {cache['tokens']:,} tokens, {cache['bytes_per_token']:.0f} bytes per token. Held out: {results['heldout_records']} records."]
    if seen := results["seen_in_training"]:
        lines[-1] += f" Of {seen['of']:,} records and questions, {seen['records']:,} have {seen['words']} words in a row in common with the training records."
    return "\n".join(lines) + "\n"


def tasks_table(models: Mapping[str, dict[str, Any]]) -> str:
    """One row a benchmark of questions and model: accuracy, and whether the model knew what it knew. Empty without such benchmarks."""
    rows = {
        f"{task} | {name}": figures
        for task in dict.fromkeys(task for row in models.values() for task in row.get("tasks", {}))
        for name, row in models.items()
        if (figures := row.get("tasks", {}).get(task))
    }
    cells = {
        name: [
            f"{figures['questions']:,}",
            *(_cell(figures.get(key), "{:.3f}") for key in ("accuracy", "accuracy_interval", "chance", "calibration_error", "brier")),
            _cell(figures.get("abstaining", {}).get("0.5"), "{:.3f}"),
        ]
        for name, figures in rows.items()
    }
    titles = ["questions", "accuracy", "95 % interval", "chance", "calibration error", "Brier", "accuracy on the surer half"]
    return "\n".join(_table("benchmark | model", titles, cells)) + "\n" if cells else ""


def cost_table(models: Mapping[str, dict[str, Any]]) -> str:
    """One row a model; empty where nothing was measured."""
    costs = {name: row["cost"] for name, row in models.items() if row.get("cost")}
    if not costs:
        return ""
    cells = {}
    for name, cost in costs.items():
        one, eight = cost["batches"]["1"], cost["batches"]["8"]
        cells[name] = [
            f"{cost['parameters'] / 1e6:,.1f}",
            f"{cost['weights_mb']:,.1f}",
            f"{cost['peak_memory_mb']:,.0f}",
            *(f"{1e3 * batch[key]:,.0f}" for key in ("forward_seconds", "first_token_seconds") for batch in (one, eight)),
            *(f"{batch['tokens_per_second']:,.1f}" for batch in (one, eight)),
        ]
    titles = ["parameters (millions)", "weights (MB)", "peak memory (MB)", "forward pass (ms)", "of 8", "first token (ms)", "of 8", "tokens/s", "of 8"]
    about = next(iter(costs.values()))
    note = f"Prompts of {about['prompt_tokens']} tokens, {about['new_tokens']} new ones, one record at a time and 8; medians of 3 rounds. What the teacher costs was measured where it was asked."
    return "\n".join([*_table("model", titles, cells), "", note]) + "\n"


def _table(first: str, titles: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    lines = [f"| {first} | " + " | ".join(titles) + " |", "|---|" + "---|" * first.count("|") + "---:|" * len(titles)]
    return lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]


def comparison_table(rows: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """As Markdown. rows: what `comparison.compared` gives."""
    lines = ["| variant | seeds | " + " | ".join(COLUMNS[key][0] for key in QUALITY) + " |", "|---|" + "---:|" * (len(QUALITY) + 1)]
    for row in rows:
        cells = ["<br>".join(_lines(row, key)) for key in QUALITY]
        lines.append(f"| {in_markdown(row['variant'])} | {row['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + "".join(f"\n{in_markdown(note)}\n" for note in _legend(rows, notes))


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


def in_markdown(text: str) -> str:
    """A name cannot end a cell, begin a tag or set other type."""
    return "".join(MARKS.get(letter, letter) for letter in printable(text))


def _cell(value: Any, form: str) -> str:
    if value is None:
        return NOTHING
    if isinstance(value, list):
        return "–".join(f"{part:.3f}" for part in value)
    return form.format(value)
