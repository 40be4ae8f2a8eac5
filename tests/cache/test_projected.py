"""What fit-projection stores comes back as it was, and fits the cache that it was made for."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache import projected as stored
from pipeline.cache.projected import SHARES, Fitted, StudentView, read_counts, read_map, shares_file, values_file, write_counts, write_map, write_shares, write_values
from pipeline.cache.reader import Cache
from pipeline.errors import DamageError, Mismatch
from pipeline.lookup import find
from pipeline.models.tokenizers import RecordTokenizer, load_tokenizer
from pipeline.signals.counts import counted
from pipeline.signals.projection import REST, Shares, meet
from pipeline.signals.projection import projected as as_targets
from pipeline.signals.targets import with_realised
from tests.conftest import Place


@pytest.fixture
def parts(done: Place) -> tuple[Cache, Place, RecordTokenizer]:
    cache = Cache(done.finished("cache-teacher").file)
    return cache, done, load_tokenizer(str(done.path / "tiny" / "student"), None, cache.about["template"], "student")


def test_a_view_gives_what_the_projection_gives(parts: tuple[Cache, Place, RecordTokenizer]):
    cache, place, student = parts
    view = StudentView(cache, place.finished("fit-projection").file, student.render, student.digest())
    pairs = [(example.tokens, student.render(example.record)) for example in cache.examples("train")]
    method = find("projections", "contextual")(cache.vocabulary(), student.vocabulary, student.encode, counted(pairs, len(cache.vocabulary())))
    seen = 0
    for split in ("train", "heldout"):
        for example in cache.examples(split):
            tokens = view.tokens(example)
            targets = with_realised(example.targets, example.tokens.ids[example.targets.position + 1], cache.temperatures)
            shares = method.shares(meet(example.record.content, example.tokens, targets, tokens))
            for found, wanted in (
                (view.projected(example, tokens), as_targets(targets, shares, len(cache.vocabulary()))),
                (view.projected(example, tokens, inside=False), as_targets(targets, shares.where(~shares.inside), len(cache.vocabulary()))),
            ):
                for name in ("position", "entries", "student_id", "rests", "unkept", "reliability", "row"):
                    np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
                assert np.sort(found.logprobs + found.log_share) == pytest.approx(np.sort(wanted.logprobs + wanted.log_share), abs=1e-6)
                seen += len(found.position)
    assert seen > 500


def some(seed: int, owner: np.ndarray) -> Shares:
    draw = np.random.default_rng(seed)
    count = int(owner.max(initial=-1)) + 1
    return Shares(
        position=np.arange(count) * 2,
        row=np.arange(count) // 2,
        inside=draw.random(count) < 0.5,
        reliability=draw.random(count).astype(np.float32),
        owner=owner,
        kept=100 * (owner // 2) + draw.integers(0, 100, len(owner)),
        student_id=draw.integers(REST, 50, len(owner)).astype(np.int32),
        log_share=-draw.random(len(owner)).astype(np.float32),
    )


def test_shares_in_any_order_come_back_at_their_positions(tmp_path: Path):
    found = [some(0, np.array([3, 0, 2, 2, 1, 0, 3])), some(1, np.zeros(0, dtype=np.int64)), some(2, np.array([1, 0]))]
    first = [np.arange(4) * 100] * 3
    write_shares(tmp_path / shares_file(0), ["a", "b", "c"], found, first, [2, 1])
    rows = [*stored._read_group(tmp_path / shares_file(0), SHARES, 0), *stored._read_group(tmp_path / shares_file(0), SHARES, 1)]
    assert [row["record"] for row in rows] == ["a", "b", "c"]
    for row, shares, begin in zip(rows, found, first, strict=True):
        owner = np.repeat(np.arange(len(row["position"])), row["entries"])
        kept = row["kept"] + begin[row["row"]][owner]
        back = sorted(zip(owner.tolist(), kept.tolist(), row["student_id"].tolist(), row["log_share"].tolist(), strict=True))
        assert back == sorted(zip(shares.owner.tolist(), shares.kept.tolist(), shares.student_id.tolist(), shares.log_share.tolist(), strict=True))
        for name in ("position", "row", "inside", "reliability"):
            np.testing.assert_array_equal(row[name], getattr(shares, name))


def test_counts_and_the_map_come_back(tmp_path: Path):
    counts = counted([], 5)
    write_counts(tmp_path / "none.parquet", counts)
    assert read_counts(tmp_path / "none.parquet", 5).total.tolist() == [0] * 5
    counts = counts.of_pairs(np.array([4, 1, 4, 1]), np.array([7, 2, 7, 3]), np.array([1, 1, 5, 1]), 5)
    write_counts(tmp_path / "counts.parquet", counts)
    back = read_counts(tmp_path / "counts.parquet", 5)
    assert back.total.tolist() == [0, 2, 0, 0, 6]
    assert [array.tolist() for array in (back.begin, back.student_id, back.count)] == [array.tolist() for array in (counts.begin, counts.student_id, counts.count)]
    fitted = Fitted("contextual", "v", "r", "shares", np.array([1, REST, 3], np.int32))
    write_map(tmp_path / "map.parquet", fitted)
    back = read_map(tmp_path / "map.parquet")
    assert (back.method, back.vocabulary, back.rendering, back.form, back.student_id.tolist()) == ("contextual", "v", "r", "shares", [1, REST, 3])


def test_what_is_of_another_record_or_out_of_range_is_damage(parts: tuple[Cache, Place, RecordTokenizer], tmp_path: Path):
    cache, place, student = parts
    fitted = place.finished("fit-projection")
    shard = cache.shards("train")[0]
    whole = pq.read_table(fitted.file(shares_file(shard)))

    def view_of(table) -> StudentView:
        pq.write_table(table, tmp_path / "shares.parquet", row_group_size=cache.about["shards"][shard]["groups"][0], write_page_checksum=True)
        return StudentView(cache, lambda name: tmp_path / "shares.parquet" if name == shares_file(shard) else fitted.file(name), student.render, student.digest())

    example = next(cache.of_shard(shard))
    view_of(whole).projected(example, student.render(example.record))
    swapped = whole.take([1, 0, *range(2, len(whole))])
    with pytest.raises(DamageError, match="where the cache has"):
        view_of(swapped).projected(example, student.render(example.record))
    kept = whole["kept"].to_pylist()
    kept[0][-1] = 60000
    index = whole.schema.get_field_index("kept")
    far = whole.set_column(index, whole.schema.field(index), pa.array(kept, whole.schema.field(index).type))
    with pytest.raises(DamageError, match="does not have"):
        view_of(far).projected(example, student.render(example.record))


def test_a_view_of_values_gives_what_was_written(parts: tuple[Cache, Place, RecordTokenizer], tmp_path: Path):
    cache, _, student = parts
    pairs = [(example.tokens, student.render(example.record)) for example in cache.examples("train")]
    method = find("projections", "low_rank")(cache.vocabulary(), student.vocabulary, counted(pairs, len(cache.vocabulary())), lambda layer, **how: None, keep=7)
    shard = cache.shards("train")[0]
    examples = list(cache.of_shard(shard))
    words = []
    for example in examples:
        targets = with_realised(example.targets, example.tokens.ids[example.targets.position + 1], cache.temperatures)
        words.append(method.values(meet(example.record.content, example.tokens, targets, student.render(example.record)), cache.temperatures))
    write_values(tmp_path / values_file(shard), [example.record.id for example in examples], words, cache.about["shards"][shard]["groups"])
    write_map(tmp_path / "projection.parquet", Fitted("low_rank", cache.about["vocabulary"], student.digest(), "values", method.student_id))
    view = StudentView(cache, lambda name: tmp_path / name, student.render, student.digest())
    for example, wanted in zip(examples, words, strict=True):
        found = view.projected(example, view.tokens(example))
        for name in ("position", "entries", "student_id", "logprobs", "rests", "unkept", "reliability", "row"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
    assert len(words[0].position) * 7 == len(words[0].student_id) > 0
    write_map(tmp_path / "odd.parquet", Fitted("low_rank", "v", "r", "elsewhere", method.student_id))  # type: ignore[arg-type]
    with pytest.raises(DamageError, match="no form of a projection"):
        read_map(tmp_path / "odd.parquet")


def test_a_projection_for_another_rendering_is_refused(parts: tuple[Cache, Place, RecordTokenizer]):
    cache, place, student = parts
    with pytest.raises(Mismatch, match="another tokenizer or template"):
        StudentView(cache, place.finished("fit-projection").file, student.render, "other")
