"""Results as Markdown tables."""

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


def results_table(results: dict[str, Any]) -> str:
    """One row a model; what a model was not measured for is a dash."""
    present = {key: column for key, column in COLUMNS.items() if any(key in row for row in results["models"].values())}
    lines = ["| model | " + " | ".join(title for title, _ in present.values()) + " |", "|---|" + "---:|" * len(present)]
    for name, row in results["models"].items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(key), form) for key, (_, form) in present.items()) + " |")
    cache = results["cache"]
    lines += ["", f"Cache: {cache['tokens']:,} tokens, {cache['bytes_per_token']:.0f} bytes per token. Held out: {results['heldout_records']} records."]
    return "\n".join(lines) + "\n"


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return "–".join(f"{part:.3f}" for part in value)
    return form.format(value)
