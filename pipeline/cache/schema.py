"""The columns of a cache's Parquet files; docs/cache-format.md says what each means."""

import pyarrow as pa

FORMAT = 1

SEGMENT = pa.struct([("role", pa.string()), ("text", pa.string())])

PREPARED = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("specialty", pa.string()),
        ("split", pa.string()),
        ("weight", pa.float64()),
        ("choice_of", pa.string()),
        ("options", pa.list_(pa.string())),
        ("answer_index", pa.int32()),
        ("segments", pa.list_(SEGMENT)),
        ("digest", pa.string()),
    ]
)

RECORDS = pa.schema(
    [
        *PREPARED,
        ("token_id", pa.list_(pa.int32())),
        ("start", pa.list_(pa.int32())),
        ("end", pa.list_(pa.int32())),
        ("kind", pa.list_(pa.uint8())),
        ("lead", pa.list_(pa.int64())),
    ]
)

VOCABULARY = pa.schema([("id", pa.int32()), ("bytes", pa.binary()), ("special", pa.bool_())])


def rest_column(temperature: float) -> str:
    return f"rest_{temperature:g}"


def logits_schema(temperatures: list[float]) -> pa.Schema:
    return pa.schema(
        [
            ("record", pa.string()),
            ("position", pa.list_(pa.int32())),
            ("kept", pa.list_(pa.uint16())),
            ("id", pa.list_(pa.int32())),
            ("logprob", pa.list_(pa.float16())),
            *((rest_column(temperature), pa.list_(pa.float32())) for temperature in temperatures),
            ("realised_logprob", pa.list_(pa.float32())),
            ("entropy", pa.list_(pa.float16())),
        ]
    )
