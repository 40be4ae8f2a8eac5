"""train-student in several processes: the same losses and student as in one, whatever part of a step each has, and whoever is killed.

Most of it runs in processes that are forked with everything loaded, so that each takes a second or two; what a launcher does
with them is tried with torchrun itself.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file

import stages.train_student as stage
from pipeline.running.folder import RunFolder
from pipeline.training.calibration import Calibration
from stages.cli import main
from tests.conftest import CONFIG, SOAK, Place, link_inputs

PATIENCE = 60.0
"""Seconds after which a process hangs."""
KEPT = ["--set", "targets.attention={matched: 2, keys: 8}", "--set", "data.heldout={fraction: 0.2}"]
EVERYTHING = "[{loss: forward_kl, weight: 0.7, tail: calibrated}, {loss: cross_entropy, weight: 0.3}, {loss: alm, weight: 0.5}, {loss: attention_match, weight: 0.5}]"
ODD = ["--set", f"training.objective={EVERYTHING}", "--set", "training.validation={every: 3, records: 5}", "--set", "training.batch_records=7", "--set", "machine.student_micro_batch_records=2"]
ONE_RECORD = ["--set", f"training.objective={EVERYTHING}", "--set", "training.validation={every: 3, records: 1}", "--set", "training.batch_records=1"]
Fault = Callable[[int], None]
"""What is changed in a process before the command runs; given the process's number."""


@dataclass
class Started:
    """Processes that train together, without a launcher that looks after them."""

    processes: list[Any]
    logs: list[Path]

    def statuses(self, patience: float = PATIENCE) -> list[int]:
        """All exit statuses, below zero those of the killed. Fails if a process hangs."""
        deadline = time.monotonic() + patience
        for process in self.processes:
            process.join(max(deadline - time.monotonic(), 0))
        hanging = [number for number, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not hanging, f"processes {hanging} of {len(self.processes)} hang\n{self.said()}"
        return [process.exitcode for process in self.processes]

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)


def start(place: Place, count: int, *words: str, fault: Fault | None = None) -> Started:
    """`pipeline WORDS` in so many processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    logs = [place.path / f"process-{number}.txt" for number in range(count)]
    port = free_port()
    processes: list[Any] = []
    for number, log in enumerate(logs):
        leader = processes[0].pid if processes else 0
        processes.append(context.Process(target=_take_part, args=(place.path, leader, number, count, port, words, fault, log), daemon=True))
        processes[-1].start()
    return Started(processes, logs)


def _take_part(place: Path, leader: int, number: int, count: int, port: int, words: tuple[str, ...], fault: Fault | None, log: Path) -> None:
    """What a process does from its first line on."""
    os.setpgid(0, leader)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if count > 1:
        among = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in among.items()}
    os.chdir(place)
    if fault:
        fault(number)
    main(list(words))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def cached(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A cache with attention, and no student yet. Not to be changed."""
    place = link_inputs(made, tmp_path_factory.mktemp("cached"))
    for name in ("prepare-data", "cache-teacher", "fit-projection"):
        place.pipeline(name, CONFIG, *KEPT)
    return place


class Trained:
    """A place with that cache and one student."""

    def __init__(self, cached: Place, folder: Path) -> None:
        self.place = link_inputs(cached.path, folder)
        shutil.copytree(cached.path / "runs", folder / "runs")

    def start(self, count: int, *words: str, fault: Fault | None = None) -> Started:
        return start(self.place, count, "train-student", CONFIG, *KEPT, *words, "--json", fault=fault)

    def train(self, count: int, *words: str, fault: Fault | None = None) -> "Trained":
        started = self.start(count, *words, fault=fault)
        assert started.statuses() == [0] * count, started.said()
        return self

    @property
    def folder(self) -> Path:
        (folder,) = (self.place.path / "runs" / "train-student").glob("*")
        return folder

    def lines(self) -> list[dict[str, float]]:
        """Step by step all that was logged."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "student" / "model.safetensors")

    def committed(self) -> list[str]:
        return sorted(file.stem for file in self.folder.glob("commits/step-*.json"))


def distance(one: Trained, other: Trained) -> tuple[float, float]:
    """The largest difference of anything that was logged, relative to its value, and of any weight of the student."""
    if [line.keys() for line in one.lines()] != [line.keys() for line in other.lines()]:
        return math.inf, math.inf  # other records have other specialties
    logged = max(abs(a[name] - b[name]) / max(abs(a[name]), 1e-3) for a, b in zip(one.lines(), other.lines(), strict=True) for name in a)
    a, b = one.weights(), other.weights()
    assert a.keys() == b.keys()
    return logged, max(float((a[name] - b[name]).abs().max()) for name in a)


def are_one(one: Trained, other: Trained) -> bool:
    """But for the order in which floating-point numbers are summed: at most 3e-7 in what was logged and 4e-7 in the weights were seen."""
    return max(distance(one, other)) < 3e-6


def same_bits(one: Trained, other: Trained) -> bool:
    a, b = one.weights(), other.weights()
    return one.lines() == other.lines() and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def one(cached: Place, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(cached, tmp_path_factory.mktemp("one") / "1").train(1, *ODD)


@pytest.fixture(scope="module")
def two(cached: Place, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(cached, tmp_path_factory.mktemp("two") / "2").train(2, *ODD)


# --- the same as one ---


def test_several_processes_with_uneven_parts_train_as_one(cached: Place, tmp_path: Path, one: Trained, two: Trained):
    """Seven records a step, two a micro-batch, five to validate on; every loss, the calibrated tail and attention."""
    assert are_one(one, two), distance(one, two)
    three = Trained(cached, tmp_path / "3").train(3, *ODD)
    assert are_one(one, three), distance(one, three)
    assert len(one.lines()) == 12
    assert {"loss", "forward_kl", "cross_entropy", "alm", "attention_match", "gradient_norm"} < one.lines()[0].keys()
    assert [line["step"] for line in one.lines() if "validation" in line] == [3, 6, 9, 12]


def test_a_process_without_any_record_takes_part(cached: Place, tmp_path: Path):
    alone, beside = (Trained(cached, tmp_path / str(count)).train(count, *ONE_RECORD) for count in (1, 2))
    assert are_one(alone, beside), distance(alone, beside)


def _gradients_are_averaged(number: int) -> None:
    real = stage._sum_gradients

    def average(model: torch.nn.Module) -> None:
        real(model)
        for parameter in model.parameters():
            parameter.grad /= torch.distributed.get_world_size()

    stage._sum_gradients = average


def _gradients_stay_where_they_are(number: int) -> None:
    stage._sum_gradients = lambda model: None


def _all_take_the_same_records(number: int) -> None:
    real = stage.Order.of_step
    stage.Order.of_step = lambda self, step, steps: [place for place in real(self, step, steps)[::2] for _ in range(2)]


def _each_averages_over_its_own(number: int) -> None:
    _not_summed(lambda tensor: tensor.dtype == torch.float64)


def _each_calibrates_on_its_own(number: int) -> None:
    class Alone:
        def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
            return tensor.clone()

    real = Calibration.step
    Calibration.step = lambda self, temperature, accelerator: real(self, temperature, Alone())


def _each_validates_on_its_own(number: int) -> None:
    _not_summed(lambda tensor: tensor.ndim == 0)


def _not_summed(which: Callable[[torch.Tensor], bool]) -> None:
    real = accelerate.Accelerator.reduce
    accelerate.Accelerator.reduce = lambda self, tensor, *how: real(self, tensor, *how) if not which(tensor) else tensor


FAULTS = [_gradients_are_averaged, _gradients_stay_where_they_are, _all_take_the_same_records, _each_averages_over_its_own, _each_calibrates_on_its_own, _each_validates_on_its_own]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__[1:])
def test_the_comparison_sees_that(cached: Place, tmp_path: Path, one: Trained, fault: Fault):
    """The controls of the tests above."""
    logged, _ = distance(one, Trained(cached, tmp_path / "2").train(2, *ODD, fault=fault))
    assert logged > 1e-4


# --- killed ---


def _kill_all() -> None:
    os.killpg(0, signal.SIGKILL)


def _kill_this() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate_this() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _in_step(step: int, who: int, what: Callable[[], None], number: int) -> None:
    """In process `who`, when it has been through a micro-batch and the step's gradients are not summed yet. The first step is 1."""
    if number != who:
        return
    real_seed, real_loss, now = stage._seed, stage.loss_of, [0]

    def seed(seed: int, index: int, process: int) -> int:
        now[0] = index + 1
        return real_seed(seed, index, process)

    def loss(*arguments: Any, **named: Any) -> Any:
        found = real_loss(*arguments, **named)
        if now[0] == step:
            now[0] = 0
            what()
        return found

    stage._seed, stage.loss_of = seed, loss


def _after_checkpoint(step: int, what: Callable[[], None], number: int) -> None:
    real = stage._checkpoint

    def checkpoint(*arguments: Any) -> None:
        real(*arguments)
        if arguments[1] == step:
            what()

    stage._checkpoint = checkpoint


def _before_commit(name: str, what: Callable[[], None], number: int) -> None:
    """When the files are there, and nothing vouches for them yet."""
    real = RunFolder.commit

    def commit(self: RunFolder, piece: str, *others: Any, **info: Any) -> None:
        if piece == name:
            what()
        real(self, piece, *others, **info)

    RunFolder.commit = commit


def test_what_is_killed_in_and_between_steps_ends_with_the_same_bits(cached: Place, tmp_path: Path, two: Trained):
    """The whole process group at once, three times; each time the same command goes on."""
    killed = Trained(cached, tmp_path / "killed")
    for fault, left in (
        (partial(_after_checkpoint, 4, _kill_all), "step-0000004"),
        (partial(_in_step, 7, 1, _kill_all), "step-0000006"),  # the best one so far
        (partial(_before_commit, "step-0000008", _kill_all), "step-0000006"),
    ):
        assert killed.start(2, *ODD, fault=fault).statuses() == [-signal.SIGKILL] * 2
        assert killed.committed()[-1] == left
    assert same_bits(killed.train(2, *ODD), two)


@pytest.mark.parametrize("who", [0, 1])
def test_when_one_is_killed_the_other_ends_and_the_same_command_goes_on(cached: Place, tmp_path: Path, two: Trained, who: int):
    killed = Trained(cached, tmp_path / "killed")
    started = killed.start(2, *ODD, fault=partial(_in_step, 6, who, _kill_this))
    statuses = started.statuses(patience=20)
    assert statuses[who] == -signal.SIGKILL
    assert statuses[1 - who] == 1, started.said()
    assert killed.committed()[-1] == "step-0000004"
    assert "that one's message says why" in started.said()
    assert same_bits(killed.train(2, *ODD), two)


@pytest.mark.parametrize(("begin", "end"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(cached: Place, tmp_path: Path, one: Trained, begin: int, end: int):
    moved = Trained(cached, tmp_path / "moved")
    assert moved.start(begin, *ODD, fault=partial(_after_checkpoint, 8, _kill_all)).statuses() == [-signal.SIGKILL] * begin
    assert are_one(one, moved.train(end, *ODD)), distance(one, moved)


SELDOM = ["--set", "machine.checkpoint_steps=100"]


def _told_to_stop_where_a_checkpoint_takes_long(who: int, number: int) -> None:
    real = stage._checkpoint

    def slow(out: RunFolder, step: int, *others: Any) -> None:
        time.sleep(step == 7)
        real(out, step, *others)

    stage._checkpoint = slow
    _in_step(7, who, _terminate_this, number)


@pytest.mark.parametrize("who", [0, 1])
def test_when_one_is_told_to_stop_all_stop_after_the_same_step(cached: Place, tmp_path: Path, two: Trained, who: int):
    stopped = Trained(cached, tmp_path / "stopped")
    started = stopped.start(2, *ODD, *SELDOM, fault=partial(_told_to_stop_where_a_checkpoint_takes_long, who))
    started.processes[1].join(PATIENCE)
    # a launcher that sees a process end gives the others half a minute
    assert stopped.committed()[-1:] == ["step-0000007"], "a process ended before the checkpoint was there"
    assert started.statuses() == [75, 75], started.said()
    assert same_bits(stopped.train(2, *ODD, *SELDOM), two)


def _sees_no_checkpoint(who: int, number: int) -> None:
    if number == who:
        RunFolder.committed = lambda self: []


def test_processes_that_do_not_see_the_same_checkpoints_do_not_go_on(cached: Place, tmp_path: Path):
    place = Trained(cached, tmp_path / "place")
    place.start(2, *ODD, fault=partial(_after_checkpoint, 4, _kill_all)).statuses()
    before = place.committed()
    started = place.start(2, *ODD, fault=partial(_sees_no_checkpoint, 1))
    assert started.statuses() == [1, 1]
    assert "do not see the same checkpoints" in started.said()
    assert place.committed() == before


# --- what comes before and after ---


def _the_manifest_takes_long(number: int) -> None:
    real = RunFolder.seal

    def slow(self: RunFolder, name: str, *others: Any) -> None:
        time.sleep(name == "train-student")
        real(self, name, *others)

    RunFolder.seal = slow


def test_all_stages_in_one_command(made: Path, tmp_path: Path):
    """Only the main process writes and tells; the others wait until it has, also for the end of a stage that they took part in."""
    place = link_inputs(made, tmp_path / "place")
    started = start(place, 2, "run", CONFIG, "--json", fault=_the_manifest_takes_long)
    assert started.statuses() == [0, 0], started.said()
    told, others = ([line for line in log.read_text().splitlines() if line.startswith("{")] for log in started.logs)
    assert [row["state"] for row in json.loads(told[0])["stages"]] == ["done"] * 6
    assert others == []


LONG = ["--set", "training.steps=40", "--set", "machine.checkpoint_steps=1"]


@pytest.mark.parametrize("told", [signal.SIGKILL, signal.SIGTERM] if SOAK else [signal.SIGKILL], ids=lambda told: told.name)
def test_torchrun_ends_what_is_left_and_goes_on(cached: Place, tmp_path: Path, told: signal.Signals):
    """One of its two processes is killed, or told to stop: torchrun ends the other and fails, and goes on when it is called again."""
    place = Trained(cached, tmp_path / "place")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m", "pipeline", "train-student", CONFIG, *KEPT, *LONG]
    launcher = subprocess.Popen(command, cwd=place.place.path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while launcher.poll() is None and time.monotonic() < deadline and not list(place.place.path.glob("runs/train-student/*/commits/step-*.json")):
            time.sleep(0.01)
        workers = [int(process) for process in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
        os.kill(workers[1], told)
        said, _ = launcher.communicate(timeout=20)
    finally:
        launcher.kill()
    assert launcher.returncode == 1, said
    assert [worker for worker in workers if Path(f"/proc/{worker}").exists()] == []
    assert 0 < int(place.committed()[-1].removeprefix("step-")) < 40
    straight = Trained(cached, tmp_path / "straight").train(2, *LONG)
    assert same_bits(place.train(2, *LONG), straight)
