"""training.more_teachers: each position is taught by those who say something there, by their weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.losses.forward_kl import forward_kl
from pipeline.training.batches import Batch, Said, make_batch
from pipeline.training.objective import loss_of, mass, parts
from tests.conftest import CONFIG, Place, link_inputs
from tests.training.test_batches import STORED, examples
from tests.training.test_objective import table

PLAIN = ("--set", "training.objective.0.tail=rest", "--set", "training.steps=4", "--set", "training.warmup_steps=1")
OWN = [2.0, 1.0, 0.0, 1.0, 1.0]
OTHERS = [1.0, 1.0, 1.0, 0.0, 3.0]


def batch(rows_at_once: int = 2**40) -> Batch:
    """Teachers who each say nothing of another record; the second is the first with its records' words at other temperatures' masses."""
    records, words = examples()
    other = [replace(word, logprobs=word.logprobs * 0.9) for word in words]
    said = Said([None if n == 0 else word for n, word in enumerate(other)], OTHERS, STORED)
    own = [None if n == 1 else word for n, word in enumerate(words)]
    return make_batch(records, own, [1.0, 2.0, 1.0, 1.0, 0.5], STORED, 2.0, others=[said], own_share=OWN, rows_at_once=rows_at_once)


def test_the_loss_is_the_mean_over_teachers_by_weight_of_those_who_know_the_row():
    whole = batch()
    logits = table()[whole.ids.flatten()[whole.rows]].double()
    values = torch.zeros(2, len(whole.rows), dtype=torch.float64)
    share = torch.zeros_like(values)
    for n, (known, target, weights) in enumerate([(whole.known, whole.teacher, OWN), (whole.others[0].known, whole.others[0].target, OTHERS)]):
        values[n, known] = forward_kl(logits[known], target)
        share[n, known] = torch.tensor(weights, dtype=torch.float64)[whole.record[known]]
    share = share / share.sum(0).clamp(min=1e-9)
    sure = torch.ones_like(share)
    for n, word in enumerate(examples()[1]):
        for teacher, silent in ((0, 1), (1, 0)):
            if n != silent:
                known = whole.known if teacher == 0 else whole.others[0].known
                sure[teacher, known[whole.record[known] == n]] = torch.from_numpy(word.reliability).double()
    counts = share * sure * whole.weights.double()
    expected = (counts * values).sum() / counts.sum()
    loss, shares = loss_of(parts([("forward_kl", 1.0, {}, "rest")]), whole, logits, mass(whole))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(shares["forward_kl"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("rows_at_once", [1, 5, 13])
def test_in_parts_it_is_the_same(rows_at_once: int):
    whole, cut = batch(), batch(rows_at_once)
    logits = table()[whole.ids.flatten()[whole.rows]]
    objective = parts([("forward_kl", 0.7, {}, "rest"), ("cross_entropy", 0.3, {}, "rest")])
    expected, _ = loss_of(objective, whole, logits, mass(whole))
    found = sum(loss_of(objective, cut.part(each), logits[each.rows], mass(cut))[0] for each in cut.cuts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert len(cut.cuts) > 2


@pytest.fixture(scope="module")
def second(done: Place, made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Another teacher's cache of the same records, and its projection."""
    place = link_inputs(made, tmp_path_factory.mktemp("second"))
    for stage in ("prepare-data", "cache-teacher", "fit-projection"):
        place.pipeline(stage, CONFIG, "--set", "teacher.model=tiny/student")
    return {stage: str(place.path / place.finished(stage).path) for stage in ("cache-teacher", "fit-projection")}


def trained(made: Path, done: Place, path: Path, *settings: str, status: int = 0) -> list[dict] | str:
    place = link_inputs(made, path)
    given = [word for before in ("cache-teacher", "fit-projection") for word in ("--use", f"{before}={done.path / done.finished(before).path}")]
    said = place.pipeline("train-student", CONFIG, *given, *PLAIN, *(word for setting in settings for word in ("--set", setting)), status=status)
    return [json.loads(line) for line in place.finished("train-student").file("metrics.jsonl").read_text().splitlines()] if status == 0 else said


def more(folders: dict[str, str], **share: object) -> str:
    return "training.more_teachers=" + json.dumps([{"cache": folders["cache-teacher"], "projection": folders["fit-projection"], **share}])


def test_a_teacher_twice_is_that_teacher(made: Path, done: Place, tmp_path: Path):
    again = {stage: str(done.path / done.finished(stage).path) for stage in ("cache-teacher", "fit-projection")}
    once, twice = trained(made, done, tmp_path / "once"), trained(made, done, tmp_path / "twice", more(again, weight=3.0))
    for one, two in zip(once, twice, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_two_teachers_are_another_lesson_and_weights_decide_whose(made: Path, done: Place, second: dict[str, str], tmp_path: Path):
    alone = trained(made, done, tmp_path / "alone")
    both = trained(made, done, tmp_path / "both", more(second))
    assert both[0]["forward_kl"] != pytest.approx(alone[0]["forward_kl"], rel=1e-3)
    silent = trained(made, done, tmp_path / "silent", more(second, weight=0.0))
    for one, other in zip(alone, silent, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
    only = trained(made, done, tmp_path / "only", more(second), "training.own_teacher={weight: 0.0}")
    assert min(alone[0]["forward_kl"], only[0]["forward_kl"]) < both[0]["forward_kl"] < max(alone[0]["forward_kl"], only[0]["forward_kl"])


def test_a_weight_by_specialty_is_that_of_its_records(made: Path, done: Place, second: dict[str, str], tmp_path: Path):
    by_name = trained(made, done, tmp_path / "named", more(second, weight=0.0, specialties={"eye": 1.0}), "training.own_teacher={specialties: {eye: 0.0}}")
    alone, only = trained(made, done, tmp_path / "alone"), trained(made, done, tmp_path / "only", more(second), "training.own_teacher={weight: 0.0}")
    first = {key: (by_name[0][key], alone[0][key], only[0][key]) for key in by_name[0] if key.startswith("specialty/")}
    assert len(first) > 1
    for key, (mixed, own, other) in first.items():
        assert mixed == pytest.approx(other if key == "specialty/eye" else own, rel=1e-3)


def test_what_a_teachers_folder_holds_is_in_the_name_of_the_run_and_where_it_lies_is_not(made: Path, done: Place, second: dict[str, str], tmp_path: Path):
    place = link_inputs(made, tmp_path / "place")
    moved = {stage: str(shutil.copytree(folder, tmp_path / stage)) for stage, folder in second.items()}

    def name(*settings: str) -> str:
        words = [word for setting in settings for word in ("--set", setting)]
        return next(row["folder"] for row in place.json("status", CONFIG, *PLAIN, *words)["stages"] if row["stage"] == "train-student")

    assert name(more(second)) == name(more(moved)) != name()
    own = {stage: str(done.path / done.finished(stage).path) for stage in second}
    assert name(more(own)) != name(more(second))
    shutil.rmtree(moved["cache-teacher"])
    assert name(more(second)) == name(more(moved))  # remembered
    assert "No finished folder is at" in place.pipeline("status", CONFIG, *PLAIN, "--set", more({**moved, "cache-teacher": "nowhere"}), status=2)


def test_wrong_folders_are_named(made: Path, done: Place, second: dict[str, str], tmp_path: Path):
    crossed = {"cache-teacher": second["fit-projection"], "fit-projection": second["cache-teacher"]}
    assert "one of cache-teacher is asked for" in trained(made, done, tmp_path / "crossed", more(crossed), status=2)
    mixed = {"cache-teacher": second["cache-teacher"], "fit-projection": str(done.path / done.finished("fit-projection").path)}
    assert "another teacher vocabulary" in trained(made, done, tmp_path / "mixed", more(mixed), status=2)


@pytest.mark.parametrize("settings", [("training.own_teacher={weight: 2.0}",), ("training.token_temperature={strength: 0.5}", "more"), ("training.objective.0.tail=calibrated", "more")])
def test_what_makes_no_sense_is_refused(made: Path, done: Place, second: dict[str, str], tmp_path: Path, settings: tuple[str, ...]):
    said = trained(made, done, tmp_path / "wrong", *(more(second) if setting == "more" else setting for setting in settings), status=2)
    assert "leave it out" in said or "leave token_temperature and other tails out" in said
