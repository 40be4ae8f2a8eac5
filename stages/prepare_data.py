"""Datasets to clean records: read, drop what is there twice, split by content, keep the held-out split out of training."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from pipeline.cache.plan import GROUPS
from pipeline.cache.writer import write_prepared
from pipeline.config import Data, Dataset
from pipeline.datasets._rows import record_of_row
from pipeline.errors import InputError
from pipeline.files import as_json
from pipeline.lookup import find
from pipeline.running.folder import RunFolder
from pipeline.signals.records import Record


def run(data: Data, out: RunFolder) -> dict[str, Any]:
    dropped: Counter[str] = Counter()
    heldout = _unique(_records(data.heldout.datasets, dropped), set(), dropped)
    known = {record.digest() for record in heldout}
    train = _unique(_records(data.train, dropped), known, dropped)

    share = data.heldout.fraction or 0.0
    chosen = [record for record in train if _position(record) < share]
    heldout += chosen
    asked = {record.question_digest() for record in heldout}
    groups = {record.group for record in heldout if record.group}
    rest = [record for record in train if _position(record) >= share]
    train = [record for record in rest if record.question_digest() not in asked and record.group not in groups]
    dropped["in_heldout"] += len(rest) - len(train)

    _refuse_repeated_ids([*train, *heldout])
    if not train:
        raise InputError("No training record is left. Look at data.train (limit, skip) and data.heldout.fraction.")
    if not heldout:
        raise InputError("No record is held out, and evaluate needs some. Give data.heldout a larger fraction, or datasets of its own.")
    splits = {"train": train, "heldout": heldout}
    digests = {split: write_prepared(out.path / f"{split}.parquet", [replace(record, split=split) for record in records], data.records_per_shard) for split, records in splits.items()}
    out.keep(*(f"{split}.parquet" for split in splits))
    with out.result(GROUPS) as file:
        file.write_text(as_json(digests), encoding="utf-8")
    specialties = Counter(record.specialty or "none" for record in train)
    return {"train": len(train), "heldout": len(heldout), "dropped": dict(sorted(dropped.items())), "specialties": dict(specialties.most_common())}


def _records(entries: list[Dataset], dropped: Counter[str]) -> Iterator[Record]:
    for entry in entries:
        rows = find("datasets", entry.dataset)(**entry.options())
        stop = None if entry.limit is None else entry.skip + entry.limit
        for row in islice(rows, entry.skip, stop):
            try:
                yield record_of_row(row, entry.dataset, entry.weight)
            except InputError:
                if entry.incomplete == "stop":
                    raise
                dropped["incomplete"] += 1


def _unique(records: Iterator[Record], known: set[str], dropped: Counter[str]) -> list[Record]:
    """Without what is among them twice or known already."""
    seen: set[str] = set()
    unique = []
    for record in records:
        digest = record.digest()
        reason = "in_heldout" if digest in known else "duplicate" if digest in seen else None
        if reason:
            dropped[reason] += 1
        else:
            seen.add(digest)
            unique.append(record)
    return unique


def _position(record: Record) -> float:
    """In [0, 1), by the record's group or else its question: what belongs together falls on the same side of the split."""
    text = f"heldout\0{record.group or record.question_digest()}"
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13


def _refuse_repeated_ids(records: list[Record]) -> None:
    repeated = [id for id, count in Counter(record.id for record in records).items() if count > 1]
    if repeated:
        raise InputError(f"{len(repeated)} ids stand for more than one record, '{repeated[0]}' for one. Leave `id` out of `fields`: ids are then made from the content.")
