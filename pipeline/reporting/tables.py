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
ABOUT = ("variant", "model", "seeds", "baseline")
"""What a row of a comparison has beside its figures."""
QUESTIONS = ("questions", "accuracy", "95 % interval", "chance", "calibration error", "Brier", "accuracy on the surer half")
COST = ("parameters (millions)", "weights (MB)", "peak memory (MB)", "forward pass (ms)", "of 8", "first token (ms)", "of 8", "tokens/s", "of 8")
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
        lines[-1] += f" {seen_note(seen)}"
    elif results["retention"]:
        lines[-1] += " Whether the training records have any of it is not known: the cache is without their text."
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
    cut = [f"{row['cut_prompts']:,} of {name}" for name, row in models.items() if row.get("cut_prompts")]
    note = ["", f"Prompts that were longer than the model reads, and lost their beginning: {', '.join(cut)}."] if cut else []
    return "\n".join([*_table("benchmark | model", QUESTIONS, cells), *note]) + "\n" if cells else ""


def cost_table(models: Mapping[str, dict[str, Any]]) -> str:
    """One row a model; empty where nothing was measured."""
    costs = {name: row["cost"] for name, row in models.items() if row.get("cost")}
    if not costs:
        return ""
    cells = {name: cost_cells(cost) for name, cost in costs.items()}
    return "\n".join([*_table("model", COST, cells), "", cost_note(next(iter(costs.values())))]) + "\n"


def cost_cells(cost: dict[str, Any]) -> list[str]:
    """Under COST. cost: what `models.cost` gives."""
    batches = cost["batches"]["1"], cost["batches"]["8"]
    return [
        f"{cost['parameters'] / 1e6:,.1f}",
        f"{cost['weights_mb']:,.1f}",
        f"{cost['peak_memory_mb']:,.0f}",
        *(f"{1e3 * batch[key]:,.0f}" for key in ("forward_seconds", "first_token_seconds") for batch in batches),
        *(f"{batch['tokens_per_second']:,.1f}" for batch in batches),
    ]


def cost_note(cost: dict[str, Any]) -> str:
    prompts = f"Prompts of {cost['prompt_tokens']} tokens, {cost['new_tokens']} new ones, one record at a time and 8; medians of 3 rounds (of what takes over 5 s: once)."
    return f"{prompts} What the teacher costs was measured where it was asked."


def seen_note(seen: dict[str, Any]) -> str:
    """seen: `seen_in_training` of results.json."""
    return f"Of {seen['of']:,} records and questions, {seen['records']:,} have {seen['words']} words in a row in common with the training records."


def _table(first: str, titles: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    lines = [f"| {first} | " + " | ".join(titles) + " |", "|---|" + "---|" * first.count("|") + "---:|" * len(titles)]
    return lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]


def figures_in(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a comparison's rows have figures of: QUALITY, and what some evaluation has beyond."""
    return [*QUALITY, *(key for key in (rows[0] if rows else {}) if key not in (*QUALITY, *ABOUT))]


def title(key: str) -> str:
    """A benchmark of questions is called what it is called."""
    return COLUMNS[key][0] if key in COLUMNS else key


def comparison_table(rows: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """As Markdown. rows: what `comparison.compared` gives."""
    keys = figures_in(rows)
    lines = ["| variant | seeds | " + " | ".join(in_markdown(title(key)) for key in keys) + " |", "|---|" + "---:|" * (len(keys) + 1)]
    for row in rows:
        cells = ["<br>".join(_lines(row, key)) for key in keys]
        lines.append(f"| {in_markdown(row['variant'])} | {row['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + "".join(f"\n{in_markdown(note)}\n" for note in _legend(rows, notes))


def comparison_text(rows: Sequence[dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """In aligned columns."""
    keys = figures_in(rows)
    cells = [[["variant"], ["seeds"], *([printable(title(key))] for key in keys)]]
    cells += [[wrap(printable(row["variant"]), NAME) or [""], [str(row["seeds"])], *(_lines(row, key) for key in keys)] for row in rows]
    widths = [max(_width(line) for row in cells for line in row[column]) for column in range(len(keys) + 2)]
    lines = []
    for row in cells:
        for n in range(max(map(len, row))):
            parts = [(cell[n] if n < len(cell) else "") for cell in row]
            padded = [(" " * (width - _width(part)), part) for part, width in zip(parts, widths, strict=True)]
            lines.append("  ".join(pad + part if column else part + pad for column, (pad, part) in enumerate(padded)).rstrip())
    return "\n".join(lines) + "\n" + "".join(f"\n{printable(note)}\n" for note in _legend(rows, notes))


def comparison_csv(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row of the table."""
    keys = figures_in(rows)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = ("interval_low", "interval_high", "difference", "difference_low", "difference_high", "difference_paired")
    writer.writerow(["variant", "seeds", *(f"{printable(key)}_{what}" for key in keys for what in (*SPREAD, *ends)), "model", "baseline"])
    for row in rows:
        values: list[Any] = []
        for key in keys:
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
    shown = [row[key] for row in rows for key in figures_in(rows) if row[key]]
    questions = ", of a benchmark over its questions" if any(key not in COLUMNS for key in figures_in(rows)) else ""
    said = []
    if any(figure["lowest"] < figure["highest"] for figure in shown):
        said.append("(lowest–highest over the seeds)")
    if any(figure["interval"] for figure in shown):
        said.append(f"[95 % interval: bootstrap over the held-out records{questions}, and over the seeds where there are several]")
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
