"""Which shards a cache has, and what each is made from: shards of equal keys are equal, whichever cache they were made for."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.files import read_json

GROUPS = "groups.json"
"""Of prepare-data: by split, the digest of the records of each row group."""
TAIL_SHARDS = 16
"""Training shards, evenly spread, over which the tail marginals are summed up: enough for means, and little work."""


@dataclass(frozen=True)
class PlannedShard:
    number: int
    split: str
    group: int
    """The row group of the prepared records."""
    key: str
    tail: bool

    @property
    def name(self) -> str:
        return f"{self.number:05d}"

    def renamed(self, files: list[str]) -> dict[str, str]:
        """The files of an equal shard of another number -> what they are called here; none if it lacks a tail that is wanted."""
        if self.tail and not any(file.startswith("tail-") for file in files):
            return {}
        return {file: f"{file.split('-')[0]}-{self.name}.parquet" for file in files if self.tail or not file.startswith("tail-")}


def planned_shards(settings: str, prepared: Callable[[str], Path], with_tails: bool = True) -> list[PlannedShard]:
    """The shards, those of `train` first. settings: the digest of all that they are made with; prepared: the files of prepare-data."""
    groups = read_json(prepared(GROUPS))
    with_tail = tails(len(groups["train"])) if with_tails else set()
    parts = [(split, group, records) for split in ("train", "heldout") for group, records in enumerate(groups[split])]
    return [
        PlannedShard(number, split, group, hashlib.sha256(f"{settings}\0{split}\0{records}".encode()).hexdigest(), split == "train" and group in with_tail)
        for number, (split, group, records) in enumerate(parts)
    ]


def tails(count: int) -> set[int]:
    """Every 2^n-th training shard: those that still have a tail when data is appended had one before."""
    step = 1
    while -(-count // step) > TAIL_SHARDS:
        step *= 2
    return set(range(0, count, step))


def keys(settings: str, file: Callable[[str, str], Path]) -> list[str]:
    """What `pipeline status` looks for among the shards of other caches. file: a stage's file by its name."""
    return [shard.key for shard in planned_shards(settings, lambda name: file("prepare-data", name))]
