"""`pipeline export`: what the reader reads, in columns that any tool reads."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.cache.reader import Cache
from pipeline.running.folder import FinishedFolder
from tests.conftest import Place
from tests.reporting.caches import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plain_columns_are_what_the_reader_reads(caches: dict[str, Path], tmp_path: Path, variant: str):
    folder = caches[variant]
    written = Place(tmp_path).json("export", str(folder), "--format", "plain", "--to", str(tmp_path / "plain"))
    reader = Cache(FinishedFolder(folder).file, ("entropy",))
    assert [Path(file).name for file in written["files"]] == [f"{split}-{shard:05d}.parquet" for split in ("train", "heldout") for shard in reader.shards(split)]
    rows = [row for file in written["files"] for row in pq.read_table(file).to_pylist()]
    examples = [example for split in ("train", "heldout") for example in reader.examples(split)]
    for row, example in zip(rows, examples, strict=True):
        record, targets = example.record, example.targets
        assert (row["id"], row["specialty"], row["split"], row["choice_of"]) == (record.id, record.specialty, record.split, record.choice_of)
        assert [(part["role"], part["text"]) for part in row["segments"]] == [(segment.role, segment.text) for segment in record.segments]
        assert row["token_ids"] == example.tokens.ids.tolist()
        assert row["positions"] == targets.position.tolist()
        for name, values in (("rest", targets.rests[0]), ("realised_logprob", targets.realised_logprob), ("entropy", targets.entropy)):
            assert row[name] == values.tolist()
        ends = np.cumsum([0, *targets.kept]).tolist()
        for i, (begin, end) in enumerate(pairwise(ends)):
            assert row["logprobs"][i] == sorted(row["logprobs"][i], reverse=True)
            assert dict(zip(row["ids"][i], row["logprobs"][i], strict=True)) == dict(zip(targets.ids[begin:end].tolist(), targets.logprobs[begin:end].tolist(), strict=True))
            assert np.exp(row["logprobs"][i]).sum() + np.exp(row["rest"][i]) == pytest.approx(1, abs=1e-6)


def test_datasets_reads_an_export(caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from datasets import load_dataset

    Place(tmp_path).pipeline("export", str(caches["default"]), "--to", str(tmp_path / "plain"))
    files = {split: str(tmp_path / "plain" / f"{split}-*.parquet") for split in ("train", "heldout")}
    loaded = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "datasets"))
    about = json.loads((caches["default"] / "cache.json").read_text())
    assert {split: len(loaded[split]) for split in files} == {split: sum(shard["records"] for shard in about["shards"] if shard["split"] == split) for split in files}
    row = loaded["train"][0]
    assert len(row["ids"]) == len(row["logprobs"]) == len(row["positions"]) == len(row["rest"])


def test_one_split_alone_and_nothing_is_written_over(caches: dict[str, Path], tmp_path: Path):
    place, folder, to = Place(tmp_path), str(caches["default"]), str(tmp_path / "plain")
    place.pipeline("export", folder, "--to", to, "--split", "heldout")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "plain").iterdir()}
    assert before
    assert all(file.name.startswith("heldout-") for file in before)
    assert "overwrites nothing" in place.pipeline("export", folder, "--to", to, status=2)
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "plain").iterdir()}


def test_only_a_finished_cache_is_exported(caches: dict[str, Path], tmp_path: Path):
    place, to = Place(tmp_path), str(tmp_path / "plain")
    prepared = next((caches["default"].parent.parent / "prepare-data").iterdir())
    assert "not a cache" in place.pipeline("export", str(prepared), "--to", to, status=2)
    assert "manifest.json" in place.pipeline("export", str(tmp_path), "--to", to, status=2)
    place.pipeline("export", str(tmp_path / "nowhere"), "--to", to, status=2)
    assert not Path(to).exists()
    assert "export" in place.pipeline("--help")
