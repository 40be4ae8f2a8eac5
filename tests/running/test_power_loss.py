"""The power goes at any moment: what was committed stays committed, and nothing that is half there is believed."""

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.errors import DamageError, InputError
from pipeline.files import UNFINISHED, appears_whole
from pipeline.running import claims, folder
from pipeline.running.fingerprint import fingerprint
from pipeline.running.folder import FinishedFolder, RunFolder, read_manifest
from tests.conftest import SOAK, report
from tests.running.power import TOP, Log, Step, build, notes, recorded, states, unsynced
from tests.running.worker import IDENTITY, content, file_of, names_of, work

RUN = "runs/worker/0000000000000000"
CHECKPOINTS = ["step-0000004", "step-0000008", "step-0000012", "step-0000016"]


@dataclass(frozen=True)
class Stage:
    act: Callable[[Path], None]
    pieces: dict[str, str]
    """A piece and its file."""
    files: dict[str, bytes]
    """The files of a finished folder, and of pieces, and what they must be."""
    result: list[str]
    """The files of a finished folder."""
    begin: Callable[[Path], None] = lambda path: None
    """What was there, and safe, before."""


def train(path: Path) -> None:
    """As stages/train_student.py: a checkpoint now and then, of which two are kept, and a folder as the result."""
    out = RunFolder(path)
    try:
        if out.sealed():
            return
        done = ["", *out.committed()][-1]
        for name in [name for name in CHECKPOINTS if name > done]:
            with appears_whole(path / "checkpoints" / f"{name}.bin") as temporary:
                temporary.write_bytes(content(name))
            out.commit(name, {f"checkpoints/{name}.bin": {}})
            for old in out.names()[:-2]:
                out.withdraw(old)
        with appears_whole(path / "student") as temporary:
            temporary.mkdir()
            (temporary / "model.bin").write_bytes(content("student"))
        out.keep("student")
        out.seal("train-student", fingerprint(IDENTITY), IDENTITY, {}, {}, {})
    finally:
        out.close()


def two_pieces_one_damaged(path: Path) -> None:
    out = RunFolder(path)
    for name in names_of(2):
        (path / file_of(name)).write_bytes(content(name))
        out.commit(name, {file_of(name): {}})
    out.close()
    (path / file_of("00001")).write_bytes(bytes(len(content("00001"))))


PIECES = {name: file_of(name) for name in names_of(3)}
WORK = Stage(lambda path: work(path, 3), PIECES, {file: content(name) for name, file in PIECES.items()}, list(PIECES.values()))
STAGES = {
    "pieces": WORK,
    "pieces of which one was damaged": Stage(WORK.act, WORK.pieces, WORK.files, WORK.result, two_pieces_one_damaged),
    "checkpoints": Stage(
        train,
        {name: f"checkpoints/{name}.bin" for name in CHECKPOINTS},
        {f"checkpoints/{name}.bin": content(name) for name in CHECKPOINTS} | {"student/model.bin": content("student")},
        ["student/model.bin"],
    ),
}


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder, in memory where that is possible."""
    shared = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else tmp_path))
    yield place
    shutil.rmtree(place)


@pytest.fixture(autouse=True)
def nobody_else_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a loss of power every claim is of a dead process; waiting shows that where the claim itself cannot."""
    monkeypatch.setattr(claims, "STALE", 0.0)
    monkeypatch.setattr(folder, "POLL", 0.0)


def begun(root: Path, stage: Stage) -> Log:
    root.mkdir()
    if stage.begin is not Stage.begin:
        stage.begin(root / RUN)
    log = Log(root)
    out = RunFolder(root / RUN, writers="none") if (root / RUN).exists() else None
    log.steps += [Step("note", TOP, f"committed {name}") for name in (out.names() if out else []) if out.stands(name)]
    if out:
        out.close()
    return log


def run(log: Log, stage: Stage, killed_at: int | None = None) -> Log:
    """The log of the stage, with what it promised and what it took back, and when."""

    def act(log: Log) -> None:
        def noting(method: str, before: Callable[..., list[str]], after: Callable[..., list[str]]) -> None:
            real = getattr(RunFolder, method)

            def called(self: RunFolder, *given: object, **more: object) -> None:
                for text in before(*given):
                    log.note(text)
                real(self, *given, **more)
                for text in after(*given):
                    log.note(text)

            setattr(RunFolder, method, called)

        noting("commit", lambda *given: [], lambda name, *_: [f"committed {name}"])
        noting("withdraw", lambda name: [f"withdrawn {name}"], lambda name: [])
        noting("quarantine", lambda files: [f"withdrawn {Path(file).stem}" for file in files if file.startswith("commits/")], lambda files: [])
        noting("seal", lambda *given: [], lambda *given: ["sealed"])
        stage.act(log.root / RUN)

    return recorded(log, act, killed_at)


def wrong(path: Path, stage: Stage, said: list[str]) -> list[str]:
    """What is believed and not so, and what was promised and is not there. said: the notes before the loss of power."""
    found = []
    out = RunFolder(path, writers="none")
    standing = [name for name in stage.pieces if out.stands(name)]
    out.close()
    found += [f"safety: {name} is believed" for name in standing if (path / stage.pieces[name]).read_bytes() != stage.files[stage.pieces[name]]]
    promised = {text.split()[1]: text.startswith("committed") for text in said if text != "sealed"}
    found += [f"durability: {name} was committed" for name, kept in promised.items() if kept and name not in standing]
    try:
        listed = list(read_manifest(path)["files"])
    except (FileNotFoundError, DamageError):
        return found + ["durability: the folder was finished"] * ("sealed" in said)
    if listed != stage.result:
        found.append("safety: the manifest lists other files")
    return found + [f"safety: the manifest lists {file}" for file in listed if not (path / file).is_file() or (path / file).read_bytes() != stage.files[file]]


def unlike_the_end(path: Path, stage: Stage) -> list[str]:
    """What is wrong after the stage was run once more."""
    try:
        stage.act(path)
    except InputError:  # see test_a_single_writer_goes_on_after_a_restart
        (path / "claims" / folder.WHOLE).unlink()
        stage.act(path)
    finished = FinishedFolder(path)
    found = [f"end: {file}" for file in stage.result if finished.file(file).read_bytes() != stage.files[file]]
    return found + [f"end: {file} was left" for file in path.rglob(f"{UNFINISHED}*")]


@dataclass
class Outcome:
    states: int = 0
    resumed: int = 0
    bad: int = 0
    found: list[str] = field(default_factory=list)


def lose_power(log: Log, stage: Stage, memory: Path, most: int, moments: Iterable[int], resume: float = 0.0, so_far: Outcome | None = None) -> Outcome:
    """The power goes after each of the moments, in up to `most` ways. resume: how often the stage is run once more after that."""
    outcome, draw = so_far or Outcome(), random.Random(0)
    for moment in moments:
        said = notes(log, moment)
        for tree in states(log, moment, most, draw, aside="claims"):
            root = memory / "state"
            root.mkdir()
            build(root, tree)
            found = wrong(root / RUN, stage, said)
            if draw.random() < resume:
                found += unlike_the_end(root / RUN, stage)
                outcome.resumed += 1
            outcome.states += 1
            outcome.bad += bool(found)
            outcome.found += [f"after step {moment}, {log.steps[moment - 1].kind} {log.steps[moment - 1].where}: {text}" for text in found]
            shutil.rmtree(root)
    return outcome


def moments_of(log: Log, first: int = 1) -> range:
    return range(first, len(log.steps) + 1)


@pytest.mark.parametrize("name", STAGES)
def test_after_a_loss_of_power_what_was_committed_stands_and_nothing_else_is_believed(name: str, tmp_path: Path, memory: Path):
    stage = STAGES[name]
    log = run(begun(tmp_path / "root", stage), stage)
    assert "sealed" in notes(log, len(log.steps))
    outcome = lose_power(log, stage, memory, 128 if SOAK else 2, moments_of(log), resume=0.5)
    report(f"power loss, {name}: {outcome.states} states at {len(log.steps)} moments, {outcome.resumed} of them gone on with, {outcome.bad} wrong")
    assert outcome.found == []


LEFT_OUT: dict[str, Callable[[Step], bool]] = {
    "of files": lambda step: not step.thing.is_folder,
    "of pieces": lambda step: step.where.endswith(".bin"),
    "of records": lambda step: "/commits/" in step.where,
    "of the manifest": lambda step: step.where.endswith("manifest.json"),
    "of folders": lambda step: step.thing.is_folder,
    "of the run's folder": lambda step: step.where == RUN,
    "of the records' folder": lambda step: step.where == f"{RUN}/commits",
    "of the folders above": lambda step: step.thing.is_folder and RUN.startswith(step.where) and step.where != RUN,
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_control_a_writer_that_leaves_syncs_out_is_caught(name: str, tmp_path: Path, memory: Path):
    log = run(begun(tmp_path / "root", WORK), WORK).without(LEFT_OUT[name])
    outcome = lose_power(log, WORK, memory, 16 if SOAK else 4, moments_of(log)[-20:])
    report(f"power loss, control without the sync {name}: {outcome.bad} of {outcome.states} states wrong")
    assert outcome.found


def test_control_a_reader_that_looks_only_at_sizes_believes_zeros(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch):
    """The same disks: a reader that takes hashes has lost work, and believes nothing wrong."""
    log = run(begun(tmp_path / "root", WORK), WORK).without(LEFT_OUT["of pieces"])
    found = lose_power(log, WORK, memory, 16, moments_of(log)[-20:]).found
    assert found
    assert not [text for text in found if "is believed" in text]
    monkeypatch.setattr(folder, "problem", lambda file, entry, fast=False: None if file.is_file() and file.stat().st_size == entry["size"] else "is damaged")
    assert [text for text in lose_power(log, WORK, memory, 16, moments_of(log)[-20:]).found if "is believed" in text]


def has_unsynced_folders(log: Log) -> bool:
    """Whether there is a folder (other than that of the claims) that a loss of power may take away."""
    at = unsynced(log, len(log.steps))
    return any(thing and thing.is_folder and name != "claims" for change in at.names for name, thing in change.value.items())


def killed_then_lost(tmp_path: Path, memory: Path, kills: Iterable[int], in_new_folders: bool) -> tuple[int, Outcome]:
    """Killed after so many steps, gone on with, and then the power goes. in_new_folders: only where the kill left an unsynced folder."""
    count, outcome = 0, Outcome()
    for kill in kills:
        killed = run(begun(tmp_path / str(kill), WORK), WORK, killed_at=kill)
        if has_unsynced_folders(killed) == in_new_folders:
            log = run(killed, WORK)
            moments = [moment for moment in moments_of(log, len(killed.steps)) if SOAK or log.steps[moment - 1].kind == "note"]
            lose_power(log, WORK, memory, 3, moments, so_far=outcome)
            count += 1
    return count, outcome


def test_a_loss_of_power_after_a_kill_takes_nothing_that_was_committed(tmp_path: Path, memory: Path):
    straight = len(run(begun(tmp_path / "straight", WORK), WORK).steps)
    kills, outcome = killed_then_lost(tmp_path, memory, range(5, straight, 1 if SOAK else 10), in_new_folders=False)
    report(f"power loss after a kill: {kills} kills, {outcome.states} states, {outcome.bad} wrong")
    assert kills
    assert outcome.found == []


def test_folders_that_a_killed_process_made_outlast_a_loss_of_power(tmp_path: Path, memory: Path):
    kills, outcome = killed_then_lost(tmp_path, memory, range(1, 9), in_new_folders=True)
    assert kills
    assert outcome.found == []


def test_a_commit_that_another_process_had_made_a_moment_before_is_safe_too(tmp_path: Path, memory: Path):
    def committing(seconds: int) -> Stage:
        def act(path: Path) -> None:
            out = RunFolder(path, writers="several")
            with appears_whole(path / file_of("00000"), absent=True) as temporary:
                temporary.write_bytes(content("00000"))
            out.commit("00000", {file_of("00000"): {}}, seconds=seconds)

        return Stage(act, PIECES, WORK.files, WORK.result)

    whole = run(begun(tmp_path / "whole", WORK), committing(1))
    linked = next(number for number, step in enumerate(whole.steps, 1) if step.kind == "names" and "00000.json" in step.value)
    killed = run(begun(tmp_path / "root", WORK), committing(1), killed_at=linked)
    log = run(killed, committing(2))
    assert notes(log, len(log.steps)) == ["committed 00000"]
    assert lose_power(log, WORK, memory, 64, moments_of(log)[-1:]).found == []


@pytest.mark.parametrize("text", ["of the last boot", "", "\0" * 120])
def test_a_single_writer_goes_on_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str):
    with monkeypatch.context() as last_boot:
        last_boot.setattr(claims, "HOST", "lastboot")
        before = RunFolder(tmp_path)
        before._claims._held.clear()  # killed: it does not let go
        before.close()
    if text != "of the last boot":
        (tmp_path / "claims" / folder.WHOLE).write_text(text)
    for _ in range(3):
        with suppress(InputError):
            RunFolder(tmp_path).close()
            return
    raise AssertionError("refused three times")
