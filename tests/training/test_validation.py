"""training.validation: what is put aside, what is measured there, and which student is the result."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import stages.train_student as stage
from tests.conftest import CONFIG, Place, link_inputs

# so high a rate that the student gets worse before the end
WORSENS = ["--set", "training.steps=12", "--set", "training.learning_rate={from: 0.01, to: 1.0, schedule: exponential}", "--set", "training.warmup_steps=0", "--set", "machine.checkpoint_steps=4"]
VALIDATED = [*WORSENS, "--set", "training.validation={every: 2, records: 6}"]


@pytest.fixture
def place(done: Place, tmp_path: Path) -> Place:
    """A cache, and no student yet."""
    place = link_inputs(done.path, tmp_path / "place")
    shutil.copytree(done.path / "runs", place.path / "runs", symlinks=True)
    shutil.rmtree(place.path / "runs" / "train-student")
    return place


def trained(place: Place, *words: str) -> tuple[Path, dict]:
    report = place.json("train-student", CONFIG, *words)
    return place.path / report["folder"], report["summary"]


def logged(folder: Path) -> dict[int, float]:
    """Step -> validation loss."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation"] for line in lines if "validation" in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_student_is_the_result_and_is_what_it_was_at_that_step(place: Place, monkeypatch: pytest.MonkeyPatch):
    kept: dict[int, dict[str, torch.Tensor]] = {}
    real = stage._checkpoint

    def checkpoint(out, step, *others):
        real(out, step, *others)
        kept[step] = {name: tensor.clone() for name, tensor in load_file(stage._file(out, step)).items()}

    monkeypatch.setattr(stage, "_checkpoint", checkpoint)
    folder, summary = trained(place, *VALIDATED)
    losses = logged(folder)
    best = min(losses, key=lambda step: losses[step])
    assert list(losses) == [2, 4, 6, 8, 10, 12]
    assert best == summary["best_step"] < 12, "the test needs a student that gets worse"
    saved = weights(folder)
    assert all(torch.equal(saved[name], kept[best][f"model.model.{name}"]) for name in saved), kept[best].keys()
    last, summary = trained(place, *WORSENS, "--set", "training.validation={every: 2, records: 6, keep: last}")
    assert logged(last) == losses
    assert summary["best_step"] == best
    assert not equal(folder, last)
    assert all(torch.equal(weights(last)[name], kept[12][f"model.model.{name}"]) for name in saved)


@pytest.mark.parametrize("damage", ["killed", "the best one is damaged"])
def test_what_is_killed_after_its_best_step_ends_the_same(place: Place, monkeypatch: pytest.MonkeyPatch, damage: str):
    straight, summary = trained(place, "--set", "student.layers=[1, 0]", *VALIDATED)
    best = summary["best_step"]
    real = stage._checkpoint

    def checkpoint(out, step, *others):
        real(out, step, *others)
        if step == 12:
            assert {f"step-{best:07d}", "step-0000012"} < set(out.names())
            raise KeyboardInterrupt

    (place.path / "runs").rename(place.path / "straight")
    straight = place.path / "straight" / straight.relative_to(place.path / "runs")
    shutil.copytree(place.path / "straight", place.path / "runs", symlinks=True)
    shutil.rmtree(place.path / "runs" / "train-student")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_checkpoint", checkpoint)
        place.pipeline("train-student", CONFIG, "--set", "student.layers=[1, 0]", *VALIDATED, status=1)
    (begun,) = (place.path / "runs" / "train-student").glob("*")
    if damage != "killed":
        file = begun / "checkpoints" / f"step-{best:07d}.safetensors"
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
    folder, again = trained(place, "--set", "student.layers=[1, 0]", *VALIDATED)
    assert folder == begun
    assert again["best_step"] == best
    assert (folder / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert equal(folder, straight)


def test_a_log_that_does_not_belong_to_the_checkpoint_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch):
    real = stage._checkpoint

    def checkpoint(out, step, *others):
        real(out, step, *others)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_checkpoint", checkpoint)
        place.pipeline("train-student", CONFIG, status=1)
    (log,) = (place.path / "runs" / "train-student").glob("*/metrics.jsonl")
    whole = log.read_text()
    log.write_text(whole.replace("loss", "lost", 1))
    assert "is not the log that belongs to step-" in place.pipeline("train-student", CONFIG, status=1)
    log.write_text(whole)
    place.pipeline("train-student", CONFIG)


def test_what_is_put_aside_is_never_trained_on_and_the_same_for_every_seed(place: Place, monkeypatch: pytest.MonkeyPatch):
    trained_on: list[list] = []
    aside: list[list] = []
    real = stage.Order.of_step
    put_aside = stage._put_aside

    def of_step(self, step, steps):
        trained_on[-1].extend(places := real(self, step, steps))
        return places

    def putting_aside(*arguments):
        aside.append(put_aside(*arguments))
        trained_on.append([])
        return aside[-1]

    monkeypatch.setattr(stage.Order, "of_step", of_step)
    monkeypatch.setattr(stage, "_put_aside", putting_aside)
    for seed in (0, 1):
        trained(place, "--set", f"training.seed={seed}", "--set", "training.steps=null", "--set", "training.epochs=2", "--set", "training.validation={every: 50, records: 5}")
    assert aside[0] == aside[1]
    assert len(set(aside[0])) == 5
    for seen in trained_on:
        assert not set(seen) & set(aside[0])
    assert set(trained_on[0]) == set(trained_on[1])


def test_more_than_there_is_cannot_be_put_aside(place: Place):
    assert "Ask for fewer" in place.pipeline("train-student", CONFIG, "--set", "training.validation={every: 2, records: 100000}", status=2)
