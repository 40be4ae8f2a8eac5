"""What `evaluate` keeps of each record, so that evaluations can be compared without a model: records.parquet."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.signals.records import Record

KEPT = "records"
"""The key under which a benchmark says what is to be kept: a list of records, each with its columns."""
DIGEST = 16
"""Hexadecimal digits of a record's digest that tell it from another with its id."""
RECORDS = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),  # teacher, student_before, sft or distilled
        pa.field("record", pa.string(), nullable=False),  # its id
        pa.field("digest", pa.string(), nullable=False),  # of what is asked and answered
        pa.field("specialty", pa.string()),
        # perplexity: null where it was not asked for
        pa.field("logprob", pa.float64()),  # of the answer and its end, nats
        pa.field("tokens", pa.int32()),  # of the answer and its end, in the model's own tokens
        pa.field("answer_bytes", pa.int32()),
        # fidelity
        pa.field("kl", pa.float64()),  # KL(teacher || model), summed over the aligned positions, nats
        pa.field("agreeing", pa.int32()),  # aligned positions at which both hold the same token to be the most likely
        pa.field("aligned", pa.int32()),
        # multiple_choice: null where the record is no question
        pa.field("chosen", pa.int32()),  # which option, from 0
        pa.field("answer", pa.int32()),  # which would have been right
        pa.field("right", pa.bool_()),
    ],
    metadata={"format": "1"},
)
COLUMNS = RECORDS.names[4:]


def as_table(models: Mapping[str, Sequence[tuple[Record, dict[str, Any]]]]) -> pa.Table:
    """One row a model and record, in the order in which they come; what benchmarks say of the same record stands in one row."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for model, kept in models.items():
        for record, columns in kept:
            digest = record.digest()[:DIGEST]
            assert columns.keys() <= set(COLUMNS), columns.keys()
            row = rows.setdefault((model, record.id, digest), {"model": model, "record": record.id, "digest": digest, "specialty": record.specialty})
            row |= columns
    return pa.Table.from_pylist([dict.fromkeys(RECORDS.names) | row for row in rows.values()], RECORDS)
