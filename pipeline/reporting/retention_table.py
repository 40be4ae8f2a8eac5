"""What the student kept of its teacher, as a table, if you like beside what others have published."""

from dataclasses import dataclass
from typing import Any

from pipeline.benchmarks._records import HELDOUT
from pipeline.benchmarks._retention import LEVEL
from pipeline.reporting.tables import NOTHING, in_markdown

FIGURES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "bleu1": "BLEU-1", "token_accuracy": "token accuracy", "bits_per_byte": "bits per byte", "perplexity": "perplexity"}
BASELINES = {"sft": "the student trained without the teacher", "student_before": "the student before training"}
SMALLEST = 0.001
"""A p below is not written out."""


@dataclass(frozen=True)
class RetentionTable:
    """As plain text."""

    titles: list[str]
    lines: list[list[str]]
    """The first cell is the name."""
    notes: list[str]
    """What a reader has to know."""


def retention_table(rows: list[dict[str, Any]], theirs: dict[str, Any] | None = None) -> str:
    """`retention_parts` as Markdown, the notes below the table."""
    table = retention_parts(rows, theirs)
    lines = ["| " + " | ".join(table.titles) + " |", "|---|" + "---:|" * (len(table.titles) - 1)]
    lines += [f"| {in_markdown(name)} | " + " | ".join(cell.replace("<", "&lt;") for cell in cells) + " |" for name, *cells in table.lines]
    return "\n".join(lines) + "\n" + "".join(f"\n{in_markdown(note)}\n" for note in table.notes)


def retention_parts(rows: list[dict[str, Any]], theirs: dict[str, Any] | None = None) -> RetentionTable:
    """One row a task or figure, those on seen records below it.

    rows: what `benchmarks._retention.retention` gives. theirs: what `published` gives; what only they have comes last.
    """
    titles = ["task", "n", "teacher", "baseline", "student", "retention [interval]", "student − baseline [interval]", "McNemar p"]
    if theirs:
        titles.append("theirs: teacher / baseline / student (retention)")
    figures = theirs["figures"] if theirs else {}
    lines: list[list[str]] = []
    told: set[str] = set()
    for row in rows:
        key = _their_key(row)
        beside = [_theirs(figures.get(key))] if theirs else []
        told.add(key)
        cells = [f"{row['records']:,}", *(_number(row[model]) for model in ("teacher", "baseline", "student"))]
        cells += [_with_interval(row["retention"], "{:.3f}"), _with_interval(row["student_minus_baseline"], "{:+.3f}", _told_apart(row)), _p(row), *beside]
        lines.append([_title(row), *cells])
        if row["seen"]:
            for part, name in ((row["not_seen"], "not in the training records"), (row["seen"], "in the training records")):
                if part:
                    cells = [f"{part['records']:,}", *(_number(part[model]) for model in ("teacher", "baseline", "student", "retention")), *[NOTHING] * (len(titles) - 6)]
                    lines.append([f"{_title(row)}, {name}", *cells])
    for key, figure in figures.items():
        if key not in told:
            lines.append([FIGURES.get(key, key), *[NOTHING] * (len(titles) - 2), _theirs(figure)])
    return RetentionTable(titles, lines, _notes(rows, theirs))


def _title(row: dict[str, Any]) -> str:
    if row["figure"] == "accuracy":
        return str(row["task"]) + (" (all questions)" if "tasks" in row else " (questions)" if row["task"] == HELDOUT else "")
    name = FIGURES.get(row["figure"], row["figure"]) + (" (lower is better)" if row["better"] == "lower" else "")
    return name if row["task"] == HELDOUT else f"{row['task']}, {name}"


def _their_key(row: dict[str, Any]) -> str:
    """The name under which they have the same: a task of questions, or a figure of the held-out texts."""
    if row["figure"] == "accuracy":
        return row["task"]
    return row["figure"] if row["task"] == HELDOUT else f"{row['task']} {row['figure']}"


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return NOTHING if value is None else form.format(value)


def _told_apart(row: dict[str, Any]) -> bool:
    """Whether student and baseline differ: of questions by the exact test, as a bootstrap of few of them is too sure; otherwise by the interval."""
    if found := row["mcnemar"] and row["mcnemar"]["baseline"]:
        return bool(found["p"] < LEVEL)
    difference = row["student_minus_baseline"]
    return bool(difference and difference["interval"] and not difference["interval"][0] <= 0 <= difference["interval"][1])


def _with_interval(figure: dict[str, Any] | None, form: str, marked: bool = False) -> str:
    if figure is None:
        return NOTHING
    if not figure["interval"]:
        return form.format(figure["value"])
    low, high = figure["interval"]
    return f"{form.format(figure['value'])} [{form.format(low)}, {form.format(high)}]{' *' if marked else ''}"


def _p(row: dict[str, Any]) -> str:
    found = row["mcnemar"] and row["mcnemar"]["baseline"]
    if not found:
        return NOTHING
    return f"<{SMALLEST}" if found["p"] < SMALLEST else f"{found['p']:.3f}"


def _theirs(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return NOTHING
    return " / ".join(_number(figure[model]) for model in ("teacher", "baseline", "student")) + f" ({_number(figure['retention'])})"


def _notes(rows: list[dict[str, Any]], theirs: dict[str, Any] | None) -> list[str]:
    said = ["n: records that all of these models have, the only ones that count. Retention: student / teacher (where lower is better, teacher / student)."]
    if any(figure and figure["interval"] for row in rows for figure in (row["retention"], row["student_minus_baseline"])):
        said.append("[95 % interval: paired bootstrap over the records; * it excludes 0, or of questions: McNemar's p is below 0.05]")
    if baselines := list(dict.fromkeys(row["baseline_model"] for row in rows if row["baseline_model"])):
        said.append("Baseline: " + ", ".join(f"{model} ({BASELINES[model]})" if model in BASELINES else model for model in baselines) + ".")
    if any(row["mcnemar"] and row["mcnemar"]["baseline"] for row in rows):
        said.append("McNemar p: exact and two-sided, student against baseline, not corrected for the number of tasks.")
    if any(row["figure"] == "token_accuracy" and row["teacher"] is not None for row in rows):
        said.append("Token accuracy is over each model's own tokens: with another tokenizer teacher and student do not tell the same tokens.")
    if left_out := [f"{row['left_out']:,} of {row['task']} ({FIGURES.get(row['figure'], row['figure'])})" for row in rows if row["left_out"]]:
        said.append(f"Left out, as not all models have them: {', '.join(left_out)}.")
    for row in rows:
        if mean := row.get("mean_of_tasks"):
            values = ", ".join(f"{model} {_number(mean[model])}" for model in ("teacher", "baseline", "student"))
            kept = f"retention {_number(mean['retention'])}; the mean of the tasks' retentions is {_number(mean['of_retentions'])}"
            said.append(f"{row['task']}, each task counting the same ({len(row['tasks'])}): {values}, {kept}.")
    if theirs:
        models = "; ".join(f"{who}: {name}" for who, name in theirs["models"].items() if name)
        said.append(f"Theirs: the published figures of {theirs['name']} ({models}), on their own data. They were not measured here. Source: {theirs['source']}.")
        said += [f"Of theirs: {note}" for note in theirs["notes"]]
    return said
