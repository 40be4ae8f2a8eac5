"""The table of what was kept, and the published figures beside it."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks._records import HELDOUT, Row
from pipeline.benchmarks._retention import retention
from pipeline.errors import InputError
from pipeline.reporting.published import published
from pipeline.reporting.retention_table import FIGURES, retention_parts, retention_table
from pipeline.reporting.tables import in_markdown
from tests.conftest import ROOT

THEIRS = ROOT / "configs" / "distilllm_med" / "published.json"


def questions(task: str, right: str) -> list[Row]:
    return [Row(f"r{n}", "d", None, "", {"right": letter == "x", "confidence": 0.5}, task) for n, letter in enumerate(right)]


def texts(rouge: float, logprob: float = -1.0, task: str = HELDOUT) -> list[Row]:
    return [Row(f"r{n}", "d", None, "", {"rouge1": rouge + n / 100, "logprob": logprob, "answer_bytes": 2}, task) for n in range(4)]


MODELS = {
    "teacher": [*questions("mmlu_anatomy", "xxxxxxxx.."), *texts(0.4)],
    "distilled": [*questions("mmlu_anatomy", "xxxxxx...."), *texts(0.3, -2.0)],
    "sft": [*questions("mmlu_anatomy", "xxx...x..."), *texts(0.1, -4.0)],
}


def rows_of(table: str) -> dict[str, list[str]]:
    """First cell -> the others; the header under its own first cell."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line.startswith("| ")]
    assert len({len(row) for row in cells}) == 1
    assert len({row[0] for row in cells}) == len(cells)
    return {row[0]: row[1:] for row in cells}


def test_a_row_by_hand():
    found = rows_of(retention_table(retention(MODELS)))
    assert found["task"] == ["n", "teacher", "baseline", "student", "retention [interval]", "student − baseline [interval]", "McNemar p"]
    row = found["mmlu\\_anatomy"]
    assert row[:4] == ["10", "0.800", "0.400", "0.600"]
    assert row[4].startswith("0.750 [")
    assert row[5].startswith("+0.200 [-0.")
    assert not row[5].endswith("*")
    assert row[6] == "0.625"


def test_figures_of_texts_say_what_is_better_and_have_no_test():
    found = rows_of(retention_table(retention(MODELS)))
    assert found["ROUGE-1"][:4] == ["4", "0.415", "0.115", "0.315"]
    assert found["ROUGE-1"][5:] == ["+0.200 [+0.200, +0.200] *", "–"]
    assert found["bits per byte (lower is better)"][4:6] == ["0.500 [0.500, 0.500]", "-1.443 [-1.443, -1.443] *"]
    elsewhere = {model: texts(0.5, task="a|b") for model in ("teacher", "distilled")}
    assert "a\\|b, ROUGE-1" in retention_table(retention(elsewhere))


def test_what_is_not_known_is_a_dash():
    (row,) = [line for line in retention_table(retention({"distilled": questions("t", "x.")})).splitlines() if line.startswith("| t |")]
    assert row == "| t | 2 | – | – | 0.500 | – | – | – |"
    (row,) = [line for line in retention_table(retention({"distilled": questions("t", "x"), "sft": questions("t", ".")})).splitlines() if line.startswith("| t |")]
    assert row == "| t | 1 | – | 0.000 | 1.000 | – | +1.000 | 1.000 |"


def test_the_parts_are_plain_text_and_the_table_is_the_same_as_markdown():
    rows = retention({"distilled": questions("a|b_<i>", "x" * 30), "sft": questions("a|b_<i>", "." * 30)})
    parts = retention_parts(rows)
    (line,) = parts.lines
    assert line[0] == "a|b_<i>"
    assert line[-1] == "<0.001"
    assert rows_of(retention_table(rows)) == {"task": parts.titles[1:], in_markdown("a|b_<i>"): [*line[1:-1], "&lt;0.001"]}


def test_a_small_p_is_not_written_out():
    table = retention_table(retention({"distilled": questions("t", "x" * 30), "sft": questions("t", "." * 30)}))
    assert rows_of(table)["t"][-1] == "&lt;0.001"


def test_the_notes_say_what_a_reader_has_to_know():
    models = MODELS | {"teacher": MODELS["teacher"][1:]}
    table = retention_table(retention(models, {"mmlu_medical": ["mmlu_anatomy"]}))
    for said in ("Baseline: sft", "paired bootstrap", "exact and two-sided", "1 of mmlu\\_anatomy (accuracy), 1 of mmlu\\_medical (accuracy)", "each task counting the same (1): teacher 0.778"):
        assert said in table, said
    assert "mmlu\\_medical (all questions)" in rows_of(table)
    plain = retention_table(retention({"distilled": questions("t", "x")}))
    assert not any(said in plain for said in ("Baseline:", "bootstrap", "McNemar p:", "Left out", "Theirs"))  # control


def test_seen_records_stand_below():
    seen = {("mmlu_anatomy", f"r{n}", "d"): n >= 8 for n in range(10)}
    found = rows_of(retention_table(retention(MODELS, seen=seen), published(THEIRS)))
    assert found["mmlu\\_anatomy, not in the training records"] == ["8", "1.000", "0.500", "0.750", "0.750", "–", "–", "–"]
    assert found["mmlu\\_anatomy, in the training records"] == ["2", "0.000", "0.000", "0.000", "–", "–", "–", "–"]
    clean = rows_of(retention_table(retention(MODELS, seen=dict.fromkeys(seen, False))))
    assert not any("training records" in title for title in clean)


def test_theirs_stand_beside_ours_and_are_marked():
    table = retention_table(retention(MODELS), published(THEIRS))
    found = rows_of(table)
    assert found["task"][-1].startswith("theirs: teacher / baseline / student")
    assert found["mmlu\\_anatomy"][-1] == "0.741 / 0.496 / 0.511 (0.690)"
    assert found["mmlu\\_anatomy"][:4] == ["10", "0.800", "0.400", "0.600"]
    assert found["ROUGE-1"][-1] == "0.310 / 0.171 / 0.212 (0.685)"
    assert found["bits per byte (lower is better)"][-1] == "–"
    assert found["mmlu\\_virology"] == ["–"] * 7 + ["0.518 / 0.386 / 0.422 (0.815)"]
    assert {"perplexity", "BLEU-1", "mmlu\\_medical"} <= found.keys()
    assert "not measured here" in table
    assert "on their own data" in table
    assert "Abo El-Enen" in table
    assert table.count("0.741") == 1


def test_their_held_out_texts_are_not_those_of_another_task():
    models = {model: texts(0.5, task="other") for model in ("teacher", "distilled")}
    found = rows_of(retention_table(retention(models), published(THEIRS)))
    assert found["other, ROUGE-1"][-1] == "–"
    assert found["ROUGE-1"][0] == "–"


def test_names_cannot_end_a_cell_or_begin_a_tag():
    models = {model: questions("<b>|x\n| y", "x.") for model in ("teacher", "distilled")}
    theirs = published(THEIRS) | {"source": "<script>|", "notes": ["a\nb|"]}
    table = retention_table(retention(models), theirs)
    assert "<" not in table.replace("<br>", "")
    assert rows_of(table.replace("\\|", "/"))["&lt;b&gt;/x / y"][0] == "2"
    assert "Of theirs: a b\\|" in table


def test_no_rows_are_an_empty_table():
    assert retention_table([]).startswith("| task | n |")


def test_the_published_figures_are_theirs_and_the_notes_hold():
    found = published(THEIRS)
    figures = found["figures"]
    tasks = [figure for name, figure in figures.items() if name.startswith("mmlu_") and name != "mmlu_medical"]
    average = figures["mmlu_medical"]

    def mean(model: str) -> float:
        return sum(figure[model] for figure in tasks) / len(tasks)

    assert len(tasks) == 8
    assert (mean("teacher"), mean("baseline")) == pytest.approx((average["teacher"], average["baseline"]), abs=6e-4)
    assert mean("student") == pytest.approx(0.489, abs=6e-4)
    assert average["student"] == 0.477
    assert mean("retention") == pytest.approx(average["retention"], abs=6e-4)
    assert average["student"] / average["teacher"] == pytest.approx(0.657, abs=6e-4)
    for name, figure in figures.items():
        if name != "mmlu_medical":
            assert figure["student"] / figure["teacher"] == pytest.approx(figure["retention"], abs=1.3e-3), name
    assert set(figures) <= {"mmlu_medical", *FIGURES} | {
        f"mmlu_{task}" for task in ["anatomy", "clinical_knowledge", "college_biology", "college_medicine", "medical_genetics", "nutrition", "professional_medicine", "virology"]
    }
    assert found["cost"]["memory_gb"] == {"teacher": 5.32, "student": 7.68, "baseline": 7.68, "retention": None}


def changed(tmp_path: Path, *at: str, to: Any = None) -> Path:
    value = json.loads(THEIRS.read_text(encoding="utf-8"))
    inside = value
    for key in at[:-1]:
        inside = inside[key]
    if to is None:
        del inside[at[-1]]
    else:
        inside[at[-1]] = to
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("at", "to", "said"),
    [
        (("source",), None, "source: Field required"),
        (("source",), "", "source: "),
        (("figures",), {}, "figures: "),
        (("figures",), [1], "figures: "),
        (("figures", "rouge1", "teacher"), "31 %", "figures.rouge1.teacher: "),
        (("figures", "rouge1", "teacher"), True, "figures.rouge1.teacher: "),
        (("figures", "rouge1", "student"), None, "figures.rouge1.student: Field required"),
        (("figures", "rouge1", "pupil"), 0.3, "figures.rouge1.pupil: Extra"),
        (("notes",), "none", "notes: "),
        (("models", "teacher"), 8, "models.teacher: "),
        (("note",), "x", "note: Extra"),
    ],
)
def test_another_shape_is_refused_with_its_place(tmp_path: Path, at: tuple[str, ...], to: Any, said: str):
    with pytest.raises(InputError) as raised:
        published(changed(tmp_path, *at, to=to))
    assert said in str(raised.value)
    assert "theirs.json" in str(raised.value)
    assert "configs/distilllm_med/published.json" in str(raised.value)


def test_what_they_did_not_give_is_none(tmp_path: Path):
    found = published(changed(tmp_path, "figures", "rouge1", "baseline"))
    assert found["figures"]["rouge1"]["baseline"] is None
    assert rows_of(retention_table([], found))["ROUGE-1"][-1] == "0.310 / – / 0.212 (0.685)"
    assert published(changed(tmp_path, "notes"))["notes"] == []


@pytest.mark.parametrize(("text", "said"), [("{", "no JSON"), ('{"a": NaN}', "NaN is no number"), ('{"a": 1, "a": 2}', "given twice"), ("[]", "the whole"), ("\udcff", "no JSON")])
def test_a_file_that_is_no_such_json_is_refused(tmp_path: Path, text: str, said: str):
    file = tmp_path / "theirs.json"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=said):
        published(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.json cannot be read: No such file"):
        published(tmp_path / "none.json")
    with pytest.raises(InputError, match="a folder"):
        published(tmp_path)
