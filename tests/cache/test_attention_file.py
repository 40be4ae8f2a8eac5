"""Attention beside the logits: what is read is what was written, nothing else is believed, and it may be left behind."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cache.writer import attention_table
from pipeline.errors import DamageError
from pipeline.signals.attention import decode_weight_rests, decode_weights, encode_weight_rests, encode_weights
from tests.cache import made


def shards(heads: int) -> list:
    return [[made.example(number, heads=heads) for number in range(13)], [made.example(20 + number, "heldout", heads=heads) for number in range(5)]]


@pytest.mark.parametrize("heads", [1, 3])
def test_what_is_read_is_what_was_written(tmp_path: Path, heads: int):
    written = shards(heads)
    cache = made.opened(made.write(tmp_path, written, made.form()), "attention")
    for split, examples in zip(("train", "heldout"), written, strict=True):
        for one, (_, _, targets) in zip(cache.examples(split), examples, strict=True):
            assert sorted(one.targets.attention) == [2, 5]
            for layer, wanted in targets.attention.items():
                found = one.targets.attention[layer]
                assert len(found.rest) == heads * len(targets.position)
                assert found.kept.tolist() == wanted.kept.tolist()
                assert found.key.tolist() == wanted.key.tolist()
                np.testing.assert_array_equal(found.weight, decode_weights(encode_weights(wanted.weight)))
                np.testing.assert_array_equal(found.rest, decode_weight_rests(encode_weight_rests(wanted.rest)))


def test_it_may_be_left_behind(tmp_path: Path):
    made.write(tmp_path, shards(1), made.form())
    for file in tmp_path.glob("attention-*"):
        file.unlink()
    assert [one.targets.attention for one in made.opened(tmp_path).examples("train")] == [None] * 13
    with pytest.raises((DamageError, OSError)):
        list(made.opened(tmp_path, "attention").examples("train"))


def rewritten(file: Path, change) -> None:
    table = change(pq.read_table(file))
    with pq.ParquetWriter(file, table.schema, write_page_checksum=True, store_schema=False) as writer:
        first = 0
        for group in [
            pq.read_metadata(file.with_name(file.name.replace("attention", "logits"))).row_group(i).num_rows
            for i in range(pq.read_metadata(file.with_name(file.name.replace("attention", "logits"))).num_row_groups)
        ]:
            writer.write_table(table.slice(first, group), row_group_size=max(group, 1))
            first += group


def column(name: str, change) -> object:
    def changed(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        return table.set_column(at, table.schema.field(at), pa.chunked_array([pa.array([change(row) for row in table[name].to_pylist()], table.schema.field(at).type)]))

    return changed


@pytest.mark.parametrize(
    "change",
    [
        column("record", lambda id: id + "x"),
        column("kept_2", lambda row: [min(255, kept + 1) for kept in row]),
        column("rest_5", lambda row: [*row, 0]),
        column("weight_code_2", lambda row: row[1:]),
        column("key_gap_5", lambda row: [gap + 1000 for gap in row]),
        column("key_gap_5", lambda row: [-gap - 1 for gap in row]),
        lambda table: table.drop_columns(["kept_5", "key_gap_5", "weight_code_5", "rest_5"]),
        lambda table: pa.concat_tables([table.slice(1), table.slice(0, 1)]),
    ],
    ids=["another record", "more keys", "more rows", "a weight less", "keys before the text", "keys after the query", "a layer less", "other records' rows"],
)
def test_what_contradicts_the_shard_is_damage(tmp_path: Path, change):
    made.write(tmp_path, shards(1), made.form())
    rewritten(tmp_path / "attention-00000.parquet", lambda table: table)
    list(made.opened(tmp_path, "attention").examples("train"))  # control
    rewritten(tmp_path / "attention-00000.parquet", change)
    with pytest.raises(DamageError, match="attention-00000"):
        list(made.opened(tmp_path, "attention").examples("train"))


def test_a_shard_of_records_without_positions(tmp_path: Path):
    record, tokens, targets = made.example(1, turns=0, heads=1)
    assert not len(targets.position)
    table = attention_table(pa.array([record.id]), [targets])
    assert table["kept_2"].to_pylist() == [[]]
    cache = made.opened(made.write(tmp_path, [[(record, tokens, targets)]], made.form()), "attention")
    [one] = cache.examples("train")
    assert len(one.targets.attention[5].rest) == 0
