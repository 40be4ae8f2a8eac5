"""Records and what the teacher said of them, as Parquet files that appear whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.schema import FORMAT, PREPARED, RECORDS, VOCABULARY, logits_schema, rest_column
from pipeline.files import appears_whole
from pipeline.signals.codec import LOGPROB_ERROR, encode_logprobs
from pipeline.signals.records import Record, Tokens
from pipeline.signals.targets import Targets
from pipeline.signals.vocabulary import Vocabulary


def write_prepared(path: Path, records: list[Record]) -> None:
    _write(path, pa.Table.from_pylist([_row(record, keep_text=True) for record in records], PREPARED), {})


def write_shard(folder: Path, shard: int, examples: list[tuple[Record, Tokens, Targets]], temperatures: list[float], keep_text: bool) -> list[str]:
    """records-NNNNN.parquet and logits-NNNNN.parquet, one row a record, in the same order; gives their names."""
    names = [f"records-{shard:05d}.parquet", f"logits-{shard:05d}.parquet"]
    rows = []
    for record, tokens, _ in examples:
        rendered = {"token_id": tokens.ids, "start": tokens.start, "end": tokens.end, "kind": tokens.kind, "lead": tokens.lead}
        rows.append(_row(record, keep_text) | rendered)
    _write(folder / names[0], pa.Table.from_pylist(rows, RECORDS), {"content": "records"})

    targets = [targets for _, _, targets in examples]
    columns: dict[str, Any] = {
        "record": pa.array([record.id for record, _, _ in examples], pa.string()),
        "position": _lists([t.position for t in targets], pa.int32()),
        "kept": _lists([t.kept for t in targets], pa.uint16()),
        "id": _lists([t.ids for t in targets], pa.int32()),
        "logprob": _lists([encode_logprobs(t.logprobs) for t in targets], pa.float16()),
        "realised_logprob": _lists([t.realised_logprob for t in targets], pa.float32()),
        "entropy": _lists([t.entropy.astype(np.float16) for t in targets], pa.float16()),
    }
    for i, temperature in enumerate(temperatures):
        columns[rest_column(temperature)] = _lists([t.rests[i] for t in targets], pa.float32())
    schema = logits_schema(temperatures)
    explained = {"content": "logits", "temperatures": ",".join(f"{t:g}" for t in temperatures), "logprob_error": str(LOGPROB_ERROR), "unit": "nats"}
    _write(folder / names[1], pa.table({name: columns[name] for name in schema.names}, schema), explained)
    return names


def write_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    columns = {"id": np.arange(len(vocabulary), dtype=np.int32), "bytes": vocabulary.token_bytes, "special": vocabulary.special}
    _write(path, pa.table(columns, VOCABULARY), {"end_ids": ",".join(map(str, vocabulary.end_ids))})


def _row(record: Record, keep_text: bool) -> dict[str, Any]:
    return {
        "id": record.id,
        "source": record.source,
        "specialty": record.specialty,
        "split": record.split,
        "weight": record.weight,
        "choice_of": record.choice_of,
        "options": list(record.options) if record.options and keep_text else None,
        "answer_index": record.answer_index,
        "segments": [{"role": segment.role, "text": segment.text if keep_text else None} for segment in record.segments],
        "digest": record.digest(),
    }


def _lists(parts: list[np.ndarray], kind: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0, *(len(part) for part in parts)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(np.concatenate(parts) if parts else [], kind))


def _write(path: Path, table: pa.Table, metadata: dict[str, str]) -> None:
    table = table.replace_schema_metadata({"format": str(FORMAT)} | metadata)
    # numbers that look random: neither dictionaries nor runs help, splitting their bytes does
    floats = [field.name for field in table.schema if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type)]
    others = [field.name for field in table.schema if field.name not in floats and not pa.types.is_list(field.type)]
    with appears_whole(path) as temporary:
        pq.write_table(
            table,
            temporary,
            compression="zstd",
            compression_level=9,
            use_dictionary=others or False,
            column_encoding={f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in floats} or None,
            write_page_checksum=True,
        )
