"""The columns of a cache's Parquet files and what their metadata says; docs/cache-format.md says what each means."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from pipeline.signals.codec import NO_REST, REST_STEP, count_table, step_table
from pipeline.signals.vocabulary import CLASSES

FORMAT = 2
GROUP_POSITIONS = 8192
"""A row group ends with the record that brings it to so many described positions, or to GROUP_TOKENS tokens: what a reader holds at least."""
GROUP_TOKENS = 65536
SHARD_FILES = ("records-", "logits-", "ranks-", "hidden-")
"""What the names begin with of the files that every shard has. The tails, of a few shards, are a cost of the cache, not of its positions."""

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

VOCABULARY = pa.schema([("id", pa.int32()), ("bytes", pa.binary()), ("special", pa.bool_()), ("first_byte_class", pa.uint8())])

RANKS = pa.schema([("id_gap", pa.int32())])


@dataclass(frozen=True)
class Logits:
    """What the columns of a cache's logits files are, and how their numbers are coded."""

    temperatures: list[float]
    method: str
    table: np.ndarray  # float64 [256] the log-probability that a code stands for
    vocabulary_size: int
    threshold: float = 0.0
    least: int = 0
    most: int = 0
    logsumexp: bool = False
    boundary: bool = False

    @classmethod
    def of(cls, method: str, temperatures: list[float], step: tuple[float, float], threshold: float, least: int, most: int, vocabulary_size: int, **tiers: bool) -> "Logits":
        drawn = method == "sampled"
        table = count_table(most) if drawn else step_table(*step)
        return cls(temperatures, method, table, vocabulary_size, 0.0 if drawn else threshold, 0 if drawn else least, most, **tiers)

    def schema(self) -> pa.Schema:
        return pa.schema(
            [
                ("record", pa.string()),
                ("first_position", pa.list_(pa.int32())),
                ("positions", pa.list_(pa.int32())),
                ("kept", pa.list_(pa.uint16())),
                ("id_gap", pa.list_(pa.int32())),
                ("logprob_code", pa.list_(pa.uint8())),
                *((rest_column(temperature), pa.list_(pa.int16())) for temperature in self.temperatures),
                ("realised_logprob", pa.list_(pa.float32())),
                ("entropy", pa.list_(pa.float16())),
                *([("logsumexp", pa.list_(pa.float32()))] if self.logsumexp else []),
                *((boundary_column(i), pa.list_(pa.float16())) for i in range(len(CLASSES) if self.boundary else 0)),
            ]
        )

    def metadata(self) -> dict[str, str]:
        """So that a file explains itself: nothing else has to be known to decode it."""
        return {
            "content": "logits",
            "unit": "nats",
            "method": self.method,
            "temperatures": ",".join(f"{temperature:g}" for temperature in self.temperatures),
            "code_table": json.dumps([round(float(value), 9) for value in self.table]),
            "rest_step": str(REST_STEP),
            "no_rest": str(NO_REST),
            "threshold": f"{self.threshold:g}",
            "least": str(self.least),
            "most": str(self.most),
            "vocabulary_size": str(self.vocabulary_size),
        }

    @classmethod
    def from_metadata(cls, about: dict[str, str], columns: Sequence[str]) -> "Logits":
        return cls(
            temperatures=[float(temperature) for temperature in about["temperatures"].split(",")],
            method=about["method"],
            table=np.array(json.loads(about["code_table"]), dtype=np.float64),
            vocabulary_size=int(about["vocabulary_size"]),
            threshold=float(about["threshold"]),
            least=int(about["least"]),
            most=int(about["most"]),
            logsumexp="logsumexp" in columns,
            boundary=boundary_column(0) in columns,
        )


def hidden_schema(size: int) -> pa.Schema:
    """One value a position: the state's int8 elements as bytes."""
    return pa.schema([("record", pa.string()), ("state", pa.list_(pa.binary(size))), ("scale", pa.list_(pa.float32()))])


def attention_schema(layers: Sequence[int]) -> pa.Schema:
    kinds = {"kept": pa.uint8(), "key_gap": pa.int32(), "weight_code": pa.uint8(), "rest": pa.uint16()}
    return pa.schema([("record", pa.string()), *((f"{name}_{layer}", pa.list_(kind)) for layer in layers for name, kind in kinds.items())])


def tail_schema(temperatures: list[float]) -> pa.Schema:
    return pa.schema([(f"mean_{temperature:g}", pa.int16()) for temperature in temperatures])


def rest_column(temperature: float) -> str:
    return f"rest_{temperature:g}"


def boundary_column(number: int) -> str:
    return f"boundary_{number}"


def groups(positions: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """How many records each row group has, from the positions and tokens of each record."""
    ends = [0]
    here = np.zeros(2, dtype=np.int64)
    for i, record in enumerate(zip(positions, tokens, strict=True)):
        here += record
        if here[0] >= GROUP_POSITIONS or here[1] >= GROUP_TOKENS:
            ends.append(i + 1)
            here[:] = 0
    if ends[-1] < len(positions):
        ends.append(len(positions))
    return [b - a for a, b in pairwise(ends)]
