import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache import reader, schema
from pipeline.cache.reader import Cache, read_table
from pipeline.cache.schema import Logits
from pipeline.errors import DamageError, InputError
from pipeline.signals.codec import REST_STEP, logprob_error
from pipeline.signals.records import Record, Tokens
from pipeline.signals.targets import Targets
from tests.cache import made
from tests.cache.made import DRAWS, example, opened, write

ALL = ("entropy", "logsumexp", "boundary", "hidden")
FULL = made.form(logsumexp=True, boundary=True)


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(schema, "GROUP_POSITIONS", 25)


def parts(targets: Targets, values: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(targets.kept.astype(np.int64)))[:-1]


def same_record(found: Record, was: Record, keep_text: bool) -> None:
    if keep_text:
        assert found == was
    else:
        assert found == replace(was, segments=tuple(replace(segment, text="") for segment in was.segments), options=None)


def same_tokens(found: Tokens, was: Tokens) -> None:
    for name, values in vars(was).items():
        assert getattr(found, name).tolist() == values.tolist()


def same_targets(found: Targets, was: Targets, form: Logits, extras: tuple[str, ...] = ()) -> None:
    """Ids, counts and what follows exactly; the rest as near as its code is."""
    assert found.position.tolist() == was.position.tolist()
    assert found.kept.tolist() == was.kept.tolist()
    assert found.realised_logprob.tolist() == was.realised_logprob.tolist()
    assert found.rests.shape == was.rests.shape
    for i, (ids, logprobs) in enumerate(zip(parts(found, found.ids), parts(found, found.logprobs), strict=True)):
        order = np.argsort(ids)
        wanted_ids, wanted = parts(was, was.ids)[i], parts(was, was.logprobs)[i]
        assert ids[order].tolist() == wanted_ids.tolist()
        if form.method == "sampled":
            counts = parts(was, was.counts)[i]
            assert parts(found, found.counts)[i][order].tolist() == counts.tolist()
            np.testing.assert_allclose(logprobs[order], np.log(counts / DRAWS), atol=1e-5)
        else:
            inside = wanted > form.table[-1]
            error = logprob_error(wanted, form.table) * 1.5
            assert (np.abs(logprobs[order] - wanted) <= error + max(error[inside].max(), REST_STEP / 2) + 1e-4)[inside].all()
            assert ids[logprobs.argmax()] == wanted_ids[wanted.argmax()]
            total = np.exp(logprobs.astype(np.float64)).sum() + np.exp(np.float64(found.rests[0, i]))
            assert total == pytest.approx(1, abs=1e-3)
    rests = np.maximum(found.rests[1:], -1e9) - np.maximum(was.rests[1:], -1e9)
    assert (np.abs(rests) <= REST_STEP / 2 + 1e-4).all()
    assert (found.counts is None) == (form.method != "sampled")
    for name in ALL:
        assert (getattr(found, name) is None) == (name not in extras)
    if "entropy" in extras:
        np.testing.assert_allclose(found.entropy, was.entropy, rtol=1e-3, atol=1e-6)
    if "logsumexp" in extras:
        assert found.logsumexp.tolist() == was.logsumexp.tolist()
    if "boundary" in extras:
        np.testing.assert_allclose(found.boundary, was.boundary, rtol=1e-3, atol=1e-6)
    if "hidden" in extras:
        assert found.hidden.dtype == np.int8
        assert found.hidden.tolist() == was.hidden.tolist()
        assert found.hidden_scale.tolist() == was.hidden_scale.tolist()


def check(cache: Cache, shards: list[made.Examples], form: Logits, extras: tuple[str, ...] = (), keep_text: bool = True) -> None:
    for number, written in enumerate(shards):
        found = list(cache.of_shard(number))
        assert len(found) == len(written)
        for one, (record, tokens, targets) in zip(found, written, strict=True):
            same_record(one.record, record, keep_text)
            same_tokens(one.tokens, tokens)
            same_targets(one.targets, targets, form, extras)
            assert one.has_text == keep_text


@pytest.mark.parametrize("method", ["head", "sampled"])
@pytest.mark.parametrize("extras", [(), ("entropy",), ("hidden",), ("boundary",), ("logsumexp",), ALL])
def test_what_is_read_is_what_was_written_and_of_the_extras_only_those_that_are_asked_for(tmp_path: Path, method: str, extras: tuple[str, ...]):
    form = made.form(method=method, logsumexp=True, boundary=True)
    shards = [[example(number, form=form, hidden=True) for number in range(13)], [example(20 + number, "heldout", form=form, hidden=True) for number in range(5)]]
    cache = opened(write(tmp_path, shards, form), *extras)
    assert len(cache.about["shards"][0]["groups"]) > 2
    assert max(len(targets.position) and len(np.flatnonzero(np.diff(targets.position) != 1)) for _, _, targets in shards[0]) >= 2  # records of several spans
    check(cache, shards, form, extras)
    assert [one.record.id for one in cache.examples("heldout")] == [record.id for record, _, _ in shards[1]]
    assert cache.count("train") == 13
    vocabulary = cache.vocabulary()
    assert (vocabulary.token_bytes, vocabulary.end_ids) == (made.VOCABULARY.token_bytes, made.VOCABULARY.end_ids)
    assert vocabulary.digest() == made.VOCABULARY.digest()


@pytest.mark.parametrize("temperatures", [[1.0], [1.0, 1.5, 3.0]])
def test_other_temperatures_are_other_columns(tmp_path: Path, temperatures: list[float]):
    form = made.form(temperatures=temperatures)
    shards = [[example(number, form=form) for number in range(6)]]
    cache = opened(write(tmp_path, shards, form))
    assert cache.temperatures == temperatures
    check(cache, shards, form)


def test_control_positions_one_off_and_ids_of_another_order_are_caught(tmp_path: Path):
    shards = [[example(number) for number in range(6)]]
    cache = opened(write(tmp_path, shards, made.form()))
    check(cache, shards, made.form())
    for change in (lambda t: replace(t, position=t.position + 1), lambda t: replace(t, ids=(t.ids + 1) % made.SIZE), lambda t: replace(t, logprobs=t.logprobs[::-1])):
        wrong = [(record, tokens, change(targets)) for record, tokens, targets in shards[0]]
        with pytest.raises(AssertionError):
            check(cache, [wrong], made.form())


def test_without_text_only_digests_and_numbers_are_written(tmp_path: Path):
    shards = [[example(number) for number in range(6)]]
    shards[0][1] = (replace(shards[0][1][0], segments=(replace(shards[0][1][0].segments[0], text="SECRET"), *shards[0][1][0].segments[1:]), options=("SECRET", "b")), *shards[0][1][1:])
    check(opened(write(tmp_path / "omit", shards, made.form(), keep_text=False)), shards, made.form(), keep_text=False)
    assert not any(b"SECRET" in file.read_bytes() for file in (tmp_path / "omit").iterdir())
    table = pq.read_table(tmp_path / "omit" / "records-00000.parquet")
    assert table["digest"].to_pylist() == [record.digest() for record, _, _ in shards[0]]
    write(tmp_path / "keep", shards, made.form())
    assert any(b"SECRET" in file.read_bytes() for file in (tmp_path / "keep").iterdir())  # control


def test_a_shard_without_a_record_and_a_record_without_a_position_are_read(tmp_path: Path):
    record, tokens, _ = example(1)
    nothing = np.zeros(0, np.int32)
    empty = Targets(nothing, nothing.astype(np.uint16), nothing, nothing.astype(np.float32), np.zeros((3, 0), np.float32), nothing.astype(np.float32), entropy=nothing.astype(np.float32))
    shards: list[made.Examples] = [[], [(record, tokens, empty), example(2), (replace(record, id="last"), tokens, empty)]]
    cache = opened(write(tmp_path, shards, made.form()))
    check(cache, shards, made.form())
    assert list(cache.of_shard(0)) == []


def test_the_same_examples_are_the_same_bytes(tmp_path: Path):
    for name in ("one", "other"):
        write(tmp_path / name, [[example(number, hidden=True) for number in range(9)]], FULL)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert "hidden-00000.parquet" in files
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes() for file in files)


def test_every_file_of_a_shard_has_the_same_row_groups(tmp_path: Path):
    folder = write(tmp_path, [[example(number, hidden=True) for number in range(13)]], FULL)
    wanted = json.loads((folder / "cache.json").read_text())["shards"][0]["groups"]
    for content in ("records", "logits", "hidden"):
        about = pq.read_metadata(folder / f"{content}-00000.parquet")
        assert [about.row_group(i).num_rows for i in range(about.num_row_groups)] == wanted


@pytest.mark.parametrize("extra", ["logsumexp", "boundary", "hidden"])
def test_an_extra_that_the_cache_was_made_without_is_an_error_that_says_how_to_get_it(tmp_path: Path, extra: str):
    folder = write(tmp_path, [[example(1)]], made.form())
    with pytest.raises(InputError, match=rf"without {extra}.*targets\.logits\.{extra}"):
        opened(folder, "entropy", extra)


def test_the_columns_that_are_not_asked_for_are_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write(tmp_path, [[example(number, hidden=True) for number in range(4)]], FULL)
    read: list[list[str]] = []
    real = pq.ParquetFile.read_row_groups

    def watched(self, groups, columns):
        read.append(columns)
        return real(self, groups, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", watched)
    list(opened(folder).of_shard(0))
    names = {name for columns in read if columns for name in columns}
    assert {"kept", "rest_8"} <= names
    assert not names & {"entropy", "logsumexp", "boundary_0", "boundary_15"}
    (folder / "hidden-00000.parquet").unlink()
    list(opened(folder).of_shard(0))
    with pytest.raises(DamageError, match="hidden-00000"):
        list(opened(folder, "hidden").of_shard(0))


@pytest.mark.parametrize("old", [1, 3])
def test_a_cache_of_another_format_is_refused(tmp_path: Path, old: int):
    folder = write(tmp_path, [[example(1)]], made.form(), format=old)
    with pytest.raises(DamageError, match=f"format {old}.*reads format 2.*cache-teacher"):
        opened(folder)


# --- what a faulty writer or a bad copy leaves ---


def rewritten(folder: Path, content: str, change: Callable[[pa.Table], pa.Table]) -> None:
    file = folder / f"{content}-00000.parquet"
    table = pq.read_table(file)
    rows = pq.read_metadata(file).row_group(0).num_rows
    pq.write_table(change(table), file, row_group_size=rows, write_page_checksum=True)


def column(name: str, change: Callable[[list], list]) -> Callable[[pa.Table], pa.Table]:
    """`change` is made on the first record's list."""

    def changed(table: pa.Table) -> pa.Table:
        index, rows = table.schema.get_field_index(name), table[name].to_pylist()
        return table.set_column(index, table.schema.field(name), pa.array([change(rows[0]), *rows[1:]], table.schema.field(name).type))

    return changed


LAST_CUT = {name: (lambda values: values[:-1]) for name in ("first_position", "positions", "kept", "id_gap", "logprob_code", "rest_1", "rest_2", "realised_logprob")}


@pytest.mark.parametrize("name", LAST_CUT)
def test_columns_of_which_one_is_too_short_are_damage(tmp_path: Path, name: str):
    folder = write(tmp_path, [[example(number) for number in range(3)]], made.form())
    list(opened(folder).of_shard(0))
    rewritten(folder, "logits", column(name, LAST_CUT[name]))
    with pytest.raises(DamageError, match=r"logits-00000.parquet.*verify"):
        list(opened(folder).of_shard(0))


@pytest.mark.parametrize("name", ["entropy", "logsumexp", "boundary_3"])
def test_an_extra_column_that_is_too_short_is_damage(tmp_path: Path, name: str):
    folder = write(tmp_path, [[example(number) for number in range(3)]], FULL)
    rewritten(folder, "logits", column(name, lambda values: values[:-1]))
    with pytest.raises(DamageError, match=r"logits-00000.parquet.*verify"):
        list(opened(folder, name.split("_")[0]).of_shard(0))


def test_positions_and_numbers_that_lie_with_other_records_are_damage(tmp_path: Path):
    """The first record's last value becomes the second's first: the total stays what it was."""

    def moved(table: pa.Table) -> pa.Table:
        index, rows = table.schema.get_field_index("kept"), table["kept"].to_pylist()
        rows[:2] = [rows[0][:-1], [rows[0][-1], *rows[1]]]
        return table.set_column(index, table.schema.field("kept"), pa.array(rows, table.schema.field("kept").type))

    folder = write(tmp_path, [[example(number) for number in range(3)]], made.form())
    rewritten(folder, "logits", moved)
    with pytest.raises(DamageError, match=r"logits-00000.parquet.*verify"):
        list(opened(folder).of_shard(0))


@pytest.mark.parametrize("name", ["state", "scale"])
def test_hidden_states_that_are_too_few_are_damage(tmp_path: Path, name: str):
    folder = write(tmp_path, [[example(number, hidden=True) for number in range(3)]], made.form())
    rewritten(folder, "hidden", column(name, lambda values: values[:-1]))
    with pytest.raises(DamageError, match=r"-00000.parquet.*verify"):
        list(opened(folder, "hidden").of_shard(0))


def test_ranks_that_no_token_has_other_records_and_missing_columns_are_damage(tmp_path: Path):
    def damaged(name: str, content: str, change: Callable[[pa.Table], pa.Table]) -> None:
        folder = write(tmp_path / name, [[example(number) for number in range(3)]], made.form())
        rewritten(folder, content, change)
        with pytest.raises(DamageError, match=r"verify|columns of format"):
            list(opened(folder).of_shard(0))

    damaged("too high a rank", "logits", column("id_gap", lambda gaps: [gaps[0] + 1000, *gaps[1:]]))
    damaged("too few ranks", "ranks", lambda table: table.slice(0, 5))
    damaged("another order", "logits", lambda table: table.take(list(range(len(table)))[::-1]))
    damaged("a record less", "records", lambda table: table.slice(1))
    damaged("no rest", "logits", lambda table: table.drop_columns(["rest_2"]))
    damaged("no metadata", "logits", lambda table: table.replace_schema_metadata(None))


def test_more_row_groups_or_fewer_than_the_cache_says_are_damage(tmp_path: Path):
    folder = write(tmp_path, [[example(number) for number in range(13)]], made.form())
    cache = opened(folder)
    cache.about["shards"][0]["groups"].append(1)
    with pytest.raises(DamageError):
        list(cache.of_shard(0))


# --- an order ---


def many(tmp_path: Path, split_at: int = 3) -> Path:
    shards = [[example(10 * shard + number, "train" if shard < split_at else "heldout") for number in range(9)] for shard in range(split_at + 1)]
    return write(tmp_path, shards, made.form())


def test_an_order_has_every_example_of_its_split_once_and_is_a_function_of_seed_and_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reader, "WINDOW", 2)
    cache = opened(many(tmp_path))
    every = sorted((shard, group, row) for shard in range(3) for group, records in enumerate(cache.about["shards"][shard]["groups"]) for row in range(records))
    order = cache.order("train", 0, 0)
    assert sorted(order) == every != order
    assert opened(tmp_path).order("train", 0, 0) == order
    others = [cache.order("train", seed, epoch) for seed, epoch in ((0, 1), (1, 0), (1, 1))]
    assert all(sorted(other) == every for other in others)
    assert len({tuple(other) for other in (order, *others)}) == 4
    assert {cache.example(place).record.id for place in order} == {record.record.id for record in cache.examples("train")}
    assert {place[0] for place in cache.order("heldout", 0, 0)} == {3}


def test_records_are_mixed_across_the_row_groups_of_a_window(tmp_path: Path):
    order = opened(many(tmp_path)).order("train", 0, 0)
    changes = sum(one[:2] != other[:2] for one, other in zip(order, order[1:], strict=False))
    assert changes > len({place[:2] for place in order}) - 1


def test_only_a_windows_row_groups_stay_open_and_each_is_decoded_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reader, "WINDOW", 2)
    cache = opened(many(tmp_path))
    decoded = []
    real = Cache.of_group
    monkeypatch.setattr(Cache, "of_group", lambda self, shard, group: decoded.append((shard, group)) or real(self, shard, group))
    order = cache.order("train", 0, 0)
    groups = {place[:2] for place in order}
    assert len(groups) > 6
    for place in order:
        cache.example(place)
        assert len(cache._open) <= 3
        assert len(cache._orders) <= 3
    assert len(decoded) == len(groups)


def test_examples_in_stored_order_hold_one_row_group(tmp_path: Path):
    cache = opened(many(tmp_path))
    for _ in cache.examples("train"):
        assert len(cache._open) == 0


# --- the tail ---


def test_the_tail_of_several_shards_is_their_mean_by_positions(tmp_path: Path):
    rng = np.random.default_rng(0)
    means = [rng.random((3, made.SIZE)).astype(np.float32) * 1e-3 for _ in range(2)]
    for mean in means:
        mean[:, 5] = 0
    with np.errstate(divide="ignore"):
        folder = write(tmp_path, [[example(0)], [example(1)], [example(2)]], made.form(), tails=[(np.log(means[0]), 300), None, (np.log(means[1]), 100)])
    tail = opened(folder).tail()
    assert tail.positions == 400
    wanted = (means[0] * 300 + means[1] * 100) / 400
    assert (tail.log_means[:, 5] == -np.inf).all()
    there = np.arange(made.SIZE) != 5
    assert (np.abs(tail.log_means[:, there] - np.log(wanted[:, there])) <= REST_STEP / 2 + 1e-4).all()
    assert np.abs(tail.log_means[:, there] - np.log((means[0] + means[1])[:, there] / 2)).max() > REST_STEP / 2 + 1e-4  # control: not by shards


def test_a_cache_without_tails_has_none(tmp_path: Path):
    assert opened(write(tmp_path, [[example(0)]], made.form())).tail() is None


def test_a_small_file_that_would_fill_the_memory_is_refused_before_it_is_decoded(tmp_path: Path):
    """Runs of one value compress without end: 2.4 GB in as many megabytes."""
    schema = pa.schema([("id_gap", pa.int32())])
    with pq.ParquetWriter(tmp_path / "ranks-00000.parquet", schema, compression="zstd", use_dictionary=False) as writer:
        column = pa.array(np.zeros(1 << 26, np.int32))
        writer.write_table(pa.table([pa.chunked_array([column] * 9)], schema), row_group_size=1 << 30)
    assert (tmp_path / "ranks-00000.parquet").stat().st_size < 4 << 20
    with pytest.raises(DamageError, match="claims"):
        read_table(tmp_path / "ranks-00000.parquet", schema)


def test_a_long_text_that_stands_in_many_rows_is_refused_before_all_of_them_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Parquet holds it once: 600 MB in a few kilobytes."""
    monkeypatch.setattr(reader, "LARGEST", 100 << 20)
    schema = pa.schema([("text", pa.string())])
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(600, np.int32)), pa.array(["x" * (1 << 20)]))
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "t.parquet").stat().st_size < 1 << 20
    with pytest.raises(DamageError, match="rows of text take"):
        read_table(tmp_path / "t.parquet", schema)
