"""Records and what the teacher said of them, as Parquet files that appear whole."""

import errno
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.digest import rows_digest
from pipeline.cache.schema import FORMAT, PREPARED, RANKS, RECORDS, VOCABULARY, Logits, attention_schema, boundary_column, groups, hidden_schema, rest_column, tail_schema
from pipeline.files import appears_whole
from pipeline.signals.attention import Rows, encode_keys, encode_weight_rests, encode_weights, heads_of
from pipeline.signals.codec import encode_ids, encode_logprobs, encode_rests, ranks, spans
from pipeline.signals.records import Record, Tokens
from pipeline.signals.targets import Targets
from pipeline.signals.vocabulary import CLASSES, Vocabulary, first_byte_classes


def write_prepared(path: Path, records: list[Record], per_group: int) -> list[str]:
    """The digests of the row groups. per_group: records of each."""
    table = pa.Table.from_pylist([_row(record, keep_text=True) for record in records], PREPARED)
    groups = [table.slice(first, per_group) for first in range(0, len(table), per_group)]
    write_table(path, table, {}, [len(group) for group in groups])
    return [rows_digest(group) for group in groups]


@dataclass(frozen=True)
class Shard:
    """What goes into a shard's files: one row a record in each, in the same order and the same row groups."""

    folder: Path
    number: int
    examples: list[tuple[Record, Tokens, Targets]]
    form: Logits
    keep_text: bool
    tail: tuple[np.ndarray, int] | None = None
    """Log means [S, V], and over how many positions."""

    def groups(self) -> list[int]:
        """Records of each row group."""
        return groups([len(targets.position) for _, _, targets in self.examples], [len(tokens) for _, tokens, _ in self.examples])

    def write(self) -> dict[str, dict[str, Any]]:
        """What `digests` says of each file. FileExistsError if one is there with other bytes."""
        said = self.digests()
        for name, (table, about, cut) in self._tables.items():
            write_table(self.folder / name, table, about, cut, said[name]["rows_digest"])
        return said

    def digests(self) -> dict[str, dict[str, Any]]:
        """The files' names, and of each its rows and their digest."""
        return {name: {"rows": len(table), "rows_digest": rows_digest(table)} for name, (table, _, _) in self._tables.items()}

    @cached_property
    def _tables(self) -> dict[str, tuple[pa.Table, dict[str, str], list[int] | None]]:
        """By the file's name: its rows, its metadata, and the rows of each row group (None: one group)."""
        ids = pa.array([record.id for record, _, _ in self.examples], pa.string())
        targets = [targets for _, _, targets in self.examples]
        table, order = logits_table(ids, targets, self.form)
        groups = self.groups()
        contents: dict[str, tuple[pa.Table, dict[str, str], list[int] | None]] = {
            "records": (pa.Table.from_pylist([self._record(record, tokens) for record, tokens, _ in self.examples], RECORDS), {}, groups),
            "logits": (table, self.form.metadata(), groups),
            "ranks": (pa.table([np.diff(order, prepend=0).astype(np.int32)], RANKS), {}, None),
        }
        states = [t.hidden for t in targets if t.hidden is not None]
        if states:
            size = states[0].shape[1]
            elements = pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), sum(map(len, states)), [None, pa.py_buffer(np.concatenate(states).tobytes())])
            offsets = pa.array(np.cumsum([0, *map(len, states)]), pa.int32())
            columns = [ids, pa.ListArray.from_arrays(offsets, elements), lists_of([t.hidden_scale for t in targets], pa.float32())]
            contents["hidden"] = (pa.table(columns, hidden_schema(size)), {}, groups)
        if targets and targets[0].attention is not None:
            contents["attention"] = (attention_table(ids, targets), {}, groups)
        if self.tail is not None:
            means, positions = self.tail
            about = {key: self.form.metadata()[key] for key in ("rest_step", "no_rest")} | {"positions": str(positions)}
            contents["tail"] = (pa.table([encode_rests(mean) for mean in means], tail_schema(self.form.temperatures)), about, None)
        return {f"{content}-{self.number:05d}.parquet": (table, {"content": content} | about, cut) for content, (table, about, cut) in contents.items()}

    def _record(self, record: Record, tokens: Tokens) -> dict[str, Any]:
        return _row(record, self.keep_text) | {"token_id": tokens.ids, "start": tokens.start, "end": tokens.end, "kind": tokens.kind, "lead": tokens.lead}


def logits_table(ids: pa.Array, targets: list[Targets], form: Logits) -> tuple[pa.Table, np.ndarray]:
    """The rows of a logits file, and the order of tokens that their ranks are of."""
    kept = _flat([t.kept for t in targets], np.uint16)
    flat_ids = _flat([t.ids for t in targets], np.int32)
    drawn = form.method == "sampled"
    codes = _flat([t.counts for t in targets], np.uint8) if drawn else encode_logprobs(_flat([t.logprobs for t in targets], np.float32), kept, form.table)
    order = ranks(flat_ids)
    gaps, codes = encode_ids(flat_ids, codes, kept, order)
    positions = [len(t.position) for t in targets]
    entries = [len(t.ids) for t in targets]
    runs = [spans(t.position) for t in targets]
    columns: dict[str, Any] = {
        "record": ids,
        "first_position": lists_of([first for first, _ in runs], pa.int32()),
        "positions": lists_of([length for _, length in runs], pa.int32()),
        "kept": _list(kept, positions, pa.uint16()),
        "id_gap": _list(gaps, entries, pa.int32()),
        "logprob_code": _list(codes, entries, pa.uint8()),
        "realised_logprob": lists_of([t.realised_logprob for t in targets], pa.float32()),
        "entropy": lists_of([t.entropy for t in targets], pa.float16()),
    }
    if form.logsumexp:
        columns["logsumexp"] = lists_of([t.logsumexp for t in targets], pa.float32())
    for i, temperature in enumerate(form.temperatures):
        columns[rest_column(temperature)] = _list(encode_rests(_flat([t.rests[i] for t in targets], np.float32)), positions, pa.int16())
    for i in range(len(CLASSES) if form.boundary else 0):
        columns[boundary_column(i)] = lists_of([t.boundary[:, i] for t in targets if t.boundary is not None], pa.float16())
    schema = form.schema()
    return pa.table({name: columns[name] for name in schema.names}, schema), order


def attention_table(ids: pa.Array, targets: list[Targets]) -> pa.Table:
    """The rows of an attention file: of each layer the kept keys, their weights, and the weight of all others."""
    columns: dict[str, Any] = {"record": ids}
    layers = sorted(targets[0].attention or ())
    for layer in layers:
        parts = [t.attention[layer] for t in targets if t.attention is not None]
        rows = Rows.joined(parts)
        query = np.concatenate([np.repeat(t.position, heads_of(part, t.position)) for t, part in zip(targets, parts, strict=True)])
        entries = [len(part.key) for part in parts]
        columns[f"kept_{layer}"] = lists_of([part.kept.astype(np.uint8) for part in parts], pa.uint8())
        columns[f"key_gap_{layer}"] = _list(encode_keys(rows.key, rows.kept, query), entries, pa.int32())
        columns[f"weight_code_{layer}"] = _list(encode_weights(rows.weight), entries, pa.uint8())
        columns[f"rest_{layer}"] = lists_of([encode_weight_rests(part.rest) for part in parts], pa.uint16())
    return pa.table(columns, attention_schema(layers))


def write_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    columns = {
        "id": np.arange(len(vocabulary), dtype=np.int32),
        "bytes": vocabulary.token_bytes,
        "special": vocabulary.special,
        "first_byte_class": first_byte_classes(vocabulary).astype(np.uint8),
    }
    write_table(path, pa.table(columns, VOCABULARY), {"end_ids": ",".join(map(str, vocabulary.end_ids)), "classes": ",".join(CLASSES)})


class Background:
    """Does what it is given, one after another in a thread, while the caller goes on; at most `ahead` things wait.

    An error there is raised at the caller's next `do` or `check`, and what still waits is dropped. Leaving the block waits for all.
    """

    def __init__(self, ahead: int = 1) -> None:
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(ahead)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def do(self, work: Callable[[], None]) -> None:
        self.check()
        self._waiting.put(work)  # the thread takes everything that is put, so this cannot wait for ever

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (work := self._waiting.get()) is not None:
            if self._error is None:
                try:
                    work()
                except BaseException as error:
                    self._error = error

    def __enter__(self) -> "Background":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._waiting.put(None)
        self._thread.join()
        if kind is None:
            self.check()


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


def _flat(parts: list[Any], kind: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype=kind), *parts]).astype(kind, copy=False)


def _list(values: np.ndarray, lengths: list[int], kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), pa.array(values, kind))


def lists_of(parts: list[Any], kind: pa.DataType) -> pa.ListArray:
    return _list(_flat(parts, kind.to_pandas_dtype()), [len(part) for part in parts], kind)


def write_table(path: Path, table: pa.Table, metadata: dict[str, str], cut: list[int] | None = None, digest: str | None = None, repeated: Sequence[str] = ()) -> None:
    """cut: the rows of each row group; one group of all where it is left out. digest: of the rows; what stands under the name then stays.

    repeated: list columns with few different values.
    """
    # numbers that look random: neither dictionaries nor runs help, splitting their bytes does
    plain = [field.name for field in table.schema if field.name in (*RECORDS.names, *VOCABULARY.names) or pa.types.is_string(field.type)]
    split = [f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name for field in table.schema if field.name not in (*plain, *repeated) and _can_be_split(field.type)]
    dictionaries = [name for name in plain if not pa.types.is_list(table.schema.field(name).type)] + [f"{name}.list.element" for name in repeated]
    with appears_whole(path, absent=digest is not None) as temporary:
        with pq.ParquetWriter(
            temporary,
            table.schema.remove_metadata(),
            compression="zstd",
            compression_level=9,
            use_dictionary=dictionaries or False,
            column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT") or None,
            write_page_checksum=True,
            store_schema=False,  # Parquet's own types say it all
        ) as writer:
            writer.add_key_value_metadata({"format": str(FORMAT)} | metadata)
            first = 0
            for rows in cut or [len(table)]:
                writer.write_table(table.slice(first, rows), row_group_size=max(rows, 1))
                first += rows
        try:
            back = pq.read_table(temporary, page_checksum_verification=True)
            whole = len(back) == len(table) and (digest is None or rows_digest(back) == digest)
        except (pa.ArrowException, OSError):
            whole = False
        if not whole:  # closing a file on a full disk raises nothing
            raise OSError(errno.EIO, "This file could not be written whole; is the disk full?", str(path))


def _can_be_split(kind: pa.DataType) -> bool:
    """Not every reader knows BYTE_STREAM_SPLIT for these (DuckDB 2.0, polars 2.1), and they gain little."""
    value = kind.value_type if pa.types.is_list(kind) else kind
    return not (pa.types.is_float16(value) or pa.types.is_fixed_size_binary(value))
