"""Several processes write into one folder; each may be killed, stopped and woken, or be wrong."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import Disagreement, InputError
from pipeline.running import claims, folder
from pipeline.running.claims import Claims
from pipeline.running.folder import RunFolder, read_manifest
from tests.conftest import ROOT, SOAK, report
from tests.running.worker import believed, content, file_of, is_whole, names_of, work

FORK = multiprocessing.get_context("fork")
QUICK = {"BEAT": 0.05, "STALE": 0.4}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same waits, shorter; processes that are forked have them, too."""
    for name, seconds in QUICK.items():
        monkeypatch.setattr(claims, name, seconds)
    monkeypatch.setattr(folder, "POLL", 0.02)


def started(path: Path, count: int, **more: object) -> multiprocessing.Process:
    process = FORK.Process(target=work, args=(path, count), kwargs=more)
    process.start()
    return process


def test_killed_at_any_time_nothing_damaged_is_believed_and_the_end_is_the_same(tmp_path: Path):
    kills, believed_pieces, rounds, redone = 0, 0, 0, 0
    draw = random.Random(0)
    wanted = 200 if SOAK else 20
    while kills < wanted:
        path, log, here = tmp_path / str(rounds), tmp_path / f"{rounds}.log", 0
        while True:
            process = started(path, 12, slow=0.004, log=log)
            process.join(draw.random() * 0.12)
            if process.exitcode is not None:
                break
            process.kill()
            process.join()
            here += 1
            if path.is_dir():
                for name in believed(path, 12):
                    assert (path / file_of(name)).read_bytes() == content(name)
                    believed_pieces += 1
        assert process.exitcode == 0
        assert is_whole(path, 12)
        made = len(log.read_text().splitlines())
        assert made <= 12 + here  # a kill costs at most one piece
        assert not [file for file in path.rglob("*") if file.name.startswith(".unfinished-")]
        kills, rounds, redone = kills + here, rounds + 1, redone + made - 12
    report(f"{kills} kills in {rounds} folders: {believed_pieces} pieces believed after them, none damaged; {redone} pieces made twice; all folders the same at the end")


def test_control_a_writer_that_writes_in_place_leaves_damage_that_counts_as_done(tmp_path: Path):
    """What the test above would find: a file that is there is taken for done."""

    def in_place() -> None:
        for name in names_of(12):
            with (tmp_path / file_of(name)).open("wb") as file:
                for byte in content(name):
                    file.write(bytes([byte]))
                    file.flush()

    damaged = 0
    for _ in range(10):
        process = FORK.Process(target=in_place)
        process.start()
        process.join(0.02)
        process.kill()
        process.join()
        damaged += sum((tmp_path / file_of(name)).read_bytes() != content(name) for name in names_of(12) if (tmp_path / file_of(name)).exists())
    assert damaged


def test_four_writers_share_the_work(tmp_path: Path):
    twice = 0
    for number in range(30 if SOAK else 4):
        path, log = tmp_path / str(number), tmp_path / f"{number}.log"
        writers = [started(path, 24, slow=0.01, log=log) for _ in range(4)]
        for writer in writers:
            writer.join()
            assert writer.exitcode == 0
        assert is_whole(path, 24)
        assert len(list((path / "commits").iterdir())) == 24
        assert not list((path / "claims").iterdir())
        assert not [file for file in path.rglob("*") if file.name.startswith(".unfinished-")]
        made = log.read_text().splitlines()
        assert sorted(set(made)) == names_of(24)
        twice += len(made) - 24
    report(f"4 writers, {number + 1} rounds of 24 pieces: one record a piece, the right bytes, {twice} pieces made twice")
    assert twice == 0


def test_a_writer_that_is_killed_is_replaced_by_the_others(tmp_path: Path):
    one = started(tmp_path / "x", 8, slow=0.2)
    time.sleep(0.15)
    two = started(tmp_path / "x", 8, slow=0.01)
    one.kill()
    two.join(20)
    assert two.exitcode == 0
    assert is_whole(tmp_path / "x", 8)


def test_a_frozen_writer_that_wakes_late_does_no_harm(tmp_path: Path):
    rounds = 20 if SOAK else 3
    for number in range(rounds):
        path = tmp_path / str(number)
        frozen = started(path, 6, slow=0.03)
        time.sleep(random.Random(number).random() * 0.08)
        os.kill(frozen.pid, signal.SIGSTOP)
        other = started(path, 6)
        other.join(20)
        assert other.exitcode == 0
        assert is_whole(path, 6)
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.parent.name != "claims"}
        os.kill(frozen.pid, signal.SIGCONT)
        frozen.join(20)
        assert frozen.exitcode == 0
        after = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.parent.name != "claims"}
        assert {file: value for file, value in after.items() if file.name != "plan.json"} == {file: value for file, value in before.items() if file in after and file.name != "plan.json"}
    report(f"a frozen writer that wakes late, {rounds} rounds: nothing changed by it")


def test_writers_that_disagree_are_told_so_and_the_first_word_stands(tmp_path: Path):
    rounds = 30 if SOAK else 5
    for number in range(rounds):
        path = tmp_path / str(number)
        first = RunFolder(path, writers="several")
        second = RunFolder(path, writers="several")
        second._claims._is_left_behind = lambda name: True  # as if the first had been silent for long
        (name,) = first.pieces(["00000"])
        if number % 2:  # the first has given its file its name already
            (path / file_of(name)).write_bytes(content(name))
        for _ in second.pieces([name]):
            pass
        (path / file_of(name)).write_bytes(content(name, "other"))
        second.commit(name, {file_of(name): {}})
        (path / file_of(name)).write_bytes(content(name))
        with pytest.raises(Disagreement, match="bytes-00000"):
            first.commit(name, {file_of(name): {}})
        first.close(), second.close()
    report(f"writers that disagree, {rounds} rounds: told each time")


def test_two_whole_processes_that_disagree_end_with_one_word_and_one_error(tmp_path: Path):
    """Each makes every piece: the claims of the other are taken for left behind."""
    code = "import sys; sys.path.insert(0, '.')\nfrom tests.running import worker\nfrom pipeline.running import claims\nclaims.Claims._is_left_behind = lambda self, name: True\nworker.work(worker.Path(sys.argv[1]), 5, sys.argv[2], slow=0.05)"
    told = 0
    for number in range(10 if SOAK else 2):
        path = tmp_path / str(number)
        both = [subprocess.Popen([sys.executable, "-c", code, str(path), salt], cwd=ROOT, stderr=subprocess.PIPE, text=True) for salt in ("", "other")]
        errors = [process.communicate()[1] for process in both]
        told += sum("Disagreement" in error for error in errors)
        out = RunFolder(path, writers="none")
        for name in names_of(5):
            if out.stands(name):
                assert (path / file_of(name)).read_bytes() in (content(name), content(name, "other"))
        out.close()
    report(f"two processes that disagree, {number + 1} rounds: {told} errors, nothing damaged believed")
    assert told


def test_a_claim_of_another_machine_is_kept_while_it_moves_and_taken_over_when_it_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with Claims(tmp_path) as here:
        monkeypatch.setattr(claims, "HOST", "elsewher")
        with Claims(tmp_path) as there:
            assert there.take("a")
            monkeypatch.setattr(claims, "HOST", "here")
            end = time.monotonic() + 3 * QUICK["STALE"]
            while time.monotonic() < end:
                assert not here.take("a")
                time.sleep(0.02)
            there._end.set()  # no sign of life any more
            begin = time.monotonic()
            while not here.take("a"):
                time.sleep(0.02)
            assert time.monotonic() - begin >= QUICK["STALE"] * 0.8
        assert (tmp_path / "a").exists()  # it is not the other's to remove


@pytest.mark.parametrize("shift", [3600.0, -3600.0])
def test_clocks_that_are_wrong_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float):
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + shift)
    writers = [started(tmp_path / "x", 12, slow=0.01)]
    monkeypatch.setattr(time, "time", real)
    writers.append(started(tmp_path / "x", 12, slow=0.01))
    for writer in writers:
        writer.join(20)
        assert writer.exitcode == 0
    assert is_whole(tmp_path / "x", 12)


def test_what_only_one_may_write_is_refused_to_a_second(tmp_path: Path):
    one = RunFolder(tmp_path)
    with pytest.raises(InputError, match="Another process"):
        RunFolder(tmp_path)
    one.close()
    RunFolder(tmp_path).close()


def test_the_manifest_of_the_first_stays_and_another_result_is_an_error(tmp_path: Path):
    work(tmp_path, 3)
    before = read_manifest(tmp_path)
    out = RunFolder(tmp_path, writers="several")
    assert not list(out.pieces(names_of(3)))
    out.seal("worker", before["fingerprint"], before["identity"], {}, {"pieces": 3}, {"seconds": 5})
    assert read_manifest(tmp_path) == before
    (tmp_path / "more.txt").write_text("more")
    out.keep("more.txt")
    with pytest.raises(Disagreement):
        out.seal("worker", before["fingerprint"], before["identity"], {}, {"pieces": 3}, {})
    out.close()
