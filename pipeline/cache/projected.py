"""A cache as a student reads it: the student's tokens, and the teacher's word at its positions.

fit-projection leaves one file a shard that says, for each record, which student tokens the kept tokens' mass goes to; the numbers
themselves stay in the cache. Between equal vocabularies there is nothing to say, and no such file.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.digest import rows_digest
from pipeline.cache.reader import WINDOW, Cache, Example, decoding, read_table, split_lists
from pipeline.cache.writer import lists_of, write_table
from pipeline.errors import Mismatch
from pipeline.signals.counts import Counts
from pipeline.signals.projection import FORMS, Form, Projected, Shares, States, TokenMap, as_it_is, meet, projected
from pipeline.signals.records import Record, Tokens
from pipeline.signals.targets import with_realised

MAP = pa.schema([("student_id", pa.int32())])
COUNTS = pa.schema([("teacher_id", pa.int32()), ("student_id", pa.int32()), ("count", pa.int64())])
SHARES = pa.schema(
    [
        ("record", pa.string()),
        ("position", pa.list_(pa.int32())),
        ("row", pa.list_(pa.int32())),
        ("inside", pa.list_(pa.bool_())),
        ("reliability", pa.list_(pa.float32())),
        ("entries", pa.list_(pa.uint32())),
        ("kept", pa.list_(pa.uint16())),
        ("student_id", pa.list_(pa.int32())),
        ("log_share", pa.list_(pa.float32())),
    ]
)
VALUES = pa.schema(
    [
        ("record", pa.string()),
        ("position", pa.list_(pa.int32())),
        ("row", pa.list_(pa.int32())),
        ("entries", pa.list_(pa.uint16())),
        ("unkept", pa.list_(pa.int32())),
        ("student_id", pa.list_(pa.int32())),
        ("logprob", pa.list_(pa.float32())),
        ("rests", pa.list_(pa.float32())),
    ]
)
"""Of a method whose word is not the teacher's mass shared out. rests: of the first stored temperature for all positions, and so on."""
REPEATED = ("inside", "reliability", "log_share", "unkept")
"""Columns with few different values."""


@dataclass(frozen=True)
class Fitted:
    """What fit-projection left: the method, what it belongs to, and the map that the mass of all unkept tokens goes by."""

    method: str
    vocabulary: str
    """The digest of the teacher's vocabulary that it was made for."""
    rendering: str
    """And of the student's tokenizer and template."""
    form: Form
    student_id: np.ndarray  # int32 [V_teacher]


def write_map(path: Path, fitted: Fitted) -> dict[str, Any]:
    """Its rows and their digest. FileExistsError if the file is there with other bytes."""
    about = {"method": fitted.method, "vocabulary": fitted.vocabulary, "rendering": fitted.rendering, "form": fitted.form}
    return _written(path, pa.table({"student_id": fitted.student_id}, MAP), about)


def read_map(path: Path) -> Fitted:
    table = read_table(path, MAP)
    with decoding(path):
        about = {key.decode(): value.decode() for key, value in pq.read_schema(path).metadata.items()}
        return Fitted(about["method"], about["vocabulary"], about["rendering"], _form(about["form"]), table["student_id"].to_numpy())


def _form(name: str) -> Form:
    if name not in FORMS:
        raise ValueError(f"{name} is no form of a projection")
    return FORMS[FORMS.index(name)]


def write_shares(path: Path, records: list[str], found: list[Shares], first: list[np.ndarray], cut: list[int]) -> dict[str, Any]:
    """One row a record, and its rows and their digest. first: int64 [rows], where each row's kept tokens begin; cut: records of each row group."""
    found = [shares.in_order() for shares in found]
    count = [np.bincount(shares.owner, minlength=len(shares.position)) for shares in found]
    columns = {
        "record": pa.array(records, pa.string()),
        "position": lists_of([shares.position for shares in found], pa.int32()),
        "row": lists_of([shares.row for shares in found], pa.int32()),
        "inside": lists_of([shares.inside for shares in found], pa.bool_()),
        "reliability": lists_of([shares.reliability for shares in found], pa.float32()),
        "entries": lists_of(count, pa.uint32()),
        "kept": lists_of([shares.kept - begin[shares.row[shares.owner]] for shares, begin in zip(found, first, strict=True)], pa.uint16()),
        "student_id": lists_of([shares.student_id for shares in found], pa.int32()),
        "log_share": lists_of([shares.log_share if shares.log_share is not None else np.zeros(len(shares.kept)) for shares in found], pa.float32()),
    }
    table = pa.table(columns, SHARES)
    return _written(path, table, {}, cut)


def write_values(path: Path, records: list[str], found: list[Projected], cut: list[int]) -> dict[str, Any]:
    """One row a record, and its rows and their digest. cut: records of each row group."""
    columns = {
        "record": pa.array(records, pa.string()),
        "position": lists_of([word.position for word in found], pa.int32()),
        "row": lists_of([word.row for word in found], pa.int32()),
        "entries": lists_of([word.entries for word in found], pa.uint16()),
        "unkept": lists_of([word.unkept for word in found], pa.int32()),
        "student_id": lists_of([word.student_id for word in found], pa.int32()),
        "logprob": lists_of([word.logprobs for word in found], pa.float32()),
        "rests": lists_of([word.rests.flatten() for word in found], pa.float32()),
    }
    return _written(path, pa.table(columns, VALUES), {}, cut)


def write_counts(path: Path, counts: Counts) -> dict[str, Any]:
    """Its rows and their digest. FileExistsError if the file is there with other bytes."""
    teacher_id = np.repeat(np.arange(len(counts.begin) - 1, dtype=np.int32), np.diff(counts.begin))
    return _written(path, pa.table({"teacher_id": teacher_id, "student_id": counts.student_id, "count": counts.count}, COUNTS), {})


def read_counts(path: Path, teacher_size: int) -> Counts:
    table = read_table(path, COUNTS)
    teacher_id, student_id, count = (table[name].to_numpy() for name in COUNTS.names)
    return Counts.of_pairs(teacher_id, student_id, count, teacher_size)


def _written(path: Path, table: pa.Table, about: dict[str, str], cut: list[int] | None = None) -> dict[str, Any]:
    digest = rows_digest(table)
    write_table(path, table, about, cut, digest, [name for name in REPEATED if name in table.schema.names])
    return {"rows": len(table), "rows_digest": digest}


def shares_file(shard: int) -> str:
    return f"shares-{shard:05d}.parquet"


def values_file(shard: int) -> str:
    return f"values-{shard:05d}.parquet"


class StudentView:
    """Examples of a cache for one student. `render` gives the student's tokens of a record.

    file: the checked path of a file of fit-projection. rendering: what `render` does, in a digest. Where it does what the
    teacher's tokenizer did, the cache's own tokens are taken.
    """

    def __init__(self, cache: Cache, file: Callable[[str], Path], render: Callable[[Record], Tokens], rendering: str = "") -> None:
        self.fitted = read_map(file("projection.parquet"))
        if self.fitted.vocabulary != cache.about["vocabulary"]:
            raise Mismatch(
                "This projection was fitted for another teacher vocabulary than that of this cache. Run `pipeline fit-projection` on this cache, or give the folders of one experiment with --use."
            )
        if self.fitted.method != "identity" and self.fitted.rendering != rendering:
            raise Mismatch(
                "This projection was fitted for a student with another tokenizer or template. Run `pipeline fit-projection` with this experiment, or give the folders of one experiment with --use."
            )
        self.cache = cache
        self._file = file
        self._render = render
        self._alike = rendering == cache.about["rendering"] or cache.about["text"] != "keep"
        self._vocabulary_size = int(cache.about["vocabulary_size"])
        self._same = TokenMap(self.fitted.student_id) if self.fitted.method == "identity" else None
        self._open: OrderedDict[tuple[int, int], list[dict[str, Any]]] = OrderedDict()
        self._lock = Lock()

    def tokens(self, example: Example) -> Tokens:
        return example.tokens if self._alike else self._render(example.record)

    def projected(self, example: Example, tokens: Tokens, inside: bool = True) -> Projected:
        """inside: also at positions where the student's token begins inside a teacher's."""
        if self.fitted.form == "values":
            return self._values(example)
        teacher = example.tokens
        targets = with_realised(example.targets, teacher.ids[example.targets.position + 1], self.cache.temperatures)
        if self._same is None:
            first = np.concatenate([[0], np.cumsum(targets.kept.astype(np.int64))])
            shares = self.shares(example, first)
            return projected(targets, shares if inside else shares.where(~shares.inside), self._vocabulary_size)
        if self._same.is_identity and teacher is tokens and np.array_equal(targets.position, teacher.answer_positions()):
            return as_it_is(targets, self._vocabulary_size)
        return projected(targets, self._same.shares(meet(example.record.content, teacher, targets, tokens)), self._vocabulary_size)

    def shares(self, example: Example, first: np.ndarray) -> Shares:
        """What fit-projection said of a record. first: int64 [rows], where each row's kept tokens begin."""
        stored, path = self._stored(example, shares_file, SHARES)
        with decoding(path):
            owner = np.repeat(np.arange(len(stored["position"])), stored["entries"])
            if (stored["kept"] >= np.diff(first)[stored["row"]][owner]).any():
                raise ValueError("it names a kept token that the cache does not have there")
            return Shares(
                position=stored["position"].astype(np.int64),
                row=stored["row"].astype(np.int64),
                inside=stored["inside"],
                reliability=stored["reliability"],
                owner=owner,
                kept=stored["kept"] + first[stored["row"]][owner],
                student_id=stored["student_id"],
                log_share=stored["log_share"],
            )

    def _values(self, example: Example) -> Projected:
        stored, path = self._stored(example, values_file, VALUES)
        targets = example.targets
        row = stored["row"].astype(np.int64)
        with decoding(path):
            return Projected(
                position=stored["position"].astype(np.int64),
                entries=stored["entries"].astype(np.int64),
                student_id=stored["student_id"],
                logprobs=stored["logprob"],
                log_share=None,
                rests=stored["rests"].reshape(len(self.cache.temperatures), -1),
                unkept=stored["unkept"].astype(np.int64),
                reliability=np.ones(len(row), dtype=np.float32),
                row=row,
                states=States.of(targets, row),
            )

    def _stored(self, example: Example, named: Callable[[int], str], schema: pa.Schema) -> tuple[dict[str, Any], Path]:
        """What fit-projection wrote of a record, and in which file."""
        shard, group, row = example.place
        path = self._file(named(shard))
        with self._lock:
            if (shard, group) not in self._open:
                self._open[shard, group] = _read_group(path, schema, group)
                while len(self._open) > WINDOW + 1:
                    self._open.popitem(last=False)
            self._open.move_to_end((shard, group))
            stored = self._open[shard, group][row]
        with decoding(path):
            if stored["record"] != example.record.id:
                raise ValueError(f"it has {stored['record']} where the cache has {example.record.id}")
        return stored, path


def _read_group(path: Path, schema: pa.Schema, group: int) -> list[dict[str, Any]]:
    """One dictionary a record."""
    table = read_table(path, schema, group)
    with decoding(path):
        columns = {name: table[name].to_pylist() if name == "record" else split_lists(table[name]) for name in schema.names}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
