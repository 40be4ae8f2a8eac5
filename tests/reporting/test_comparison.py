"""`pipeline compare`: which rows there are, what stands in them, and in which form."""

import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.benchmarks._records import RECORDS
from pipeline.reporting.comparison import Evaluated, Sample, compared, rows_of
from pipeline.reporting.inspection_evaluations import found_in
from pipeline.reporting.tables import ABOUT, COLUMNS, QUALITY, comparison_csv, comparison_table, comparison_text, printable
from tests.conftest import ROOT, Place
from tests.reporting.evaluations import FIRST, SUBJECTS, ablation, evaluated

FURTHER = ["token_accuracy", "rougeL", "mmlu_medical"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `runs`, with two seeds and a benchmark of questions. Not to be changed."""
    folder = tmp_path_factory.mktemp("asked") / "runs"
    ablation(folder, "both", {"near": [evaluated(folder, 1e-3, seed, 2.0, further=True) for seed in range(2)], "far": [evaluated(folder, 2e-3, seed, 4.0, further=True) for seed in range(2)]})
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants with three seeds, as an ablation. Not to be changed."""
    folder = tmp_path_factory.mktemp("compared") / "runs"
    ablation(folder, "both", {"near": [evaluated(folder, 1e-3, seed, 2.0) for seed in range(3)], "far": [evaluated(folder, 2e-3, seed, 2.4) for seed in range(3)]})
    return folder


def table(*folders: Path, **options: str | None) -> list[dict]:
    return compared(rows_of([one.evaluated for one in found_in(folders)]), **options)


def test_what_evaluate_keeps_gives_its_figures_again(done: Place):
    (found,) = found_in([done.finished("evaluate").path])
    for model, figures in found.evaluated.models.items():
        for key in QUALITY:
            _, over, under = found.evaluated.records[model].sums(key)
            assert over.sum() / under.sum() == pytest.approx(figures[key], rel=1e-12), (model, key)
    for model, row in found.evaluated.models.items():
        positions = sum(part[0] for part in row["calibration"])
        assert positions == found.evaluated.records[model].columns["tokens"].sum()
    (low, high), wilson = next(row["accuracy"]["interval"] for row in table(done.finished("evaluate").path) if row["variant"] == "teacher"), found.evaluated.models["teacher"]["accuracy_interval"]
    assert low <= wilson[0] <= wilson[1] <= high  # of nine questions the bootstrap's is wider


def test_the_page_names_every_file_and_column(done: Place):
    page = set(re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")))
    finished = done.finished("evaluate")
    assert {*finished.names(), *RECORDS.names, *finished.summary, *finished.summary["models"]["distilled"]} <= page
    assert pq.read_schema(finished.file("records.parquet")).equals(RECORDS, check_metadata=True)


def test_the_page_names_every_key_of_questions_retention_and_cost(asked: Path):
    page = set(re.findall(r"`([^`\n]+)`", (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")))
    results = json.loads(next(asked.glob("evaluate/*/results.json")).read_text())
    model = results["models"]["distilled"]
    named = [model, *model["tasks"].values(), model["fidelity"], model["cost"], model["cost"]["batches"]["1"], *results["retention"], results["seen_in_training"]]
    wanted = {key for part in named for key in part} | {"only_student", "only_other", "p"}
    assert wanted <= page, wanted - page
    assert len(wanted) > 50  # control: there is something to name
    assert not {"mmlu_anatomy"} & page  # a name of ours, no key


def test_a_row_has_the_mean_and_spread_of_its_seeds_and_the_best_is_first(runs: Path):
    rows = table(runs / "both")
    assert [row["variant"] for row in rows] == ["teacher", "near", "far", "without the teacher", "student before training"]
    assert [row["seeds"] for row in rows] == [1, 3, 3, 3, 1]
    trials = json.loads((runs / "both" / "ablation.json").read_text())["trials"]
    for row in rows[1:3]:
        for key in QUALITY:
            values = [trial["models"]["distilled"][key] for trial in trials if trial["variant"] == row["variant"]]
            figure = row[key]
            assert (figure["mean"], figure["lowest"], figure["highest"]) == (pytest.approx(np.mean(values)), min(values), max(values))
            assert figure["deviation"] == pytest.approx(np.std(values, ddof=1))
            assert figure["interval"][0] < figure["mean"] < figure["interval"][1]


def test_the_difference_from_the_baseline_is_paired_where_the_records_are_the_same(runs: Path, tmp_path: Path):
    rows = {row["variant"]: row for row in table(runs / "both")}
    assert rows["near"]["baseline"]
    assert rows["near"]["kl_to_teacher"]["difference"] is None
    difference = rows["far"]["kl_to_teacher"]["difference"]
    assert difference["mean"] == pytest.approx(rows["far"]["kl_to_teacher"]["mean"] - rows["near"]["kl_to_teacher"]["mean"])
    assert difference["paired"]
    assert difference["excludes_zero"]
    near, far = rows["near"]["kl_to_teacher"]["interval"], rows["far"]["kl_to_teacher"]["interval"]
    assert near[1] > far[0]  # control: the intervals of the two overlap, that of their difference does not hold 0
    other = evaluated(tmp_path / "runs", 2e-3, 0, 2.4, cache="b")
    mixed = {row["variant"]: row for row in table(runs / "both", other)}[other.name]
    assert not mixed["kl_to_teacher"]["difference"]["paired"]
    theirs, ours = mixed["kl_to_teacher"]["difference"]["interval"], difference["interval"]
    assert theirs[1] - theirs[0] > 2 * (ours[1] - ours[0])


def test_what_else_was_measured_stands_behind_the_four(asked: Path, runs: Path):
    assert [key for key in table(runs / "both")[0] if key not in ABOUT] == list(QUALITY)  # control: where nothing else was, nothing does
    rows = {row["variant"]: row for row in table(asked / "both")}
    assert [key for key in rows["near"] if key not in ABOUT] == [*QUALITY, *FURTHER]
    trials = json.loads((asked / "both" / "ablation.json").read_text())["trials"]
    for key in FURTHER:
        models = [trial["models"]["distilled"] for trial in trials if trial["variant"] == "near"]
        values = [model["tasks"][key]["accuracy"] if key == "mmlu_medical" else model[key] for model in models]
        figure, difference = rows["near"][key], rows["far"][key]["difference"]
        assert figure["values"] == values
        assert figure["mean"] == pytest.approx(np.mean(values))
        assert figure["interval"][0] < figure["mean"] < figure["interval"][1]
        assert difference["paired"]
        assert difference["interval"][0] < difference["mean"] < difference["interval"][1]


@pytest.mark.parametrize("key", FURTHER)
def test_what_is_kept_of_questions_and_texts_gives_their_figures_again(asked: Path, key: str):
    for one in found_in([asked / "both"]):
        for model, figures in one.evaluated.models.items():
            sample = Sample(one.evaluated, figures, one.evaluated.records[model])
            ids, over, under = sample.sums(key)
            assert over.sum() / under.sum() == pytest.approx(sample.figure(key), rel=1e-12)
            assert {task for task, _, _ in ids} == (set(SUBJECTS) if key == "mmlu_medical" else {"heldout"})


def test_the_four_are_over_the_held_out_records_alone(asked: Path):
    (one, *_) = found_in([asked / "both"])
    for model, figures in one.evaluated.models.items():
        kept = one.evaluated.records[model]
        _, right, asked_ = Sample(one.evaluated, figures, kept).sums("accuracy")
        assert right.sum() / asked_.sum() == pytest.approx(figures["accuracy"])
        _, right, asked_ = kept.sums("accuracy")
        assert right.sum() / asked_.sum() != pytest.approx(figures["accuracy"])  # control: with the benchmark's questions it is another


def test_records_of_the_first_format_give_what_those_of_the_second_do(tmp_path: Path):
    runs = tmp_path / "runs"
    ablation(runs, "both", {"a": [evaluated(runs, further=True)], "b": [evaluated(runs, 2e-3, further=True)]})
    second = {row["variant"]: row for row in table(runs / "both")}
    for file in runs.glob("evaluate/*/records.parquet"):
        kept = pq.read_table(file)
        first = kept.filter([task == "heldout" for task in kept["task"].to_pylist()]).select(FIRST)
        file.unlink()
        pq.write_table(first.replace_schema_metadata({"format": "1"}), file)
        manifest = json.loads((file.parent / "manifest.json").read_text())
        (file.parent / "manifest.json").unlink()  # under an experiment's name, where nothing is checked against a manifest
        place = runs / f"under {manifest['fingerprint']}"
        place.mkdir()
        for name in ("results.json", "records.parquet"):
            shutil.copyfile(file.parent / name, place / name)
    first = {row["variant"]: row for row in table(*runs.glob("under *"))}
    assert len(first) == len(second)
    for one, other in ((first[row], row) for row in ("teacher", "student before training")):
        for key in QUALITY:
            assert one[key]["interval"] == second[other][key]["interval"]
        for key in FURTHER:
            assert one[key]["mean"] == second[other][key]["mean"]
            assert one[key]["interval"] is None  # these records have nothing of it
            assert second[other][key]["interval"]


def test_a_benchmark_that_was_put_otherwise_is_told(asked: Path, tmp_path: Path):
    said = "mmlu_medical was not put in the same way everywhere"
    place = Place(tmp_path)
    assert said not in place.pipeline("compare", str(asked / "both"))  # control
    other = evaluated(tmp_path / "runs", 3e-3, further=True, prompts="sha256:1")
    assert said in place.pipeline("compare", str(asked / "both"), str(other))
    names = [row["variant"] for row in table(asked / "both", other)]
    for model in ("teacher", "without the teacher"):  # the very same runs, but neither hides what the other was asked
        assert sum(name.endswith(f", {model}") for name in names) == 2
    same = evaluated(tmp_path / "same" / "runs", 3e-3, further=True)
    assert {"teacher", "without the teacher"} <= {row["variant"] for row in table(asked / "both", same)}  # control


def test_another_baseline_turns_the_difference_round(runs: Path):
    rows = {row["variant"]: row for row in table(runs / "both", baseline="far")}
    turned = {row["variant"]: row for row in table(runs / "both")}
    one, other = rows["near"]["kl_to_teacher"]["difference"], turned["far"]["kl_to_teacher"]["difference"]
    assert one["mean"] == pytest.approx(-other["mean"])
    assert one["interval"] == pytest.approx([-other["interval"][1], -other["interval"][0]])


@pytest.mark.parametrize("sort", [*QUALITY, *FURTHER, "variant"])
def test_it_can_be_sorted_by_every_figure(asked: Path, runs: Path, tmp_path: Path, sort: str):
    rows = table(asked / "both", sort=sort)
    values = [row["variant"] if sort == "variant" else row[sort]["mean"] for row in rows]
    assert values == sorted(values, reverse=sort not in ("kl_to_teacher", "bits_per_byte", "variant"))
    told = Place(tmp_path).pipeline("compare", str(runs / "both"), "--sort", sort, status=2 if sort in FURTHER else 0)
    assert ("no such figure" in told) == (sort in FURTHER)  # control: where nobody measured it


def test_a_variant_is_its_settings_and_its_seeds_are_one_row(runs: Path, tmp_path: Path):
    folders = [evaluated(tmp_path / "runs", rate, seed) for rate in (1e-3, 2e-3) for seed in (0, 1)]
    found = [row for row in table(*folders) if row["model"] == "distilled"]
    assert sorted((row["variant"], row["seeds"]) for row in found) == sorted([(folders[0].name, 2), (folders[2].name, 2)])
    assert table(*folders, *folders) == table(*folders)  # each once
    again = table(runs / "both", *(runs / "evaluate").iterdir())
    assert again == table(runs / "both")


def test_rows_of_one_name_are_numbered(tmp_path: Path):
    runs = tmp_path / "runs"
    variants = {"teacher": [evaluated(runs)], "without the teacher": [evaluated(runs, 2e-3)]}
    one, other = (ablation(runs, name, variants) for name in ("one", "other"))
    names = [row["variant"] for row in table(one)]
    assert sorted(names) == ["student before training", "teacher", "teacher (2)", "without the teacher", "without the teacher (2)"]
    assert table(one, other) == table(one)  # the same runs
    again = evaluated(runs, 3e-3)
    third = ablation(runs, "third", {"teacher": [again]})
    rows = {row["variant"]: row["model"] for row in table(one, third)}
    assert rows["teacher"] == rows["teacher (2)"] == "distilled"
    assert rows["teacher (3)"] == "teacher"
    assert Place(tmp_path).pipeline("report", str(one), str(third), "--out", "x.html")


def test_what_lies_under_an_experiments_name_is_the_run_itself(tmp_path: Path):
    runs = tmp_path / "runs"
    folder = evaluated(runs)
    published = runs / "mine"
    published.mkdir()
    for name in ("results.json", "records.parquet"):
        shutil.copyfile(folder / name, published / name)
    (found,) = found_in([published])
    assert found.finished
    assert found.finished.path == folder
    assert found.evaluated.variant == "mine"
    shutil.rmtree(runs / "evaluate")  # copied somewhere else, alone
    alone = {row["variant"]: row for row in table(published)}
    assert alone["mine"]["kl_to_teacher"]["interval"]
    (published / "records.parquet").unlink()
    assert {row["variant"]: row for row in table(published)}["mine"]["kl_to_teacher"]["interval"] is None


def test_old_evaluations_have_no_intervals_and_that_is_said(tmp_path: Path):
    runs = tmp_path / "runs"
    folder = ablation(runs, "old", {"a": [evaluated(runs, seed=seed, kept=False) for seed in (0, 1)], "b": [evaluated(runs, 2e-3, seed) for seed in (0, 1)]})
    told = Place(tmp_path).pipeline("compare", str(folder))
    assert "No intervals for a:" in told
    assert "pipeline evaluate" in told
    rows = {row["variant"]: row for row in table(folder)}
    assert rows["a"]["kl_to_teacher"]["interval"] is None
    assert rows["b"]["kl_to_teacher"]["interval"]
    assert rows["b"]["kl_to_teacher"]["difference"]["mean"]
    assert rows["b"]["kl_to_teacher"]["difference"]["interval"] is None
    shutil.rmtree(runs / "evaluate")  # an ablation that was copied alone
    assert {row["variant"] for row in table(folder)} == set(rows)


def test_other_targets_and_few_seeds_are_said(runs: Path, tmp_path: Path):
    place = Place(tmp_path)
    assert "3 seeds tell little" in place.pipeline("compare", str(runs / "both"))
    one = evaluated(tmp_path / "runs", 1e-3)
    assert "nothing of other seeds" in place.pipeline("compare", str(one))
    other = evaluated(tmp_path / "runs", 1e-3, cache="b")
    told = place.pipeline("compare", str(one), str(other))
    assert "targets of different caches" in told
    assert "not paired" in told


@pytest.mark.parametrize("of", ["runs", "asked"])
def test_every_form_says_the_same(request: pytest.FixtureRequest, tmp_path: Path, of: str):
    runs = request.getfixturevalue(of)
    place, folder, keys = Place(tmp_path), str(runs / "both"), [*QUALITY, *(FURTHER if of == "asked" else [])]
    told = place.json("compare", folder)
    assert json.loads(place.pipeline("compare", folder, "--format", "json")) == told
    assert told["rows"] == json.loads(json.dumps(table(runs / "both")))
    text, markdown, comma = (place.pipeline("compare", folder, "--format", form, "--out", "out") for form in ("text", "markdown", "csv"))
    assert text.splitlines()[0].split("  ")[0] == "variant"
    assert "\x1b" not in text
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in markdown.splitlines() if line.startswith("|")]
    read = list(csv.DictReader(io.StringIO(comma)))
    assert len(lines) == len(told["rows"]) + 2
    for row, cells, line in zip(told["rows"], lines[2:], read, strict=True):
        assert cells[0].strip() == line["variant"] == row["variant"]
        for key, cell in zip(keys, cells[2:], strict=True):
            figure = row[key]
            assert float(line[f"{key}_mean"]) == figure["mean"]
            assert float(line[f"{key}_interval_low"]) == figure["interval"][0]
            assert (line[f"{key}_difference_high"] == "") == (figure["difference"] is None)
            for said in (cell, text):
                assert f"{figure['mean']:.3f}" in said
                assert f"[{figure['interval'][0]:.3f}, {figure['interval'][1]:.3f}]" in said
    assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out" / "comparison.md").read_text() == markdown
    assert (tmp_path / "out" / "comparison.csv").read_text() == comma
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == told


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


@settings(deadline=None, max_examples=60)
@given(st.lists(names, min_size=1, max_size=4, unique=True))
def test_no_name_breaks_a_table(given_names: list[str]):
    models = [{"distilled": {"kl_to_teacher": 1.0 + i, "tasks": {f"task {given_names[-1]}": {"accuracy": 0.5}}}} for i in range(len(given_names))]
    rows = compared(rows_of([Evaluated(name, name, 0, figures, None) for name, figures in zip(given_names, models, strict=True)]))
    markdown = comparison_table(rows).splitlines()
    assert len(markdown) == 2 + len(rows)
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == len(QUALITY) + 4 for line in markdown)
    assert not any("<" in line for line in markdown)
    text = comparison_text(rows)
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    read = list(csv.DictReader(io.StringIO(comparison_csv(rows), newline="")))
    assert [float(line["kl_to_teacher_mean"]) for line in read] == [1.0 + i for i in range(len(rows))]
    assert [line["variant"] for line in read] == [printable(row["variant"]) for row in rows]


def test_what_cannot_be_compared_is_told(runs: Path, tmp_path: Path):
    place, both = Place(tmp_path), str(runs / "both")
    (tmp_path / "empty").mkdir()
    trained = next((runs / "train-student").iterdir())
    for words, said in (
        (["nowhere"], "There is no folder nowhere"),
        (["empty"], "has no evaluation that is finished"),
        ([str(trained)], "is a folder of train-student, and only evaluations"),
        ([both, "--sort", "kl"], "there is no such figure"),
        ([both, "--baseline", "nera"], "did you mean 'near'?"),
        ([], "Missing argument"),
    ):
        assert said in place.pipeline("compare", *words, status=2)
        if "--sort" not in words:
            assert said in place.pipeline("report", *words, "--out", "x.html", status=2)
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize("damage", ["results.json", "records.parquet", "ablation.json", "no models", "no tasks"])
def test_damage_is_told(tmp_path: Path, damage: str):
    runs = tmp_path / "runs"
    folder = evaluated(runs)
    given = ablation(runs, "one", {"a": [folder]})
    if damage == "ablation.json":
        (given / damage).write_text('{"trials": [{"variant": "a"}]}')
    elif damage == "no models":
        given = runs / "published"
        given.mkdir()
        (given / "results.json").write_text('{"models": 3}')
    elif damage == "no tasks":
        given = runs / "published"
        given.mkdir()
        (given / "results.json").write_text('{"models": {"distilled": {"tasks": {"mmlu_medical": 3}}}}')
    else:
        (folder / damage).write_bytes((folder / damage).read_bytes()[:-3] + b"xyz")
    told = Place(tmp_path).pipeline("compare", str(given), status=1)
    assert ("damaged" in told) or ("is not what" in told)


def test_every_figure_has_a_title():
    assert set(QUALITY) <= set(COLUMNS)
