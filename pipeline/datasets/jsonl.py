import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.datasets._rows import Row, mapped
from pipeline.errors import InputError
from pipeline.files import files_named
from pipeline.options import Fields


def jsonl(*, path: str, fields: Fields | None = None) -> Iterator[Row]:
    """The rows of local files: .jsonl, .jsonl.gz or .parquet; `path` is a file or a glob."""
    files = files_named(path)
    if not files:
        raise InputError(f"No file is at {path}. `path` is taken from the folder you run the command in.")
    for file in files:
        if file.suffix == ".parquet":
            yield from _parquet(file, fields)
        else:
            yield from _lines(file, fields)


def _lines(file: Path, fields: dict[str, Any] | None) -> Iterator[Row]:
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
        try:
            for number, line in enumerate(lines, 1):
                where = f"{file} line {number}"
                if not line.strip():
                    continue
                try:
                    raw = json.loads(line.decode("utf-8-sig"))
                except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                    yield Row(where, problem=f"is no JSON: {error}")
                    continue
                yield mapped(raw, fields, where) if isinstance(raw, dict) else Row(where, problem="is no JSON object")
        except (OSError, EOFError) as error:
            raise InputError(f"{file} cannot be read to its end: {error}. Is it whole?") from None


def _parquet(file: Path, fields: dict[str, Any] | None) -> Iterator[Row]:
    try:
        with pq.ParquetFile(file) as parquet:
            number = 0
            for batch in parquet.iter_batches():
                for raw in batch.to_pylist():
                    number += 1
                    yield mapped(raw, fields, f"{file} row {number}")
    except pa.ArrowException as error:
        raise InputError(f"{file} cannot be read: {error}. Is it a whole Parquet file?") from None
