"""A digest of a table's values, whatever the layout: row groups, compression, encodings and the library's version do not count."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa


def rows_digest(table: pa.Table) -> str:
    """sha256:... over the names and types of the columns, their lengths and their values, little-endian."""
    digest = hashlib.sha256()
    for field, column in zip(table.schema, table.columns, strict=True):
        digest.update(f"{field.name}\0".encode())
        _feed(digest, column.combine_chunks())
    return f"sha256:{digest.hexdigest()}"


def _feed(digest: Any, array: pa.Array) -> None:
    digest.update(f"{len(array)}\0".encode())
    if array.null_count:
        digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_struct(array.type):
        for i, part in enumerate(array.flatten()):
            digest.update(f"{array.type.field(i).name}\0".encode())
            _feed(digest, part)
    elif pa.types.is_list(array.type):
        digest.update(array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype("<i4").tobytes())
        _feed(digest, array.flatten())
    elif pa.types.is_string(array.type) or pa.types.is_binary(array.type):
        values = [value.encode() if isinstance(value, str) else value or b"" for value in array.to_pylist()]
        digest.update(np.array([len(value) for value in values], "<i8").tobytes())
        digest.update(b"".join(values))
    elif pa.types.is_fixed_size_binary(array.type):
        size = array.type.byte_width
        digest.update(memoryview(array.buffers()[1])[array.offset * size : (array.offset + len(array)) * size])
    else:
        values = (array.fill_null(pa.scalar(0).cast(array.type)) if array.null_count else array).to_numpy(zero_copy_only=False)
        digest.update(f"{array.type}\0".encode())
        digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
