"""`pipeline report`: one page that is whole, needs nothing else, and cannot be written to by a name."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.reporting import report_plots as plots
from tests.conftest import Place
from tests.reporting.evaluations import ablation, evaluated

VOID = {"meta", "br", "link", "img", "hr", "input"}
EVIL = "<script>alert(1)</script>\"'><img src=https://example.org/x onerror=alert(2)> $x_2$ {{body}} &amp; --> 名"


class Page(HTMLParser):
    """Sees that every tag is closed where it must be, and keeps what a page could reach out with."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
                self.targets.append(value or "")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(place: Path, *folders: Path) -> Page:
    told = Place(place).json("report", *map(str, folders), "--out", "out/report.html")
    text = (place / "out" / "report.html").read_text(encoding="utf-8")
    assert told["report"] == "out/report.html"
    assert told["rows"]
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(target.startswith("#") and target[1:] in page.ids for target in page.targets)
    assert not re.search(r"https?:|url\((?!#)|@import|//[a-z]", re.sub(r"example\.org|https://example", "", text))
    assert not {"script", "link", "iframe", "object", "embed", "img", "form", "base"} & page.tags.keys()
    return page


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path):
    runs = tmp_path / "runs"
    folder = ablation(runs, "abl", {"near": [evaluated(runs, seed=seed) for seed in (0, 1)], "far": [evaluated(runs, 2e-3, seed, 2.5) for seed in (0, 1)]})
    page = page_of(tmp_path, folder)
    assert page.tags["svg"] == 5  # figures, differences, curves, radar, calibration
    for said in (
        "near",
        "far",
        "without the teacher",
        "forward passes",
        "50 s",
        "1.7 min",
        "training.learning_rate",
        "0.002",
        "2.13.0",
        "heart",
        "none given",
        "exp(−KL)",
        "3 seeds",
        "2 seeds tell little",
    ):
        assert (said in page.text) == (said != "3 seeds"), said


def test_what_new_versions_measure_is_on_the_page(tmp_path: Path):
    runs = tmp_path / "runs"
    theirs = {"teacher": 0.741, "student": 0.511, "baseline": None, "retention": 0.69}
    published = {
        "name": "Others",
        "source": "a paper",
        "models": {"teacher": "T", "student": "S", "baseline": None},
        "figures": {"mmlu_anatomy": theirs},
        "cost": {"latency_ms": theirs | {"teacher": 1006.0}},
        "notes": ["no note"],
    }
    near = [evaluated(runs, seed=seed, further=True, published=published) for seed in (0, 1)]
    page = page_of(tmp_path, ablation(runs, "abl", {"near": near, "far": [evaluated(runs, 2e-3, seed, 2.5, further=True) for seed in (0, 1)]}))
    assert page.tags["svg"] == 6  # beside those of the test above, fidelity by entropy and position
    assert page.tags["details"] == 4  # an evaluation each
    models = [json.loads((folder / "results.json").read_text())["models"]["distilled"] for folder in near]
    told = {row["variant"]: row for row in Place(tmp_path).json("compare", str(runs / "abl"))["rows"]}
    asked = [model["tasks"]["mmlu_medical"] for model in models]
    means = [np.mean([one[key] for one in asked]) for key in ("chance", "calibration_error", "brier")] + [np.mean([one["abstaining"]["0.5"] for one in asked])]
    interval = told["near"]["mmlu_medical"]["interval"]
    assert f"near20{np.mean([one['accuracy'] for one in asked]):.3f}{interval[0]:.3f} to {interval[1]:.3f}{''.join(f'{mean:.3f}' for mean in means)}" in page.text
    subtask = np.mean([one["subtasks"]["mmlu_anatomy"]["accuracy"] for one in asked])
    assert re.search(rf"mmlu_anatomy12[\d.]*{subtask:.3f}", page.text)
    assert "near31.062.5700221212" in page.text  # parameters in millions, weights, memory; milliseconds of a pass and to the first token, of one and of 8
    assert "near0.2000.500–" in page.text  # total variation, top-5 agreement, no correlation
    assert "0.741 / – / 0.511 (0.690)" in page.text
    assert "latency_ms1,006–0.511Published, not measured here" in page.text
    for said in (
        "Theirs: the published figures of Others",
        "They were not measured here",
        "Of 60 records and questions, 3 have 13 words in a row",
        "mmlu_anatomy, in the training records",
        "McNemar p",
    ):
        assert (said in page.text) == (said != "mmlu_anatomy, in the training records"), said  # the three that were seen are held-out records
    assert "heldout (questions), in the training records" in page.text
    by_specialty = page.text.rpartition("By specialty")[2].partition("Means over seeds. A specialty")[0]
    assert "heart" in by_specialty
    assert "mmlu_anatomy" not in by_specialty  # the held-out records alone
    old = page_of(tmp_path, evaluated(tmp_path / "old" / "runs")).text  # control
    for gone in ("mmlu_medical", "theirs:", "13 words", "McNemar", "first token", "total variation"):
        assert gone not in old, gone
    for said in ("These evaluations asked none", "lacks `fidelity`", "did not compare the models task by task"):
        assert said in old
        assert said not in page.text


def test_what_the_training_records_have_is_said_of_each_variant_where_it_differs(tmp_path: Path):
    runs = tmp_path / "runs"
    given = ablation(runs, "abl", {"all": [evaluated(runs, further=True)], "few": [evaluated(runs, 2e-3, further=True, records=10)]})
    said = page_of(tmp_path, given).text
    assert "all: Of 60 records" in said
    assert "few: Of 30 records" in said


def test_places_without_any_position_are_left_out_of_the_plot():
    look = plots.looks([("v", "distilled")])[0]
    figure = plots.lines([("t", "x", ["a", "b", "c"], [(look, [None, 1.0, 2.0]), (plots.looks([("w", "sft")])[0], [None] * 3)])])
    (axis,) = figure.axes
    (line,) = axis.lines
    assert line.get_xydata().tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "b", "c"]


def test_a_name_stays_text(tmp_path: Path):
    runs = tmp_path / "runs"
    folder = ablation(runs, "abl", {EVIL: [evaluated(runs, specialties=("<b>heart</b>", EVIL))], "b": [evaluated(runs, 2e-3, specialties=("<b>heart</b>", EVIL))]})
    theirs = {"teacher": 0.7, "student": 0.5, "baseline": 0.4, "retention": 0.7}
    published = {"name": EVIL, "source": EVIL, "models": {"teacher": EVIL, "student": EVIL, "baseline": EVIL}, "figures": {EVIL: theirs}, "cost": {EVIL: theirs}, "notes": [EVIL]}
    asked = evaluated(runs, 3e-3, further=True, published=published, subjects={EVIL: 4, f"2 {EVIL}": 4})
    other = page_of(tmp_path, ablation(runs, "asked", {EVIL: [asked]}))
    assert other.text.count(EVIL) > 10
    page = page_of(tmp_path, folder)
    assert EVIL in page.text
    assert "<b>heart</b>" in page.text
    assert page.text.count("Results") == 2  # control: what a name says is put in place of nothing


@pytest.mark.parametrize("how", ["old", "one", "no trainings", "published alone", "one record", "eight"])
def test_what_is_not_there_is_said_and_the_page_is_whole(tmp_path: Path, how: str):
    runs = tmp_path / "runs"
    if how == "eight":
        given = ablation(
            runs,
            "abl",
            {f"variant {i} with quite a long name, which goes on and on without an end": [evaluated(runs, 1e-3 * (i + 1), seed, records=12, steps=3) for seed in range(5)] for i in range(8)},
        )
    else:
        given = evaluated(runs, kept=how != "old", records=1 if how == "one record" else 20, control=None if how == "one" else 3.0, steps=1 if how == "one" else 10)
    if how == "no trainings":
        shutil.rmtree(runs / "train-student")
    if how == "published alone":
        (tmp_path / "x").mkdir()
        given = shutil.copyfile(given / "results.json", tmp_path / "x" / "results.json").parent
    page = page_of(tmp_path, given)
    said = {
        "old": "a version that kept no figures",
        "one": "There is one variant",
        "no trainings": "No training log of B, C",
        "published alone": "say nothing of them",
        "one record": "have no specialties",
        "eight": "variant 7 with quite",
    }
    assert said[how] in page.text


def test_a_real_run_has_a_page(done: Place, tmp_path: Path):
    page = page_of(tmp_path, done.path / "runs" / "tiny")
    assert page.tags["svg"] == 6
    assert str(done.finished("evaluate").path) in page.text
    for specialty in ("lung", "nerve"):
        assert specialty in page.text


def test_figures_by_specialty_are_those_of_its_records(tmp_path: Path):
    folder = evaluated(tmp_path / "runs")
    page = page_of(tmp_path, folder)
    rows = [row for row in pq.read_table(folder / "records.parquet").to_pylist() if row["model"] == "distilled"]
    heart = [row for row in rows if row["specialty"] == "heart"]
    kl = sum(row["kl"] for row in heart) / sum(row["aligned"] for row in heart)
    right = sum(row["right"] for row in heart) / len(heart)
    assert re.search(rf"heart{len(heart)}{kl:.3f}", page.text)  # the teacher, whose KL is 0, has no column
    assert re.search(rf"heart{len(heart)}\d\.\d{{3}}{right:.3f}", page.text)


def test_shares_of_the_teacher_are_as_the_page_says(tmp_path: Path):
    runs = tmp_path / "runs"
    page = page_of(tmp_path, evaluated(runs, kl=2.0))
    told = {row["variant"]: row for row in Place(tmp_path).json("compare", str(next((runs / "evaluate").iterdir())))["rows"]}
    (name,) = (name for name, row in told.items() if row["model"] == "distilled")
    mine, teacher = told[name], told["teacher"]
    shares = [
        np.exp(-mine["kl_to_teacher"]["mean"]),
        mine["top1_agreement"]["mean"],
        teacher["bits_per_byte"]["mean"] / mine["bits_per_byte"]["mean"],
        mine["accuracy"]["mean"] / teacher["accuracy"]["mean"],
    ]
    assert "".join(f"{share:.1%}" for share in shares) in page.text


def test_rows_have_letters_and_colours_of_their_own():
    found = plots.looks([(f"v{i}", "distilled") for i in range(30)])
    assert len({look.letter for look in found}) == 30
    assert len({(look.colour, look.dashes) for look in found}) == 30
    assert found[26].letter == "AA"


def test_a_plot_takes_the_pages_colours(tmp_path: Path):
    look = plots.looks([("v", "distilled")])[0]
    with plots.style("x"):
        svg = plots.as_svg(plots.bars([("t", [plots.Bar(look, 1.0, (0.5, 1.5), [0.9, 1.1])])]), "x")
        again = plots.as_svg(plots.bars([("t", [plots.Bar(look, 1.0, (0.5, 1.5), [0.9, 1.1])])]), "x")
    assert svg == again
    assert "currentColor" in svg
    assert plots.INK not in svg
    assert look.colour in svg
    assert "#ffffff" not in svg
