"""A cache as examples: in stored order, or in an order that is a function of (seed, epoch) and can be entered anywhere."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.schema import FORMAT, PREPARED, RECORDS, VOCABULARY, logits_schema, rest_column
from pipeline.errors import DamageError
from pipeline.files import read_json
from pipeline.signals.codec import decode_logprobs
from pipeline.signals.records import Record, Segment, Tokens
from pipeline.signals.targets import Targets
from pipeline.signals.vocabulary import Vocabulary

WINDOW = 16
"""Shards that are shuffled together and held decoded at once."""


@dataclass(frozen=True)
class Example:
    record: Record
    tokens: Tokens  # the teacher's
    targets: Targets
    has_text: bool


Place = tuple[int, int]
"""Shard and row."""


class Cache:
    """A finished cache. `file` gives a file's checked path by its name."""

    def __init__(self, file: Callable[[str], Path]) -> None:
        self._file = file
        self.about: dict[str, Any] = read_json(file("cache.json"))
        if self.about["format"] != FORMAT:
            raise DamageError(f"This cache has format {self.about['format']}; this version reads format {FORMAT}. Use the version that wrote it.")
        self.temperatures: list[float] = [float(t) for t in self.about["temperatures"]]
        self._open: OrderedDict[int, list[Example]] = OrderedDict()
        self._lock = Lock()

    def vocabulary(self) -> Vocabulary:
        """The teacher's."""
        table = read_table(self._file("vocabulary.parquet"), VOCABULARY)
        return Vocabulary(table["bytes"].to_pylist(), table["special"].to_numpy(zero_copy_only=False), tuple(self.about["end_ids"]))

    def shards(self, split: str) -> list[int]:
        return [i for i, shard in enumerate(self.about["shards"]) if shard["split"] == split]

    def count(self, split: str) -> int:
        return sum(self.about["shards"][shard]["records"] for shard in self.shards(split))

    def examples(self, split: str) -> Iterator[Example]:
        """All of a split, in stored order; one shard in memory."""
        for shard in self.shards(split):
            yield from self.of_shard(shard)

    def order(self, split: str, seed: int, epoch: int) -> list[Place]:
        """Where an epoch's examples lie, one after another. No generator's state: only hashes of (seed, epoch, place)."""

        def key(*place: int) -> bytes:
            return hashlib.sha256(repr((seed, epoch, *place)).encode()).digest()

        shards = sorted(self.shards(split), key=key)
        places: list[Place] = []
        for begin in range(0, len(shards), WINDOW):
            window = [(shard, row) for shard in shards[begin : begin + WINDOW] for row in range(self.about["shards"][shard]["records"])]
            places += sorted(window, key=lambda place: key(*place))
        return places

    def example(self, place: Place) -> Example:
        """One example; the shards of a window stay decoded."""
        shard, row = place
        with self._lock:
            if shard not in self._open:
                self._open[shard] = self.of_shard(shard)
                while len(self._open) > WINDOW + 1:
                    self._open.popitem(last=False)
            self._open.move_to_end(shard)
            return self._open[shard][row]

    def of_shard(self, shard: int) -> list[Example]:
        """One shard's examples, in stored order. DamageError if it is not what was written."""
        records = read_table(self._file(f"records-{shard:05d}.parquet"), RECORDS)
        logits = read_table(self._file(f"logits-{shard:05d}.parquet"), logits_schema(self.temperatures))
        if records["id"].to_pylist() != logits["record"].to_pylist() or len(records) != self.about["shards"][shard]["records"]:
            raise DamageError(f"Shard {shard}: its records and logits are not of the same records. Run `pipeline verify` on the cache's folder.")
        tokens = [_split(records[name]) for name in ("token_id", "start", "end", "kind", "lead")]
        names = ("position", "kept", "id", "logprob", "realised_logprob", "entropy")
        said = {name: _split(logits[name]) for name in names}
        rests = [_split(logits[rest_column(t)]) for t in self.temperatures]
        rows = records.select(PREPARED.names).to_pylist()
        return [
            Example(
                record=record_of(row),
                tokens=Tokens(*(column[i] for column in tokens)),
                targets=Targets(
                    position=said["position"][i],
                    kept=said["kept"][i],
                    ids=said["id"][i],
                    logprobs=decode_logprobs(said["logprob"][i]),
                    rests=np.stack([rest[i] for rest in rests]),
                    realised_logprob=said["realised_logprob"][i],
                    entropy=said["entropy"][i].astype(np.float32),
                ),
                has_text=self.about["text"] == "keep",
            )
            for i, row in enumerate(rows)
        ]


def read_prepared(path: Path) -> Iterator[Record]:
    """The records of a file that prepare-data wrote, a row group at a time."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        _check_schema(path, file.schema_arrow, PREPARED)
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                yield record_of(row)


def record_of(row: dict[str, Any]) -> Record:
    segments = tuple(Segment(segment["role"], segment["text"] or "") for segment in row["segments"])
    return Record(
        id=row["id"],
        segments=segments,
        source=row["source"],
        specialty=row["specialty"],
        split=row["split"],
        weight=row["weight"],
        options=tuple(row["options"]) if row["options"] else None,
        answer_index=row["answer_index"],
        choice_of=row["choice_of"],
    )


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """The file's rows; DamageError if it is no Parquet of exactly these columns."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        table.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise DamageError(f"{path} cannot be decoded: {error}. Run `pipeline verify` on its folder.") from None
    _check_schema(path, table.schema, schema)
    return table


def _check_schema(path: Path, found: pa.Schema, expected: pa.Schema) -> None:
    if not found.remove_metadata().equals(expected.remove_metadata()):
        raise DamageError(f"{path} does not have the columns of format {FORMAT}. Use the version of pipeline that wrote it, or run the stage again.")


def _split(column: pa.ChunkedArray) -> list[np.ndarray]:
    """One array per row of a list column."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    values = lists.values.to_numpy(zero_copy_only=False)
    return [values[a:b] for a, b in pairwise(offsets)]
