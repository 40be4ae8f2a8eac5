"""docs/cache-format.md is enough to read a cache: its programs are run as they stand, and another reader is written here from the page alone."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cache.reader import Cache
from pipeline.running.folder import FinishedFolder
from pipeline.signals.codec import decode_hidden
from pipeline.signals.targets import rest_at
from tests.conftest import ROOT
from tests.reporting.caches import VARIANTS, caches_of

PAGE = (ROOT / "docs" / "cache-format.md").read_text(encoding="utf-8")
PYTHON = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "def records_of" in block)
SQL = re.search(r"```sql\n(.*?)```", PAGE, re.S).group(1)  # type: ignore[union-attr]
EXTRAS = {"default": ("entropy",), "sampled": ("entropy",), "everything": ("entropy", "hidden")}


@pytest.fixture(scope="module")
def caches(made: Path) -> dict[str, Path]:
    return caches_of(made)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's program as a file."""
    path = tmp_path_factory.mktemp("program") / "read_cache.py"
    path.write_text(PYTHON, encoding="utf-8")
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pages_program_reads_what_the_pipeline_reads(caches: dict[str, Path], program: Path, variant: str):
    page, folder = runpy.run_path(str(program)), caches[variant]
    reader = Cache(FinishedFolder(folder).file, EXTRAS[variant])
    for shard in range(len(reader.about["shards"])):
        theirs = list(page["records_of"](folder, shard))
        ours = list(reader.of_shard(shard))
        assert [record["id"] for record, _ in theirs] == [example.record.id for example in ours]
        for (record, positions), example in zip(theirs, ours, strict=True):
            targets = example.targets
            ends = np.cumsum(targets.kept)
            assert record["token_id"] == example.tokens.ids.tolist()
            assert [said["position"] for said in positions] == targets.position.tolist()
            unkept = reader.about["vocabulary_size"] - targets.kept.astype(np.int64)
            for i, (said, end) in enumerate(zip(positions, ends, strict=True)):
                here = slice(end - targets.kept[i], end)
                order = np.argsort(said["ids"])
                by_id = np.argsort(targets.ids[here])
                assert said["ids"][order].tolist() == targets.ids[here][by_id].tolist()
                np.testing.assert_allclose(said["logprobs"][order], targets.logprobs[here][by_id], atol=1e-5)
                assert (said["realised_logprob"], said["entropy"]) == (targets.realised_logprob[i], targets.entropy[i])
            for temperature in (*reader.temperatures, 1.25, 2.5, 20.0):
                found = [page["rest_at"](said["rests"], said["unkept"], temperature) for said in positions]
                np.testing.assert_allclose(found, rest_at(targets.rests, reader.temperatures, unkept, temperature), atol=1e-4)
                kept, others = page["distribution"](positions[0], temperature)
                assert sum(kept.values()) + others == pytest.approx(1)


def test_the_pages_program_reads_tails_and_hidden_states(caches: dict[str, Path], program: Path):
    page, folder = runpy.run_path(str(program)), caches["everything"]
    reader = Cache(FinishedFolder(folder).file, ("hidden",))
    tail = reader.tail()
    found = page["tail_means"](folder, reader.about["tail_shards"])
    assert tail is not None
    assert list(found) == reader.temperatures
    np.testing.assert_allclose(np.stack(list(found.values())), np.exp(tail.log_means), rtol=1e-4)
    for (id, states), example in zip(page["hidden_states"](folder, 0), reader.of_shard(0), strict=True):
        assert id == example.record.id
        np.testing.assert_allclose(states, decode_hidden(example.targets.hidden, example.targets.hidden_scale), rtol=1e-5)


def test_the_pages_program_reads_attention(caches: dict[str, Path], program: Path):
    page, folder = runpy.run_path(str(program)), caches["everything"]
    reader = Cache(FinishedFolder(folder).file, ("attention",))
    for layer in reader.about["attention"]["layers"]:
        for (id, rows), example in zip(page["attention_rows"](folder, 0, layer), reader.of_shard(0), strict=True):
            assert id == example.record.id
            wanted = example.targets.attention[layer]
            assert len(rows) == len(wanted.rest) == reader.about["attention"]["heads"] * len(example.targets.position)
            keys, weights = ([pair[i] for row, _ in rows for pair in row.items()] for i in (0, 1))
            assert keys == wanted.key.tolist()
            np.testing.assert_allclose(weights, wanted.weight, rtol=1e-5)
            np.testing.assert_allclose([rest for _, rest in rows], wanted.rest, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pages_program_runs_as_it_stands(caches: dict[str, Path], program: Path, variant: str):
    done = subprocess.run([sys.executable, str(program), str(caches[variant])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| others") > 5


def rows_with(tool: str, path: Path, columns: list[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A Parquet file's rows and metadata, with no help of the pipeline."""
    if tool == "pyarrow":
        table = pq.read_table(path, columns=columns)
        return table.to_pylist(), {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is not installed (pip install duckdb); the same test runs with pyarrow alone")
    found = duckdb.sql(f"SELECT {', '.join(columns)} FROM '{path}'")
    rows = [dict(zip(columns, row, strict=True)) for row in found.fetchall()]
    about = duckdb.sql(f"SELECT key, value FROM parquet_kv_metadata('{path}')").fetchall()
    return rows, {bytes(key).decode(): bytes(value).decode() for key, value in about if bytes(key) != b"ARROW:schema"}


@pytest.mark.parametrize("tool", ["duckdb", "pyarrow"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_shard_can_be_read_by_following_the_page(caches: dict[str, Path], variant: str, tool: str):
    folder = caches[variant]
    columns = ["record", "first_position", "positions", "kept", "id_gap", "logprob_code", "rest_1", "realised_logprob"]
    said, about = rows_with(tool, folder / "logits-00001.parquet", columns)
    ranks, of_ranks = rows_with(tool, folder / "ranks-00001.parquet", ["id_gap"])
    assert about["format"] == of_ranks["format"] == "2"
    token, token_of_rank = 0, []
    for row in ranks:
        token += row["id_gap"]
        token_of_rank.append(token)
    table = json.loads(about["code_table"])
    reader = Cache(FinishedFolder(folder).file)
    for row, example in zip(said, reader.of_shard(1), strict=True):
        found, entry = {}, 0
        places = [first + n for first, length in zip(row["first_position"], row["positions"], strict=True) for n in range(length)]
        for i, (position, kept) in enumerate(zip(places, row["kept"], strict=True)):
            rank, stored = 0, {}
            for _ in range(kept):
                rank += row["id_gap"][entry]
                stored[token_of_rank[rank]] = table[row["logprob_code"][entry]]
                entry += 1
            rest = -np.inf if row["rest_1"][i] == int(about["no_rest"]) else row["rest_1"][i] * float(about["rest_step"])
            total = np.log(sum(np.exp(value) for value in stored.values()) + np.exp(rest))
            found |= {(position, id): value - total for id, value in stored.items()} | {(position, "rest"): rest - total}
        targets = example.targets
        owner = np.repeat(targets.position, targets.kept)
        expected = {(int(p), int(id)): logprob for p, id, logprob in zip(owner, targets.ids, targets.logprobs, strict=True)}
        expected |= {(int(p), "rest"): rest for p, rest in zip(targets.position, targets.rests[0], strict=True)}
        assert row["record"] == example.record.id
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), [expected[key] for key in found], atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_pages_sql_reads_what_the_pipeline_reads(caches: dict[str, Path], variant: str, monkeypatch: pytest.MonkeyPatch):
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is not installed (pip install duckdb)")
    monkeypatch.chdir(caches[variant])
    rows = {(record, position, int(id)): (logprob, -np.inf if rest is None else rest) for record, position, id, logprob, rest in duckdb.sql(SQL).fetchall()}
    expected = {}
    for example in Cache(FinishedFolder(caches[variant]).file).of_shard(0):
        targets = example.targets
        owner = np.repeat(np.arange(len(targets.kept)), targets.kept)
        expected |= {(example.record.id, int(targets.position[i]), int(id)): (logprob, targets.rests[0, i]) for i, id, logprob in zip(owner, targets.ids, targets.logprobs, strict=True)}
    assert rows.keys() == expected.keys()
    np.testing.assert_allclose([rows[key] for key in expected], list(expected.values()), atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_page_names_everything_that_is_in_a_cache(caches: dict[str, Path], variant: str):
    folder = caches[variant]
    named = set(re.findall(r"`([^`\n]+)`", PAGE))
    named |= {f"{name}_{number}" for name in ("rest", "mean") for number in ("1", "1.5", "2", "4", "8") if f"{name}_T" in named}
    named |= {f"{name}_{layer}" for name in ("kept", "key_gap", "weight_code", "rest") for layer in (0, 1) if f"{name}_L" in named}
    named |= {f"boundary_{i}" for i in range(16)} if {"boundary_0", "boundary_15"} <= named else set()
    said = set()
    for file in folder.glob("*.parquet"):
        schema = pq.read_schema(file)
        said |= {*schema.names, *(key.decode() for key in schema.metadata)}
        assert any(re.sub(r"\d{5}", "NNNNN", file.name) in name for name in named)
    said |= set(json.loads((folder / "cache.json").read_text()))
    said |= {key for shard in json.loads((folder / "cache.json").read_text())["shards"] for key in shard}
    said |= set(json.loads((folder / "manifest.json").read_text()))
    assert said <= named, said - named
    assert {file.name for file in folder.iterdir() if file.suffix in {".json", ".safetensors"}} <= named
