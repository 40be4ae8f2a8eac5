"""`pipeline ablate`: many students from one cache, nothing twice, and never a teacher."""

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from pipeline.config import load_ablation
from pipeline.errors import ConfigError
from pipeline.reporting.comparison import CONTROL, DISTILLED, Evaluated, compared, rows_of
from pipeline.reporting.tables import comparison_table
from tests.conftest import CONFIG, Place
from tests.test_reliability import copied

ABLATION = """
base: {base}
seeds: [0, 1]
variants:
  as it is: {{}}
  reverse:
    training.objective: [{{loss: reverse_kl, weight: 0.7}}, {{loss: cross_entropy, weight: 0.3}}]
"""


@pytest.fixture
def place(done: Place, tmp_path: Path) -> Place:
    """A cache, the first student of the ablation, and no teacher any more."""
    place = copied(done, tmp_path / "copy")
    place.pipeline("status", CONFIG)
    shared = (place.path / "tiny").resolve()
    (place.path / "tiny").unlink()
    shutil.copytree(shared, place.path / "tiny")
    shutil.rmtree(place.path / "tiny" / "teacher")
    (place.path / "a.yaml").write_text(ABLATION.format(base=CONFIG))
    return place


def cache(place: Place) -> tuple[str, str]:
    return "--use", f"cache-teacher={place.finished('cache-teacher').path}"


def manifests(place: Place) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in place.path.glob("runs/*/*/manifest.json")}


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_what_is_missing_is_run_once_and_a_second_call_does_nothing(place: Place, jobs: str):
    before = manifests(place)
    told = place.json("ablate", "a.yaml", *cache(place), "--jobs", jobs)
    after = manifests(place)
    assert before.items() <= after.items()  # what was finished was taken
    made = [Path(file).parts[-3] for file in after.keys() - before.keys()]
    # three students more and one control, whose objective is without a teacher for both variants; four evaluations are made, one is there
    assert sorted(made) == ["evaluate"] * 3 + ["train-student"] * 4
    assert {row["variant"] for row in told["rows"]} == {"as it is", "reverse", "without the teacher"}
    assert all(row["seeds"] == 2 for row in told["rows"])
    trials = json.loads((place.path / "runs" / "a" / "ablation.json").read_text())["trials"]
    for row in told["rows"]:
        name, model = (row["variant"], "distilled") if row["variant"] != "without the teacher" else ("reverse", "sft")
        values = [trial["models"][model]["kl_to_teacher"] for trial in trials if trial["variant"] == name]
        figure = row["kl_to_teacher"]
        assert (figure["mean"], figure["lowest"], figure["highest"]) == (pytest.approx(sum(values) / 2), min(values), max(values))
        assert figure["deviation"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
        assert figure["interval"][0] <= figure["mean"] <= figure["interval"][1]
        assert (figure["difference"] is None) == row["baseline"] == (row["variant"] == "as it is")
    kls = [row["kl_to_teacher"]["mean"] for row in told["rows"]]
    assert kls == sorted(kls)
    with (place.path / "runs" / "a" / "ablation.csv").open() as file:
        assert [float(row["kl_to_teacher_mean"]) for row in csv.DictReader(file)] == pytest.approx(kls)
    begun = time.monotonic()
    assert "reverse" in place.pipeline("ablate", "a.yaml", *cache(place))
    assert time.monotonic() - begun < 3
    assert manifests(place) == after


def test_a_cache_that_is_not_there_is_told_and_no_teacher_is_asked(place: Place):
    (place.path / "b.yaml").write_text(f"base: {CONFIG}\nvariants: {{other: {{targets.logits.keep: 8}}, same: {{}}}}")
    shutil.copytree(place.path / "tiny" / "student", place.path / "tiny" / "teacher")
    told = place.pipeline("ablate", "b.yaml", status=2)
    assert "Variant other needs cache-teacher" in told
    assert "never asks a teacher" in told
    assert not (place.path / "runs" / "b").exists()


def test_a_run_that_fails_is_told_with_its_log_and_the_others_are_kept(place: Place):
    (place.path / "c.yaml").write_text(f"base: {CONFIG}\nvariants:\n  fine: {{}}\n  broken: {{training.objective: [{{loss: uld}}, {{loss: forward_kl}}], training.temperature: 9.0}}")
    before = manifests(place)
    told = place.pipeline("ablate", "c.yaml", *cache(place), status=1)
    assert "train-student broken, seed 0 failed: training.temperature goes up to 9" in told
    assert list(place.path.glob("runs/c/logs/train-student-broken*.log"))
    assert manifests(place) == before


def test_it_can_be_stopped_and_goes_on(place: Place):
    process = place.start("ablate", "a.yaml", *cache(place), "--jobs", "2")
    deadline = time.monotonic() + 120
    while not list(place.path.glob("runs/a/logs/train-student-*.log")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and str(place.path).encode() in _command(pid)]
    assert len(place.json("ablate", "a.yaml", *cache(place))["rows"]) == 3


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: {base}", "either variants or grid"),
        ("base: {base}\nvariants: {{a: {{}}}}\ngrid: {{training.seed: [1]}}", "either variants or grid"),
        ("base: {base}\nvariant: {{a: {{}}}}", "did you mean 'variants'"),
        ("base: {base}\nseeds: [1, 1]\nvariants: {{a: {{}}}}", "given twice"),
        ("base: {base}\nvariants: {{a: {{training.step: 3}}}}", "variant a: --set training.step=3: unknown key 'training.step'; did you mean 'steps'?"),
        ("base: nowhere.yaml\nvariants: {{a: {{}}}}", "variant a: The experiment file"),
        ("variants: {{a: {{}}}}", "'base' is missing"),
    ],
)
def test_what_is_wrong_with_it_is_told(done: Place, tmp_path: Path, text: str, said: str):
    place = copied(done, tmp_path / "copy")
    (place.path / "d.yaml").write_text(text.format(base=CONFIG))
    assert said in place.pipeline("ablate", "d.yaml", status=2)


def test_a_grid_is_every_combination(tmp_path: Path):
    file = tmp_path / "grid.yaml"
    file.write_text("base: x.yaml\ngrid: {training.learning_rate: [1.0e-3, 1.0e-4], training.steps: [10, 20]}")
    assert load_ablation(file).changes() == {f"learning_rate={rate}, steps={steps}": {"training.learning_rate": rate, "training.steps": steps} for rate in (1e-3, 1e-4) for steps in (10, 20)}
    file.write_text("base: x.yaml\ngrid: {}")
    with pytest.raises(ConfigError):
        load_ablation(file)


def test_controls_of_their_own_have_rows_of_their_own_and_a_single_seed_no_spread():
    def one(variant: str, seed: int, control: str, kl: float | None) -> Evaluated:
        models = {"distilled": {"kl_to_teacher": kl, "bits_per_byte": 1.0}, "sft": {"kl_to_teacher": 3.0}}
        return Evaluated(variant, variant, seed, models, None, {"train-student": f"{variant}{seed}", "train-control": control})

    def rows(*found: Evaluated) -> list[dict]:
        return compared(rows_of(found, (DISTILLED, CONTROL)))

    apart = rows(one("a", 0, "x", 2.0), one("b", 0, "y", None))
    assert [row["variant"] for row in apart] == ["a", "a, without the teacher", "b, without the teacher", "b"]
    assert apart[-1]["kl_to_teacher"] is None
    assert "| a | 1 | 2.000 | 1.000 | – | – |" in comparison_table(apart)
    together = rows(one("a", 0, "x", 2.0), one("a", 1, "z", 2.5), one("b", 0, "x", 1.0), one("b", 1, "z", 1.0))
    assert [row["variant"] for row in together] == ["b", "a", "without the teacher"]
    assert "2.250 (2.000–2.500)" in comparison_table(together)
