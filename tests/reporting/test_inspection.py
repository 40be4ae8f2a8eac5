"""`pipeline inspect` and `pipeline verify` on caches of every kind."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from matplotlib.image import imread

from pipeline.cache.reader import Cache
from pipeline.reporting.inspection import cache, record, undecodable
from pipeline.running.folder import FinishedFolder
from tests.conftest import Place
from tests.reporting.caches import VARIANTS, hashed_again, rewritten, with_column


def targets_of(folder: Path) -> list[Any]:
    reader = Cache(FinishedFolder(folder).file, ("entropy",))
    return [example.targets for split in ("train", "heldout") for example in reader.examples(split)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_inspect_counts_what_the_reader_reads(caches: dict[str, Path], variant: str):
    shown = cache(caches[variant])
    targets = targets_of(caches[variant])
    kept = np.concatenate([t.kept for t in targets])
    mass = np.concatenate([np.add.reduceat(np.exp(t.logprobs.astype(np.float64)), np.cumsum(t.kept, dtype=np.int64) - t.kept) for t in targets])
    entropy = np.concatenate([t.entropy for t in targets])
    assert (shown["positions"], shown["mean_kept"]) == (len(kept), round(kept.mean(), 2))
    assert shown["kept"] | {"min": kept.min(), "max": kept.max(), "mean": round(kept.mean(), 2)} == shown["kept"]
    assert shown["kept"]["median"] == np.quantile(kept, 0.5, method="inverted_cdf")
    assert shown["kept"]["p90"] == np.quantile(kept, 0.9, method="inverted_cdf")
    assert shown["kept"]["at_min"] == (kept == shown["kept"]["setting_min"]).sum()
    assert shown["kept"]["at_keep"] == (kept == shown["kept"]["setting_keep"]).sum()
    assert shown["mean_kept_mass"] == pytest.approx(mass.mean(), abs=1e-4)
    assert shown["mean_entropy"] == pytest.approx(entropy.mean(), abs=1e-4)
    for row in shown["kept_mass"]:
        clear = 1e-6  # of the bins' edges
        inside = ((mass > row["from"] + clear) & (mass < row["to"] - clear)).sum()
        around = ((mass > row["from"] - clear) & (mass < row["to"] + clear)).sum()
        assert inside <= row["positions"] <= around
    assert sum(row["positions"] for row in shown["kept_mass"]) == len(kept)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_bytes_of_the_columns_add_up_to_the_files(caches: dict[str, Path], variant: str):
    folder = caches[variant]
    shown = cache(folder)
    sizes = {kind: sum(file.stat().st_size for file in folder.glob(f"{kind}-*.parquet")) for kind in ("records", "logits", "ranks", "hidden", "tail")}
    assert sum(row["bytes"] for row in shown["columns"]) == sizes["logits"] + sizes["ranks"]
    assert shown["bytes_per_position"] == round((sizes["logits"] + sizes["ranks"]) / shown["positions"], 2)
    assert shown["bytes_per_token"] == round((sum(sizes.values()) - sizes["tail"]) / shown["tokens"], 2)
    files = {row["files"]: row["bytes"] for row in shown["files"]}
    assert {kind: files[kind] for kind in sizes} == sizes
    assert (files["hidden"] > 0) == (variant == "everything")
    assert ("boundary_*" in {row["column"] for row in shown["columns"]}) == (variant == "everything")
    assert {row["column"] for row in shown["columns"]} >= {"id_gap", "logprob_code", "rest_1", "kept", "realised_logprob", "entropy"}
    assert ("rest_1.5" in {row["column"] for row in shown["columns"]}) == (variant == "everything")


def test_inspect_speaks_to_people_and_to_programs(caches: dict[str, Path]):
    place, folder = Place(caches["default"].parent), str(caches["default"])
    text = place.pipeline("inspect", folder)
    for part in ("bytes_per_position", "logits and ranks files", "median", "at `min` (4)", "at `keep` (16)", "0.99 to 0.999", "id_gap", "█", "tail"):
        assert part in text
    assert "\x1b" not in text
    assert place.json("inspect", folder) == json.loads(json.dumps(cache(caches["default"])))
    assert "by definition" in place.pipeline("inspect", str(caches["sampled"]))


def test_a_picture_of_a_cache_and_of_nothing_else(caches: dict[str, Path], tmp_path: Path):
    place, picture = Place(tmp_path), tmp_path / "cache.png"
    for variant in VARIANTS:
        place.pipeline("inspect", str(caches[variant]), "--png", str(picture))
        height, width, _ = imread(picture).shape
        assert height > 300
        assert width > 900
        assert len(np.unique(imread(picture)[..., :3].reshape(-1, 3), axis=0)) > 50
        picture.unlink()
    prepared = next((caches["default"].parent.parent / "prepare-data").iterdir())
    assert "not a cache" in place.pipeline("inspect", str(prepared), "--png", str(picture), status=2)
    assert "--png" in place.pipeline("inspect", str(caches["default"]), "--png", str(picture), "--record", "r0", status=2)
    assert not picture.exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_record_is_shown_strongest_token_first(caches: dict[str, Path], variant: str):
    shown = record(caches[variant], "r0")
    reader = Cache(FinishedFolder(caches[variant]).file)
    example = next(example for split in ("train", "heldout") for example in reader.examples(split) if example.record.id == "r0")
    ends = np.cumsum(example.targets.kept)
    assert [row["position"] for row in shown["positions"]] == example.targets.position.tolist()
    for row, end, kept in zip(shown["positions"], ends, example.targets.kept, strict=True):
        pairs = list(zip(row["kept_logprobs"], row["kept_ids"], strict=True))
        assert pairs == sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
        stored = dict(zip(example.targets.ids[end - kept : end].tolist(), example.targets.logprobs[end - kept : end].tolist(), strict=True))
        assert {id: logprob for logprob, id in pairs} == stored
    text = Place(caches[variant]).pipeline("inspect", str(caches[variant]), "--record", "r0")
    first = text.splitlines()[1].split(" | ")[1].split(", ")
    assert [float(word.split()[-1]) for word in first] == sorted((float(word.split()[-1]) for word in first), reverse=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_whole_cache_has_nothing_that_cannot_be_true(caches: dict[str, Path], variant: str):
    assert undecodable(caches[variant]) == {}


def plus(number: float) -> Callable[[list], list]:
    return lambda values: [value + number for value in values]


def first_changed(change: Callable[[Any], Any]) -> Callable[[list], list]:
    return lambda values: [change(values[0]), *values[1:]]


def moved(column: str, place: int, number: int) -> Callable[[pa.Table], pa.Table]:
    """One value of a column of numbers changed."""

    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[place] += number
        return table.set_column(table.schema.get_field_index(column), table.schema.field(column), pa.array(values, table.schema.field(column).type))

    return change


CANNOT_BE = {
    "a rest that is too small": ("default", "logits", with_column("rest_1", plus(-20)), "do not sum to 1"),
    "a single rest that is too large": ("default", "logits", with_column("rest_1", first_changed(lambda value: -1)), "do not sum to 1"),
    "codes that are too weak": ("default", "logits", with_column("logprob_code", plus(3)), "do not sum to 1"),
    "a token that is kept twice": ("default", "logits", with_column("id_gap", lambda gaps: [gaps[0], 0, *gaps[2:]]), "twice"),
    "a rank that no token has": ("default", "logits", with_column("id_gap", first_changed(lambda gap: gap + 10000)), "no token has"),
    "ids that are one off": ("default", "ranks", moved("id_gap", 0, 1), "follow"),
    "ids beyond the vocabulary": ("default", "ranks", moved("id_gap", 5, 100000), "not in the vocabulary"),
    "an id twice in the ranks": ("default", "ranks", with_column("id_gap", lambda gap: 0), "token twice"),
    "counts that do not fit the tokens": ("default", "logits", with_column("kept", first_changed(lambda count: count + 1)), "same length"),
    "too few tokens": ("default", "logits", lambda table: table.replace_schema_metadata({**table.schema.metadata, b"least": b"16"}), "fewer than 16"),
    "a follower that is more likely": ("default", "logits", with_column("realised_logprob", plus(-0.7)), "follow"),
    "a follower above 1": ("default", "logits", with_column("realised_logprob", plus(30)), "above 0"),
    "a negative entropy": ("default", "logits", with_column("entropy", plus(-9)), "entropy"),
    "no entropy at all": ("default", "logits", with_column("entropy", first_changed(lambda value: math.nan)), "entropy"),
    "a rest that falls with the temperature": ("default", "logits", with_column("rest_8", plus(-200)), "fall with the temperature"),
    "a rest larger than the vocabulary": ("default", "logits", with_column("rest_8", plus(200)), "exceed"),
    "positions that are not the answer's": ("default", "logits", with_column("first_position", plus(-1)), "other positions"),
    "spans that do not fit": ("default", "logits", with_column("positions", plus(1)), "same length"),
    "records in another order": ("default", "logits", lambda table: table.set_column(0, table.schema.field(0), table["record"].take(list(range(len(table)))[::-1])), "same records"),
    "another text": ("default", "records", with_column("segments", lambda parts: [{"role": part["role"], "text": "x"} for part in parts]), "another text"),
    "a foreign token": ("default", "records", with_column("token_id", first_changed(lambda id: 99999)), "not in the vocabulary"),
    "a tail that is too heavy": ("default", "tail", with_column("mean_1", lambda value: min(value + 60, 0)), "other masses"),
    "a tail of fewer tokens": ("default", "tail", lambda table: table.slice(0, len(table) - 1), "row for each token"),
    "a scale that is none": ("everything", "hidden", with_column("scale", first_changed(lambda value: math.nan)), "scale"),
    "fewer states": ("everything", "hidden", with_column("state", lambda states: states[1:]), "records and positions"),
    "classes that are too likely": ("everything", "logits", with_column("boundary_6", lambda values: [0.0] * len(values)), "classes"),
    "an infinite logsumexp": ("everything", "logits", with_column("logsumexp", first_changed(lambda value: math.inf)), "logsumexp"),
    "a column that is too short": ("everything", "logits", with_column("boundary_3", lambda values: values[1:]), "boundary_3"),
    "draws that are too many": ("sampled", "logits", with_column("logprob_code", first_changed(lambda count: count + 1)), "50 times"),
    "a rest of what was drawn": ("sampled", "logits", with_column("rest_1", first_changed(lambda value: -100)), "were not drawn"),
}


@pytest.mark.parametrize("what", CANNOT_BE)
def test_verify_finds(caches: dict[str, Path], tmp_path: Path, what: str):
    variant, content, change, message = CANNOT_BE[what]
    folder = shutil.copytree(caches[variant], tmp_path / "cache")
    name = f"{content}-00001.parquet"
    rewritten(folder, name, change)
    wrong = undecodable(folder)
    assert any(message in text for text in wrong.values()), wrong
    assert all(file.endswith("-00001.parquet") for file in wrong)


def test_verify_finds_files_of_another_shard_and_other_row_groups(caches: dict[str, Path], tmp_path: Path):
    folder = shutil.copytree(caches["everything"], tmp_path / "cache")
    for content in ("ranks", "hidden"):
        shutil.copyfile(folder / f"{content}-00000.parquet", folder / f"{content}-00001.parquet")
        hashed_again(folder, f"{content}-00001.parquet")
        assert any(file.endswith("-00001.parquet") for file in undecodable(folder)), content
        shutil.copyfile(caches["everything"] / f"{content}-00001.parquet", folder / f"{content}-00001.parquet")
        hashed_again(folder, f"{content}-00001.parquet")
    assert undecodable(folder) == {}
    about = json.loads((folder / "cache.json").read_text())
    about["shards"][2]["groups"] = [sum(about["shards"][2]["groups"])]
    (folder / "cache.json").write_text(json.dumps(about))
    hashed_again(folder, "cache.json")
    assert "row groups" in undecodable(folder)["records-00002.parquet"]
