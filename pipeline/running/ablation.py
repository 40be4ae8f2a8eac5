"""Many students from one cache: what is missing of each variant and seed is run, and nothing twice."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.config import Ablation, load_experiment
from pipeline.errors import ConfigError, NotFinished, PipelineError, Stopped
from pipeline.files import read_json
from pipeline.running.folder import FinishedFolder
from pipeline.running.runner import Runner
from pipeline.running.stage import Stage

TEACHERS = ("prepare-data", "cache-teacher", "evaluate-teacher")
"""Stages that an ablation never runs: what they make is shared by all."""
POLL = 0.1
"""Seconds."""


@dataclass(frozen=True)
class Trial:
    """A variant with one seed."""

    variant: str
    seed: int
    runner: Runner
    words: list[str]
    """What gives its experiment on the command line."""


@dataclass
class Running:
    """A stage of a trial, in a process of its own."""

    title: str
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    device: str | None
    begun: float


def trials(ablation: Ablation, folder: Path, stages: tuple[Stage, ...], runs: Path, given: dict[str, Path], roots: tuple[str, ...], common: tuple[str, ...] = ()) -> list[Trial]:
    """ConfigError, naming the variant, if one is no experiment. folder: where the ablation's file lies; common: changes to all, before their own."""
    base, found = folder / ablation.base, []
    for variant, changes in ablation.changes().items():
        for seed in ablation.seeds:
            settings = [*common] + [f"{key}={json.dumps(value)}" for key, value in (changes | {"training.seed": seed}).items()]
            try:
                experiment = load_experiment(base, settings)
            except ConfigError as error:
                raise ConfigError(f"variant {variant}: {error}") from None
            words = [str(base), *(word for setting in settings for word in ("--set", setting))]
            words += [word for stage, place in given.items() for word in ("--use", f"{stage}={place}")]
            found.append(Trial(variant, seed, Runner(stages, experiment, runs, dict(given), roots), words))
    return found


def run(found: list[Trial], logs: Path, devices: list[str | None], say: Callable[[str], None]) -> None:
    """Make what is not finished, one run on each device at a time. NotFinished if the teacher would have to be asked.

    devices: CUDA's numbers; None: as it is. PipelineError if a run fails: the others are stopped, and the same command goes on.
    """
    for trial in found:
        for stage in trial.runner.planned():
            if stage.name in TEACHERS and not trial.runner.is_finished(stage):
                nearest = next(row for row in trial.runner.status() if row["stage"] == stage.name)["nearest"]
                hint = f" The nearest one, {nearest['folder']}, differs in: {', '.join(nearest['differs'])}." if nearest else ""
                raise NotFinished(
                    f"Variant {trial.variant} needs {stage.name}, which has not finished, and an ablation never asks a teacher.{hint}\n"
                    f"Run `pipeline {' '.join([stage.name, *trial.words])}` first, give a finished folder with --use, or let all variants have the same `data`, `teacher` and `targets`."
                )
    names = [stage.name for stage in found[0].runner.stages if stage.name not in TEACHERS]
    for name in names:
        waiting = list(_missing(found, name))
        _at_once(waiting, logs, devices, say)


def _missing(found: list[Trial], name: str) -> Iterator[tuple[str, Trial]]:
    """Each folder of this stage that is not finished, once: the stage and a trial that wants it."""
    seen: set[Path] = set()
    for trial in found:
        for stage in trial.runner.planned():
            folder = trial.runner.folder(stage)
            if stage.name == name and folder not in seen and not trial.runner.is_finished(stage):
                seen.add(folder)
                yield name, trial


def _at_once(waiting: list[tuple[str, Trial]], logs: Path, devices: list[str | None], say: Callable[[str], None]) -> None:
    running: list[Running] = []
    total, done = len(waiting), 0
    try:
        while waiting or running:
            free = list(devices)
            for one in running:
                free.remove(one.device)
            while waiting and free:
                running.append(_started(*waiting.pop(0), logs, free.pop(0)))
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                one.log.close()
                if one.process.returncode:
                    _failed(one)
                done += 1
                say(f"{one.title}: done in {time.monotonic() - one.begun:.0f} s ({done} of {total})")
            time.sleep(POLL)
    finally:
        for one in running:  # each keeps what it has
            one.process.terminate()
        for one in running:
            one.process.wait()
            one.log.close()


def _started(stage: str, trial: Trial, logs: Path, device: str | None) -> Running:
    logs.mkdir(parents=True, exist_ok=True)
    title = f"{stage} {trial.variant}, seed {trial.seed}"
    log = (logs / f"{''.join(c if c.isalnum() or c in '._-' else '-' for c in title)}.log").open("wb")
    environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
    command = [sys.executable, "-m", "pipeline", "--runs", str(trial.runner.runs), stage, *trial.words]
    return Running(title, subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT), log, device, time.monotonic())


def _failed(one: Running) -> None:
    if one.process.returncode == Stopped.exit_status:
        raise Stopped
    lines = Path(one.log.name).read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.startswith("Error: ")), lines[-1] if lines else "it said nothing").removeprefix("Error: ")
    raise PipelineError(f"{one.title} failed: {said} (All that it printed is in {one.log.name}.) What was finished is kept, and the same command goes on.")


def results(found: list[Trial]) -> list[dict[str, Any]]:
    """Of each trial what `evaluate` found, with the folders of the runs."""
    rows = []
    for trial in found:
        folders = {stage.name: str(trial.runner.folder(stage)) for stage in trial.runner.planned() if stage.name not in TEACHERS}
        models = read_json(FinishedFolder(Path(folders["evaluate"])).file("results.json"))["models"]
        rows.append({"variant": trial.variant, "seed": trial.seed, "folders": folders, "models": models})
    return rows
