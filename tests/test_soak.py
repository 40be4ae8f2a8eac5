"""Killed again and again: the cache and the training of the tiny experiment, against runs that nobody disturbed.

Quick as part of the tests, and as often as docs/reliability.md says with `make soak`. The processes are forked from this one,
which has torch loaded, so that a round takes a fraction of a second.
"""

import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.running.folder import FinishedFolder, RunFolder
from tests.conftest import CONFIG, SOAK, Place, report

FORK = multiprocessing.get_context("fork")
CACHE = ["--set", "data.records_per_shard=6"]
TRAINING = ["--set", "training.steps=30", "--set", "machine.checkpoint_steps=3", "--set", "machine.workers=0"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Forking is safe while torch has no other threads; and bits depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(place: Path, words: list[str]) -> None:
    import sys

    from stages.cli import main

    os.chdir(place)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    main(words, standalone_mode=False)


def started(place: Place, *words: str) -> multiprocessing.Process:
    process = FORK.Process(target=run, args=(place.path, list(words)))
    process.start()
    return process


def seconds_of(place: Place, *words: str) -> float:
    begin = time.monotonic()
    process = started(place, *words)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - begin


def test_the_cache_killed_at_random_times_has_no_damaged_shard_and_ends_the_same(place: Place):
    place.pipeline("prepare-data", CONFIG, *CACHE)
    shutil.copytree(place.path / "runs", place.path / "straight")
    whole = seconds_of(place, "--runs", "straight", "cache-teacher", CONFIG, *CACHE)
    (straight,) = (place.path / "straight" / "cache-teacher").glob("*")
    files = {file.name: file.read_bytes() for file in straight.glob("*.parquet")}
    names = sorted(file.stem for file in (straight / "commits").iterdir())
    draw, kills, rounds, shards = random.Random(1), 0, 0, 0
    while kills < (200 if SOAK else 6):
        runs = f"round{rounds}"
        shutil.copytree(place.path / "runs", place.path / runs)
        while True:
            process = started(place, "--runs", runs, "cache-teacher", CONFIG, *CACHE)
            process.join(draw.random() * whole * 1.2)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
            for folder in (place.path / runs / "cache-teacher").glob("*"):
                out = RunFolder(folder, writers="none")
                for name in names:
                    if out.stands(name):
                        shards += 1
                        assert all(file.read_bytes() == files[file.name] for file in folder.glob(f"[!.]*-{name}.parquet"))
                out.close()
        assert process.exitcode == 0
        (folder,) = (place.path / runs / "cache-teacher").glob("*")
        assert {file.name: file.read_bytes() for file in folder.glob("*.parquet")} == files
        assert FinishedFolder(folder).path
        shutil.rmtree(place.path / runs)
        rounds += 1
    report(f"cache-teacher: {kills} kills in {rounds} rounds; {shards} shards believed after them, none damaged; the same bytes at the end")


def test_training_killed_at_random_times_ends_with_the_same_bits(done: Place, tmp_path: Path):
    place = Place(tmp_path / "here")
    shutil.copytree(done.path / "runs", place.path / "runs")
    (place.path / "tiny").symlink_to(done.path / "tiny")
    shutil.rmtree(place.path / "runs" / "train-student")
    shutil.copytree(place.path / "runs", place.path / "straight")
    whole = seconds_of(place, "--runs", "straight", "train-student", CONFIG, *TRAINING)
    (straight,) = (place.path / "straight" / "train-student").glob("*")
    wanted = load_file(straight / "student" / "model.safetensors")
    draw, kills, rounds = random.Random(2), 0, 0
    while rounds < (60 if SOAK else 2) or kills < (150 if SOAK else 3):
        runs = f"round{rounds}"
        shutil.copytree(place.path / "runs", place.path / runs)
        while True:
            process = started(place, "--runs", runs, "train-student", CONFIG, *TRAINING)
            process.join((0.3 + draw.random()) * whole)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            kills += 1
        assert process.exitcode == 0
        (folder,) = (place.path / runs / "train-student").glob("*")
        found = load_file(folder / "student" / "model.safetensors")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert (folder / "metrics.jsonl").read_text() == (straight / "metrics.jsonl").read_text()
        shutil.rmtree(place.path / runs)
        rounds += 1
    report(f"train-student: {rounds} runs, {kills} kills: weights and metrics bit-identical in all")
