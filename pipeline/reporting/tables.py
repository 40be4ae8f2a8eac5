"""Results as Markdown tables."""

import csv
import io
from typing import Any

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
SPREAD = ("mean", "lowest", "highest")
WITHOUT_TEACHER = "without the teacher"


def results_table(results: dict[str, Any]) -> str:
    """One row a model; what a model was not measured for is a dash."""
    present = {key: column for key, column in COLUMNS.items() if any(key in row for row in results["models"].values())}
    lines = ["| model | " + " | ".join(title for title, _ in present.values()) + " |", "|---|" + "---:|" * len(present)]
    for name, row in results["models"].items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(key), form) for key, (_, form) in present.items()) + " |")
    cache = results["cache"]
    lines += ["", f"Cache: {cache['tokens']:,} tokens, {cache['bytes_per_token']:.0f} bytes per token. Held out: {results['heldout_records']} records."]
    return "\n".join(lines) + "\n"


def ablation_rows(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each variant, and of the students without a teacher, the mean, lowest and highest over the seeds; the nearest to the teacher first.

    trials: what `ablation.results` gives.
    """
    models: dict[str, dict[str, dict[str, Any]]] = {}
    controls = {trial["folders"].get("train-control") for trial in trials}
    shared = len(controls) == len({trial["seed"] for trial in trials})
    for trial in trials:
        models.setdefault(trial["variant"], {})[trial["folders"]["train-student"]] = trial["models"]["distilled"]
        if "sft" in trial["models"]:
            name = WITHOUT_TEACHER if shared else f"{trial['variant']}, {WITHOUT_TEACHER}"
            models.setdefault(name, {})[trial["folders"]["train-control"]] = trial["models"]["sft"]
    rows = []
    for name, found in models.items():
        row: dict[str, Any] = {"variant": name, "seeds": len(found)}
        for key in QUALITY:
            values = [model[key] for model in found.values() if model.get(key) is not None]
            row[key] = {"mean": sum(values) / len(values), "lowest": min(values), "highest": max(values)} if values else None
        rows.append(row)
    return sorted(rows, key=lambda row: row["kl_to_teacher"]["mean"] if row["kl_to_teacher"] else float("inf"))


def ablation_table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| variant | seeds | " + " | ".join(COLUMNS[key][0] for key in QUALITY) + " |", "|---|" + "---:|" * (len(QUALITY) + 1)]
    for row in rows:
        cells = [_spread(row[key]) for key in QUALITY]
        lines.append(f"| {row['variant']} | {row['seeds']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ablation_csv(rows: list[dict[str, Any]]) -> str:
    """One line a variant."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "seeds", *(f"{key}_{what}" for key in QUALITY for what in SPREAD)])
    for row in rows:
        writer.writerow([row["variant"], row["seeds"], *(row[key][what] if row[key] else "" for key in QUALITY for what in SPREAD)])
    return text.getvalue()


def _spread(value: dict[str, float] | None) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:.3f}" + (f" ({value['lowest']:.3f}–{value['highest']:.3f})" if value["lowest"] < value["highest"] else "")


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return "–".join(f"{part:.3f}" for part in value)
    return form.format(value)
