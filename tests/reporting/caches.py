"""Tiny caches of every kind, in row groups of a few records."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipeline.cache.schema
from pipeline.files import write_json
from pipeline.running import folder as folders
from tests.conftest import CONFIG, link_inputs

VARIANTS = {
    "default": [],
    "everything": ["hidden=int8", "boundary=true", "logsumexp=true", "temperatures=[1, 1.5, 4]"],
    "sampled": ["method=sampled", "keep=50"],
}


@cache
def caches_of(made: Path) -> dict[str, Path]:
    """Folder of each variant, made once in a process. Not to be changed."""
    place = link_inputs(made, made.parent / f"{made.name}-caches")
    found = {}
    place.pipeline("prepare-data", CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.cache.schema, "GROUP_POSITIONS", 50)
        for name, settings in VARIANTS.items():
            changes = [word for setting in settings for word in ("--set", f"targets.logits.{setting}")]
            if name == "everything":
                changes += ["--set", "targets.attention={matched: 2, keys: 6, heads: each}"]
            if name == "sampled":  # what tiny.yaml trains with needs a tail
                changes += ["--set", "training.objective.0.tail=rest", "--set", "training.temperature=1"]
            found[name] = place.path / place.json("cache-teacher", CONFIG, *changes)["folder"]
    return found


def rewritten(folder: Path, name: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Another content with right hashes, as a faulty writer would leave it; row groups as they were."""
    with pq.ParquetFile(folder / name) as file:
        cuts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        table = change(file.read())
    with pq.ParquetWriter(folder / name, table.schema, write_page_checksum=True) as writer:
        begin = 0
        for rows in cuts:
            writer.write_table(table.slice(begin, rows))
            begin += rows
    hashed_again(folder, name)


def hashed_again(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = folders.describe(folder / name)
    manifest["self"] = folders._self_hash({key: value for key, value in manifest.items() if key != "self"})
    write_json(folder / "manifest.json", manifest)


def with_column(name: str, change: Callable) -> Callable[[pa.Table], pa.Table]:
    """A table with each row's value of a column changed."""

    def changed(table: pa.Table) -> pa.Table:
        index = table.schema.get_field_index(name)
        field = table.schema.field(index)
        return table.set_column(index, field, pa.array([change(value) for value in table[name].to_pylist()], field.type))

    return changed
