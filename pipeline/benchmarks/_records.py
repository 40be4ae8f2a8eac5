"""What `evaluate` keeps of each record, so that evaluations can be compared without a model: records.parquet."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.signals.records import Record

KEPT = "records"
"""The key under which a benchmark says what is to be kept: a list of rows."""
DIGEST = 16
"""Hexadecimal digits of a record's digest that tell it from another with its id."""
RECORDS = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),  # teacher, student_before, sft or distilled
        pa.field("task", pa.string(), nullable=False),  # heldout, or the benchmark's task
        pa.field("record", pa.string(), nullable=False),  # its id
        pa.field("digest", pa.string(), nullable=False),  # of what is asked and answered
        pa.field("specialty", pa.string()),
        pa.field("seen", pa.bool_()),  # whether the training records have 13 words in a row of it; null where that is not known
        # perplexity: null where it was not asked for
        pa.field("logprob", pa.float64()),  # of the answer and its end, nats
        pa.field("tokens", pa.int32()),  # of the answer and its end, in the model's own tokens
        pa.field("answer_bytes", pa.int32()),
        pa.field("followed", pa.int32()),  # tokens that the model held to be the most likely
        # fidelity
        pa.field("kl", pa.float64()),  # KL(teacher || model), summed over the aligned positions, nats
        pa.field("total_variation", pa.float64()),  # summed over the aligned positions
        pa.field("agreeing", pa.int32()),  # aligned positions at which both hold the same token to be the most likely
        pa.field("top_agreeing", pa.float64()),  # the share of the teacher's 5 most likely tokens among the model's, summed over the aligned positions
        pa.field("aligned", pa.int32()),
        # questions: null where the record is none
        pa.field("chosen", pa.int32()),  # which option, from 0
        pa.field("answer", pa.int32()),  # which would have been right
        pa.field("right", pa.bool_()),
        pa.field("confidence", pa.float64()),  # the chosen option's probability among all options
        # text_quality: null where nothing was generated
        pa.field("generated", pa.string()),
        pa.field("ended", pa.bool_()),  # by itself, not by the most tokens that it may have
        pa.field("rouge1", pa.float64()),
        pa.field("rouge2", pa.float64()),
        pa.field("rougeL", pa.float64()),
    ],
    metadata={"format": "2"},
)
FIGURES: dict[str, tuple[str, str | None, float]] = {
    "kl_to_teacher": ("kl", "aligned", 1.0),
    "bits_per_byte": ("logprob", "answer_bytes", -1 / math.log(2)),
    "top1_agreement": ("agreeing", "aligned", 1.0),
    "accuracy": ("right", None, 1.0),
    "token_accuracy": ("followed", "tokens", 1.0),
    "rouge1": ("rouge1", None, 1.0),
    "rouge2": ("rouge2", None, 1.0),
    "rougeL": ("rougeL", None, 1.0),
}
"""Each figure as a fraction of two sums over records: the column above the line, the one below it (None: the records are counted), and a factor."""
KEY = ("task", "record", "digest")
COLUMNS = RECORDS.names[6:]
HELDOUT = "heldout"


@dataclass(frozen=True)
class Row:
    """What is to be kept of one record, or of one question of a benchmark."""

    record: str
    digest: str
    specialty: str | None
    text: str
    """What is asked, which the training records should not have; itself not kept."""
    columns: dict[str, Any]
    task: str = HELDOUT


def key_of(one: Row) -> tuple[str, str, str]:
    return one.task, one.record, one.digest


def row(record: Record, **columns: Any) -> Row:
    return Row(record.id, record.digest()[:DIGEST], record.specialty, "\n".join(segment.text for segment in record.segments), columns)


def refuse_twice(earlier: Sequence[Row], rows: Sequence[Row]) -> None:
    """InputError if two benchmarks have asked the same task: their questions would be taken for one."""
    if twice := sorted({one.task for one in earlier} & {one.task for one in rows} - {HELDOUT}):
        raise InputError(f"Two entries of evaluation.benchmarks ask {twice[0]}, and their questions would be mixed. Leave it out of one of them, or evaluate them apart.")


def as_table(models: Mapping[str, Sequence[Row]], seen: Mapping[tuple[str, str, str], bool] | None = None) -> pa.Table:
    """One row a model and record, in the order in which they come; what benchmarks say of the same record stands in one row."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for model, kept in models.items():
        for one in kept:
            assert one.columns.keys() <= set(COLUMNS), one.columns.keys()
            key = key_of(one)
            about = {"model": model, "specialty": one.specialty, "seen": (seen or {}).get(key)} | dict(zip(KEY, key, strict=True))
            rows.setdefault((model, *key), about).update(one.columns)
    return pa.Table.from_pylist([dict.fromkeys(RECORDS.names) | kept for kept in rows.values()], RECORDS)
