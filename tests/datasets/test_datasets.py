import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.datasets._rows import record_of_row
from pipeline.datasets.hpo import hpo
from pipeline.datasets.jsonl import jsonl
from pipeline.errors import InputError
from pipeline.signals.records import Record

ROWS = [{"q": "What?", "a": "That.", "meta": {"area": "eye"}, "o": {"A": "This.", "B": "That."}, "right": "B"}, {"q": "Who?", "a": "Her.", "meta": {"area": None}}]
FIELDS = {"user": "q", "assistant": "a", "specialty": "meta.area", "options": "o", "answer_index": "right"}


def records(path: str, fields: dict | None) -> list[Record]:
    return [record_of_row(row, "jsonl", 1.0) for row in jsonl(path=path, fields=fields)]


def write(path: Path, rows: list) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_any_file_fits_by_its_field_names(tmp_path: Path, name: str):
    first, second = records(write(tmp_path / name, ROWS), FIELDS)
    assert [(segment.role, segment.text) for segment in first.segments] == [("user", "What?"), ("assistant", "That.")]
    assert (first.specialty, first.options, first.answer_index) == ("eye", ("This.", "That."), 1)
    assert (second.specialty, second.options) == (None, None)
    assert first.id != second.id
    assert records(str(tmp_path / "a.*"), FIELDS) == [first, second]


def test_several_fields_become_options_or_one_text(tmp_path: Path):
    row = {"opa": "x", "opb": "y", "cop": 1, "question": "Q?", "exp": "because", "head": "H", "body": "B"}
    path = write(tmp_path / "a.jsonl", [row])
    (record,) = records(path, {"user": ["head", "body"], "options": ["opa", "opb"], "answer_index": "cop", "rationale": "exp"})
    assert record.segments[0].text == "H\n\nB"
    assert record.segments[1].text == "y\n\nbecause"
    assert record.options == ("x", "y")


def test_messages_become_segments(tmp_path: Path):
    turns = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (record,) = records(write(tmp_path / "a.jsonl", [{"conversations": turns}]), {"messages": "conversations"})
    assert [segment.role for segment in record.segments] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"q": "What?", "a": None}, "line 1 has no answer"),
        ({"q": " ", "a": "x"}, "line 1 has no question"),
        ({"q": "What?", "a": "x", "o": ["x", "y"], "right": 7}, "there are 2 options"),
        ({"q": "What?", "a": "x", "o": "x, y"}, "options as one text"),
        ({"q": "What?", "a": "\ud83d"}, "half a character"),
    ],
)
def test_a_record_that_cannot_be_used_says_where_and_why(tmp_path: Path, row: dict, wanted: str):
    with pytest.raises(InputError, match=wanted):
        records(write(tmp_path / "a.jsonl", [row]), FIELDS)


@pytest.mark.parametrize("line", [b"{", b"[1]", b"\xff{}", b'{"a": 1} {"b": 2}', b"null"])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: bytes):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"q": "x", "a": "y"}\n' + line + b"\n")
    with pytest.raises(InputError, match="line 3 is no JSON"):
        records(str(tmp_path / "a.jsonl"), FIELDS)


def test_a_cut_gzip_is_named(tmp_path: Path):
    path = write(tmp_path / "a.jsonl.gz", ROWS * 500)
    Path(path).write_bytes(Path(path).read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot be read to its end"):
        records(path, FIELDS)


def test_a_hub_dataset_needs_a_commit_and_maps_like_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    from pipeline.datasets.hub import hub

    with pytest.raises(InputError, match="40 hexadecimal digits"):
        list(hub(repo="x/y", revision="main"))
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(hub(repo="x/y", revision="a" * 40, split="test", fields=FIELDS))
    assert record_of_row(rows[0], "hub", 1.0).specialty == "eye"
    assert asked[0][1]["revision"] == "a" * 40

    def fails(*arguments, **options):
        raise FileNotFoundError("Couldn't find x/y")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(InputError, match="cannot be loaded"):
        list(hub(repo="x/y", revision="a" * 40))


OBO = "format-version: 1.2\n\n[Term]\nid: HP:0000118\nname: Phenotypic abnormality\n\n[Term]\nid: HP:1\nname: Abnormality of the eye\nis_a: HP:0000118 ! x\n" + "".join(
    f'\n[Term]\nid: HP:1{n}\nname: Sign {n}\ndef: "The sign \\"{n}\\" of an eye." [x:y]\nis_a: HP:1 ! eye\n' for n in range(6)
)


def test_the_ontology_gives_definitions_and_choices_of_one_organ_system(tmp_path: Path):
    (tmp_path / "hp.obo").write_text(OBO + '\n[Term]\nid: HP:19\nname: Old\ndef: "Old." []\nis_obsolete: true\n')
    path = str(tmp_path / "hp.obo")
    definitions = [record_of_row(row, "hpo", 1.0) for row in hpo(path=path)]
    assert len(definitions) == 6
    assert {record.specialty for record in definitions} == {"eye"}
    assert {record.segments[1].text for record in definitions} == {f'The sign "{n}" of an eye.' for n in range(6)}
    choices = [record_of_row(row, "hpo", 1.0) for row in hpo(path=path, questions="choice")]
    for record in choices:
        assert len(set(record.options)) == 4
        assert record.options[record.answer_index] == record.segments[-1].text
    assert [record.group for record in choices] == [record.group for record in definitions]
    assert len({record.answer_index for record in choices}) > 1
    with pytest.raises(InputError, match="no Human Phenotype Ontology"):
        (tmp_path / "hp.obo").write_text("x")
        list(hpo(path=path))
