"""A cache as plain Parquet that any tool reads: token ids and log-probabilities in ordinary list columns."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.reader import Cache, Example
from pipeline.cache.schema import SEGMENT
from pipeline.errors import InputError
from pipeline.files import appears_whole

PLAIN = pa.schema(
    [
        ("id", pa.string()),
        ("specialty", pa.string()),
        ("split", pa.string()),
        ("choice_of", pa.string()),
        ("segments", pa.list_(SEGMENT)),
        ("token_ids", pa.list_(pa.int32())),
        ("positions", pa.list_(pa.int32())),
        ("ids", pa.list_(pa.list_(pa.int32()))),
        ("logprobs", pa.list_(pa.list_(pa.float32()))),
        ("rest", pa.list_(pa.float32())),
        ("realised_logprob", pa.list_(pa.float32())),
        ("entropy", pa.list_(pa.float32())),
    ]
)


def export_plain(file: Callable[[str], Path], to: Path, splits: list[str]) -> list[Path]:
    """The files written: SPLIT-NNNNN.parquet for each shard of a cache, one row a record; one row group in memory.

    file: the path of one of the cache's files by its name, as `Cache` takes it. InputError if a file is there already.
    """
    cache = Cache(file, ("entropy",))
    shards = {to / f"{split}-{shard:05d}.parquet": shard for split in splits for shard in cache.shards(split)}
    there = [path for path in shards if path.exists()]
    if there:
        raise InputError(f"{there[0]} is there already{f' (and {len(there) - 1} more)' if there[1:] else ''}, and export overwrites nothing. Remove what is there, or give another folder with --to.")
    for path, shard in shards.items():
        with appears_whole(path) as temporary, pq.ParquetWriter(temporary, PLAIN, compression="zstd") as writer:
            for group in range(len(cache.about["shards"][shard]["groups"])):
                writer.write_table(_plain(cache.of_group(shard, group)))
    return list(shards)


def _plain(examples: list[Example]) -> pa.Table:
    targets = [example.targets for example in examples]
    records = [example.record for example in examples]
    positions = [len(t.position) for t in targets]
    kept = np.concatenate([t.kept for t in targets]).astype(np.int64)
    ids, logprobs = (np.concatenate([getattr(t, name) for t in targets]) for name in ("ids", "logprobs"))
    strongest_first = np.lexsort((ids, -logprobs, np.repeat(np.arange(len(kept)), kept)))
    segments = [[{"role": segment.role, "text": segment.text if example.has_text else None} for segment in example.record.segments] for example in examples]
    columns = {
        **{name: [getattr(record, name) for record in records] for name in ("id", "specialty", "split", "choice_of")},
        "segments": segments,
        "token_ids": _lists([example.tokens.ids for example in examples]),
        "positions": _lists([t.position for t in targets]),
        "ids": _cut(_cut(pa.array(ids[strongest_first]), kept), positions),
        "logprobs": _cut(_cut(pa.array(logprobs[strongest_first]), kept), positions),
        "rest": _lists([t.rests[0] for t in targets]),
        "realised_logprob": _lists([t.realised_logprob for t in targets]),
        "entropy": _lists([t.entropy for t in targets]),
    }
    return pa.table(columns, PLAIN)


def _lists(parts: list[Any]) -> pa.ListArray:
    return _cut(pa.array(np.concatenate(parts)), [len(part) for part in parts])


def _cut(values: pa.Array, lengths: Sequence[int] | np.ndarray) -> pa.ListArray:
    """Lists of these lengths."""
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), values)
