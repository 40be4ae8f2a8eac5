"""A cache as examples: in stored order, or in an order that is a function of (seed, epoch) and can be entered anywhere."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.schema import FORMAT, PREPARED, RANKS, RECORDS, VOCABULARY, Logits, attention_schema, boundary_column, hidden_schema, rest_column, tail_schema
from pipeline.errors import DamageError, InputError
from pipeline.files import read_json
from pipeline.signals.attention import Rows, decode_keys, decode_weight_rests, decode_weights, heads_of
from pipeline.signals.codec import decode_ids, decode_logprobs, decode_rests, positions_of
from pipeline.signals.records import Record, Segment, Tokens
from pipeline.signals.targets import Targets
from pipeline.signals.vocabulary import CLASSES, Vocabulary

WINDOW = 16
"""Row groups that are shuffled together and held decoded at once."""
WIDTHS = {"INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8}
"""Bytes of a value, by Parquet's physical type."""
ROWS_AT_ONCE = 256
LARGEST = 2 << 30
"""Bytes of what is read at once, decompressed: hidden states of 65,536 positions at a size of 16,384 take 1 GiB."""
EXTRAS = ("entropy", "logsumexp", "boundary", "hidden", "attention")
ASKED_BY = {"hidden": "targets.logits.hidden: int8", "attention": "targets.attention: {matched: 4}"}
"""The settings that bring those that are not simply switched on."""


@dataclass(frozen=True)
class Example:
    record: Record
    tokens: Tokens  # the teacher's
    targets: Targets
    has_text: bool
    place: "Place"


@dataclass(frozen=True)
class Tail:
    """What the teacher gives each token, on the average over positions, where it is not among the kept ones."""

    log_means: np.ndarray  # float64 [S, V] at the cache's temperatures
    positions: int


Place = tuple[int, int, int]
"""Shard, row group, row."""


class Cache:
    """A finished cache. `file` gives a file's checked path by its name; of the EXTRAS only those named are read."""

    def __init__(self, file: Callable[[str], Path], extras: tuple[str, ...] = ()) -> None:
        self._file = file
        self._extras = extras
        self.about: dict[str, Any] = read_json(file("cache.json"))
        if self.about["format"] != FORMAT:
            raise DamageError(f"This cache has format {self.about['format']}; this version reads format {FORMAT}. Use the version that wrote it, or run cache-teacher again.")
        self.temperatures: list[float] = [float(t) for t in self.about["temperatures"]]
        missing = [extra for extra in extras if extra not in self.about["extras"]]
        if missing:
            raise InputError(f"This cache was made without {missing[0]}. Make it again with `{ASKED_BY.get(missing[0], f'targets.logits.{missing[0]}: true')}`.")
        self._open: OrderedDict[tuple[int, int], list[Example]] = OrderedDict()
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = Lock()

    def vocabulary(self) -> Vocabulary:
        """The teacher's."""
        table = read_table(self._file("vocabulary.parquet"), VOCABULARY)
        return Vocabulary(table["bytes"].to_pylist(), table["special"].to_numpy(zero_copy_only=False), tuple(self.about["end_ids"]))

    def tail(self) -> Tail | None:
        """The tail marginals of the shards that were asked for them, together; None if there are none."""
        sums = np.zeros((len(self.temperatures), int(self.about["vocabulary_size"])))
        positions = 0
        for shard in self.about["tail_shards"]:
            table = read_table(self._file(f"tail-{shard:05d}.parquet"), tail_schema(self.temperatures))
            count = int(table.schema.metadata[b"positions"])
            means = np.stack([decode_rests(column.to_numpy()) for column in table.columns])
            sums += np.exp(means.astype(np.float64)) * count
            positions += count
        with np.errstate(divide="ignore"):
            return Tail(np.log(sums / positions), positions) if positions else None

    def shards(self, split: str) -> list[int]:
        return [i for i, shard in enumerate(self.about["shards"]) if shard["split"] == split]

    def count(self, split: str) -> int:
        return sum(self.about["shards"][shard]["records"] for shard in self.shards(split))

    def examples(self, split: str) -> Iterator[Example]:
        """All of a split, in stored order; one row group in memory."""
        for shard in self.shards(split):
            yield from self.of_shard(shard)

    def records(self, split: str) -> Iterator[Record]:
        """All of a split, in stored order, without what the teacher says of them."""
        for shard in self.shards(split):
            path = self._file(f"records-{shard:05d}.parquet")
            for group in range(len(self.about["shards"][shard]["groups"])):
                yield from (record_of(row) for row in read_table(path, RECORDS, group).select(PREPARED.names).to_pylist())

    def order(self, split: str, seed: int, epoch: int) -> list[Place]:
        """Where an epoch's examples lie, one after another. No generator's state: only hashes of (seed, epoch, place)."""

        def key(*place: int) -> bytes:
            return hashlib.sha256(repr((seed, epoch, *place)).encode()).digest()

        groups = [(shard, group, records) for shard in self.shards(split) for group, records in enumerate(self.about["shards"][shard]["groups"])]
        groups.sort(key=lambda group: key(*group[:2]))
        places: list[Place] = []
        for begin in range(0, len(groups), WINDOW):
            window = [(shard, group, row) for shard, group, records in groups[begin : begin + WINDOW] for row in range(records)]
            places += sorted(window, key=lambda place: key(*place))
        return places

    def column(self, split: str, name: Literal["id", "specialty"]) -> dict[Place, str]:
        """Of each record; "" for none."""
        found: dict[Place, str] = {}
        for shard in self.shards(split):
            path = self._file(f"records-{shard:05d}.parquet")
            with decoding(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
                for group in range(file.metadata.num_row_groups):
                    values = read_rows(file, group, [name])[name].to_pylist()
                    found |= {(shard, group, row): value or "" for row, value in enumerate(values)}
        return found

    def difficulty(self, split: str, by: Literal["entropy", "cross_entropy"]) -> dict[Place, float]:
        """Each record's mean, over its described positions, of the teacher's entropy, or of what it gives the token that follows; nats. 0 without positions."""
        found: dict[Place, float] = {}
        column, sign = ("entropy", 1.0) if by == "entropy" else ("realised_logprob", -1.0)
        for shard in self.shards(split):
            path = self._file(f"logits-{shard:05d}.parquet")
            with decoding(path), pq.ParquetFile(path, page_checksum_verification=True) as file:
                for group in range(file.metadata.num_row_groups):
                    lists = read_rows(file, group, [column])[column]
                    ends, values = _offsets(lists), np.maximum(_values(lists).astype(np.float64), -1e4)
                    sums = np.diff(np.concatenate([[0.0], np.cumsum(values)])[ends])
                    means = sign * sums / np.maximum(np.diff(ends), 1)
                    found |= {(shard, group, row): mean for row, mean in enumerate(means.tolist())}
        return found

    def example(self, place: Place) -> Example:
        """One example; the row groups of a window stay decoded."""
        shard, group, row = place
        with self._lock:
            if (shard, group) not in self._open:
                self._open[shard, group] = self.of_group(shard, group)
                while len(self._open) > WINDOW + 1:
                    self._open.popitem(last=False)
            self._open.move_to_end((shard, group))
            return self._open[shard, group][row]

    def of_shard(self, shard: int) -> Iterator[Example]:
        """One shard's examples, in stored order. DamageError if it is not what was written."""
        for group in range(len(self.about["shards"][shard]["groups"])):
            yield from self.of_group(shard, group)

    def of_group(self, shard: int, group: int) -> list[Example]:
        """One row group's examples, in stored order. DamageError if it is not what was written."""
        records = read_table(self._file(f"records-{shard:05d}.parquet"), RECORDS, group)
        logits = self.logits(shard, group)
        ids = records["id"].to_pylist()
        if ids != logits.records or len(ids) != self.about["shards"][shard]["groups"][group]:
            raise DamageError(f"Shard {shard}: its records and logits are not of the same records. Run `pipeline verify` on the cache's folder.")
        tokens = [split_lists(records[name]) for name in ("token_id", "start", "end", "kind", "lead")]
        rows = records.select(PREPARED.names).to_pylist()
        has_text = self.about["text"] == "keep"
        return [Example(record_of(row), Tokens(*(column[i] for column in tokens)), targets, has_text, (shard, group, i)) for i, (row, targets) in enumerate(zip(rows, logits.split(), strict=True))]

    def logits(self, shard: int, group: int) -> "Decoded":
        """One row group's positions, flat; nothing of its records."""
        path = self._file(f"logits-{shard:05d}.parquet")
        with decoding(path):
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                form = Logits.from_metadata({key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}, file.schema_arrow.names)
                _check_schema(path, file.schema_arrow, form.schema())
                boundary = [boundary_column(i) for i in range(len(CLASSES))]
                skipped = {"entropy", "logsumexp", *boundary} - set(self._extras) - set(boundary if "boundary" in self._extras else ())
                table = read_rows(file, group, [name for name in form.schema().names if name not in skipped])
            decoded = decode(table, form, self._order_of(shard))
        if "hidden" in self._extras:
            path = self._file(f"hidden-{shard:05d}.parquet")
            with decoding(path):
                size = pq.read_schema(path).field("state").type.value_type.byte_width
            table = read_table(path, hidden_schema(size), group)
            states = table["state"].combine_chunks().values
            elements = np.frombuffer(states.buffers()[1], np.int8).reshape(-1, size)[states.offset : states.offset + len(states)]
            scale = _values(table["scale"])
            if table["record"].to_pylist() != decoded.records or not len(elements) == len(scale) == len(decoded.position):
                raise DamageError(f"{path} is not of the positions of its shard. Run `pipeline verify` on its folder.")
            decoded = replace(decoded, hidden=elements, hidden_scale=scale)
        if "attention" in self._extras:
            path = self._file(f"attention-{shard:05d}.parquet")
            table = read_table(path, attention_schema(self.about["attention"]["layers"]), group)
            with decoding(path):
                decoded = replace(decoded, attention=decode_attention(table, decoded))
        return decoded

    def _order_of(self, shard: int) -> np.ndarray:
        with_ranks = self._orders.get(shard)
        if with_ranks is None:
            with_ranks = np.cumsum(read_table(self._file(f"ranks-{shard:05d}.parquet"), RANKS)["id_gap"].to_numpy()).astype(np.int32)
            self._orders[shard] = with_ranks
            while len(self._orders) > WINDOW + 1:
                self._orders.popitem(last=False)
        return with_ranks


@dataclass(frozen=True)
class Decoded:
    """The positions of many records, flat (compressed sparse rows)."""

    records: list[str]
    position: np.ndarray  # int32 [N]
    ends: np.ndarray  # int64 [records + 1] where each record's positions end
    kept: np.ndarray  # uint16 [N]
    ids: np.ndarray  # int32 [sum of kept]
    logprobs: np.ndarray  # float32 [sum of kept]
    rests: np.ndarray  # float32 [S, N]
    realised_logprob: np.ndarray  # float32 [N]
    counts: np.ndarray | None = None
    entropy: np.ndarray | None = None
    logsumexp: np.ndarray | None = None
    boundary: np.ndarray | None = None
    hidden: np.ndarray | None = None
    hidden_scale: np.ndarray | None = None
    attention: dict[int, Rows] | None = None

    def split(self) -> Iterator[Targets]:
        """Record by record, without copying."""
        entry_ends = np.concatenate([[0], np.cumsum(self.kept, dtype=np.int64)])[self.ends]
        attention = None if self.attention is None else {layer: rows.split((np.diff(self.ends) * heads_of(rows, self.position)).tolist()) for layer, rows in self.attention.items()}
        for number, ((a, b), (c, d)) in enumerate(zip(pairwise(self.ends.tolist()), pairwise(entry_ends.tolist()), strict=True)):
            yield Targets(
                position=self.position[a:b],
                kept=self.kept[a:b],
                ids=self.ids[c:d],
                logprobs=self.logprobs[c:d],
                rests=self.rests[:, a:b],
                realised_logprob=self.realised_logprob[a:b],
                counts=None if self.counts is None else self.counts[c:d],
                attention=None if attention is None else {layer: rows[number] for layer, rows in attention.items()},
                **{name: None if (values := getattr(self, name)) is None else values[a:b] for name in ("entropy", "logsumexp", "boundary", "hidden", "hidden_scale")},
            )


def decode(table: pa.Table, form: Logits, order: np.ndarray) -> Decoded:
    """The rows of a logits file. ValueError or IndexError if they contradict each other."""
    lengths = _values(table["positions"])
    position = positions_of(_values(table["first_position"]), lengths)
    kept = _values(table["kept"])
    codes = _values(table["logprob_code"])
    gaps = _values(table["id_gap"])
    if not len(kept) == len(position) or not int(kept.sum(dtype=np.int64)) == len(codes) == len(gaps):
        raise ValueError("its columns are not of the same length")
    rests = np.stack([decode_rests(_values(table[rest_column(temperature)])) for temperature in form.temperatures])
    logprobs, rests[0] = decode_logprobs(codes, kept, form.table, rests[0])
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[_offsets(table["positions"])]
    if not np.array_equal(ends, _offsets(table["kept"])):
        raise ValueError("its records' positions are not as many as it says")
    optional: dict[str, Any] = {name: _values(table[name]).astype(np.float32) for name in ("entropy", "logsumexp") if name in table.column_names}
    if form.boundary and boundary_column(0) in table.column_names:
        optional["boundary"] = np.stack([_values(table[boundary_column(i)]) for i in range(len(CLASSES))], 1).astype(np.float32)
    realised = _values(table["realised_logprob"])
    if any(len(column) != len(position) for column in (realised, rests[0], *optional.values())):
        raise ValueError("its columns are not of the same length")
    return Decoded(
        records=table["record"].to_pylist(),
        position=position,
        ends=ends,
        kept=kept,
        ids=decode_ids(gaps, kept, order),
        logprobs=logprobs,
        rests=rests,
        realised_logprob=realised,
        counts=codes if form.method == "sampled" else None,
        **optional,
    )


def decode_attention(table: pa.Table, decoded: Decoded) -> dict[int, Rows]:
    """By layer. ValueError or IndexError if the rows are not of these positions."""
    if table["record"].to_pylist() != decoded.records:
        raise ValueError("it is not of the records of its shard")
    found = {}
    for layer in sorted(int(name.removeprefix("kept_")) for name in table.column_names if name.startswith("kept_")):
        kept, gaps, codes, rest = (_values(table[f"{name}_{layer}"]) for name in ("kept", "key_gap", "weight_code", "rest"))
        heads = len(rest) // max(len(decoded.position), 1)
        if not len(kept) == len(rest) == heads * len(decoded.position) or not len(gaps) == len(codes) == kept.sum(dtype=np.int64):
            raise ValueError("its columns are not of the same length")
        if not np.array_equal(_offsets(table[f"rest_{layer}"]), decoded.ends * heads):
            raise ValueError("its rows are not of the positions of its shard")
        found[layer] = Rows(kept, decode_keys(gaps, kept, np.repeat(decoded.position, heads)), decode_weights(codes), decode_weight_rests(rest))
    return found


def read_prepared(path: Path, group: int) -> list[Record]:
    """The records of one row group of a file that prepare-data wrote."""
    return [record_of(row) for row in read_table(path, PREPARED, group).to_pylist()]


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


def read_table(path: Path, schema: pa.Schema, group: int | None = None) -> pa.Table:
    """The file's rows, or those of one row group; DamageError if it is no Parquet of exactly these columns."""
    with decoding(path):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = read_rows(file, group)
        table.validate(full=True)
    _check_schema(path, table.schema, schema)
    return table


def read_rows(file: pq.ParquetFile, group: int | None = None, columns: list[str] | None = None) -> pa.Table:
    """A row group, or the whole file; ValueError if that would take more memory than any that we write, however small it is on disk."""
    groups = list(range(file.metadata.num_row_groups)) if group is None else [group]
    texts: set[str] = set()  # that may take more memory decoded than they claim
    for number in range(file.metadata.num_columns):
        chunks = [file.metadata.row_group(each).column(number) for each in groups]
        texts.update(chunk.path_in_schema.partition(".")[0] for chunk in chunks if chunk.physical_type == "BYTE_ARRAY" and chunk.num_values * chunk.total_uncompressed_size > LARGEST)
        claimed = sum(max(chunk.num_values * WIDTHS.get(chunk.physical_type, 1), chunk.total_uncompressed_size) for chunk in chunks)
        if claimed > LARGEST:
            raise ValueError(f"{chunks[0].path_in_schema} claims {claimed} bytes")
    names = file.schema_arrow.names if columns is None else columns
    table = file.read_row_groups(groups, [name for name in names if name not in texts])
    for name in names:
        if name in texts:
            table = table.append_column(file.schema_arrow.field(name), _read_text(file, groups, name))
    return table.select(names)


def _read_text(file: pq.ParquetFile, groups: list[int], name: str) -> pa.ChunkedArray:
    """A column with texts, a few rows at a time: one long text may stand in many rows and be in the file once."""
    parts: list[pa.Array] = []
    size = 0
    for batch in file.iter_batches(ROWS_AT_ONCE, groups, [name]):
        parts.append(batch.column(0))
        size += batch.nbytes
        if size > LARGEST:
            raise ValueError(f"the first {sum(map(len, parts))} rows of {name} take {size} bytes")
    return pa.chunked_array(parts, file.schema_arrow.field(name).type)


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, ValueError, IndexError) as error:
        raise DamageError(f"{path} cannot be decoded: {error}. Run `pipeline verify` on its folder.") from None


def _check_schema(path: Path, found: pa.Schema, expected: pa.Schema) -> None:
    if not found.remove_metadata().equals(expected.remove_metadata()):
        raise DamageError(f"{path} does not have the columns of format {FORMAT}. Use the version of pipeline that wrote it, or run the stage again.")


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """All rows' values of a list column, flat."""
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _offsets(column: pa.ChunkedArray) -> np.ndarray:
    offsets = column.combine_chunks().offsets.to_numpy()
    return offsets - offsets[0]


def split_lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """One array per row of a list column."""
    values = _values(column)
    return [values[a:b] for a, b in pairwise(_offsets(column).tolist())]
