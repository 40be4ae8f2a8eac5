"""A file operation fails, the disk is full, or a finished folder is damaged: an error that says so, and never a wrong byte."""

import errno
import itertools
import json
import os
import random
import resource
import shutil
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from pipeline import files
from pipeline.errors import DamageError, InputError, PipelineError
from pipeline.files import UNFINISHED, appears_whole
from pipeline.running import claims, folder
from pipeline.running.fingerprint import fingerprint
from pipeline.running.folder import FinishedFolder, RunFolder, findings, read_manifest
from tests.conftest import SOAK, report
from tests.running.power import in_child
from tests.running.worker import IDENTITY, believed, content, file_of, is_whole, names_of, work

OPERATIONS = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.scandir", "os.listdir"}
"""What Python announces (sys.addaudithook) before it does it; what an exception there keeps it from."""
TICK = 0.011
"""Seconds after which two changes of a file have different times, on the coarsest clock that Linux has."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "STALE", 0.0)
    monkeypatch.setattr(folder, "POLL", 0.0)


# --- a file operation that fails ---


class Outcome(NamedTuple):
    operation: str
    """The one that failed."""
    error: str
    """What the writer raised; empty if nothing."""
    synced_again: bool
    """Whether a file was synced again after its sync had failed."""


def failing_once(act: Callable[[Path, int], None], path: Path, count: int, numbers: list[int]) -> dict[Path, Outcome]:
    """In a process of its own: writes into a folder each, of which the first has its first file operation fail, and so on until none fails."""

    def child(_: Callable[[Any], None]) -> dict[Path, Outcome]:
        root, nth, number, calls, operation, refused, again = path, 0, 0, 0, "", set[int](), False
        sync, status = os.fsync, os.stat

        def turn(name: str, where: object) -> None:
            nonlocal calls, operation
            if isinstance(where, str | Path) and str(where).startswith(str(root)):
                calls += 1
                if calls == nth:
                    operation = name
                    raise OSError(number, os.strerror(number), str(where))

        def synced(handle: int) -> None:
            nonlocal again
            file = os.fstat(handle)
            again |= file.st_ino in refused
            try:
                turn("fsync", os.readlink(f"/proc/self/fd/{handle}"))
            except OSError:
                if not stat.S_ISDIR(file.st_mode):
                    refused.add(file.st_ino)
                raise
            sync(handle)

        def looked_at(where: Any, **options: Any) -> os.stat_result:
            turn("stat", where)
            return status(where, **options)

        def half_written(method: str) -> Callable[..., int]:
            real = getattr(Path, method)

            def write(self: Path, data: Any, **options: Any) -> int:
                try:
                    turn("write", self)
                except OSError:
                    real(self, data[: len(data) // 2], **options)
                    raise
                return int(real(self, data, **options))

            return write

        os.fsync, os.stat = synced, looked_at
        for method in ("write_bytes", "write_text"):
            setattr(Path, method, half_written(method))
        sys.addaudithook(lambda event, given: turn(event, given[0]) if event in OPERATIONS else None)
        outcomes: dict[Path, Outcome] = {}
        for nth in itertools.count(1):
            for number in numbers if SOAK else [numbers[nth % len(numbers)]]:
                root, calls, operation, refused, again, error = path / f"{nth}-{number}", 0, "", set(), False, ""
                try:
                    act(root, count)
                except (OSError, PipelineError) as raised:
                    error = repr(raised)
                if not operation:
                    assert not error
                    return outcomes
                outcomes[root] = Outcome(operation, error, again)
        raise AssertionError

    return {path: Outcome(*outcome) for path, outcome in in_child(child).items()}


def harm(path: Path, count: int) -> list[str]:
    """What is believed and not so."""
    found = [name for name in believed(path, count) if (path / file_of(name)).read_bytes() != content(name)]
    with suppress(FileNotFoundError, DamageError):
        found += [file for file in read_manifest(path)["files"] if (path / file).read_bytes() != content(file[6:11])]
    return found


def test_whichever_file_operation_fails_there_is_an_error_and_no_bad_commit_and_the_next_run_ends_well(tmp_path: Path):
    count = 3 if SOAK else 1
    outcomes = failing_once(work, tmp_path, count, [errno.EIO, errno.ENOSPC])
    for path, outcome in outcomes.items():
        # the folder of the claims is made where it is not there; where it is, nobody minds
        assert outcome.error or (outcome.operation == "os.mkdir" and is_whole(path, count)), f"{path.name}: {outcome}"
        assert harm(path, count) == [], f"{path.name}: {outcome}"
        assert not outcome.synced_again
        work(path, count)
        assert is_whole(path, count)
        assert not list(path.rglob(f"{UNFINISHED}*"))
    kinds = Counter(outcome.operation.removeprefix("os.") for outcome in outcomes.values())
    assert {"fsync", "link", "open", "rename", "remove", "mkdir", "write"} <= kinds.keys()
    report(
        f"a file operation that fails: {len(outcomes)} ({', '.join(f'{number} {kind}' for kind, number in kinds.most_common())}): an error each time, nothing wrong believed, whole after the next run"
    )


def careless(path: Path, count: int) -> None:
    """As `work`, but goes on after a write that failed."""
    out = RunFolder(path, writers="several")
    for name in out.pieces(names_of(count)):
        with appears_whole(path / file_of(name), absent=True) as temporary, suppress(OSError):
            temporary.write_bytes(content(name))
        out.commit(name, {file_of(name): {}})
    out.seal("worker", fingerprint(IDENTITY), IDENTITY, {}, {}, {})
    out.close()


def test_control_a_writer_that_goes_on_after_a_failed_write_is_caught(tmp_path: Path):
    outcomes = failing_once(careless, tmp_path, 1, [errno.ENOSPC])
    assert [path for path, outcome in outcomes.items() if harm(path, 1) and not outcome.error]


def test_control_a_sync_whose_failure_is_passed_over_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = files.sync

    def hopeful(path: Path) -> None:
        for _ in range(2):
            with suppress(OSError):
                return real(path)

    monkeypatch.setattr(files, "sync", hopeful)
    outcomes = failing_once(work, tmp_path, 1, [errno.EIO])
    assert [outcome for outcome in outcomes.values() if outcome.operation == "fsync" and not outcome.error]
    assert [outcome for outcome in outcomes.values() if outcome.synced_again]


def test_a_sign_of_life_that_cannot_be_written_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failed = []
    real = claims.Claims._write

    def write(self: claims.Claims, file: Path, beats: int) -> None:
        if threading.current_thread() is self._thread:
            failed.append(beats)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, file, beats)

    monkeypatch.setattr(claims, "BEAT", 0.001)
    monkeypatch.setattr(claims.Claims, "_write", write)
    work(tmp_path, 3, slow=0.02)
    assert failed
    assert is_whole(tmp_path, 3)


def test_a_claim_that_could_not_be_written_leaves_nothing(tmp_path: Path):
    for path, outcome in failing_once(work, tmp_path, 1, [errno.ENOSPC]).items():
        work(path, 1)
        assert not list((path / "claims").glob(".*")), f"{path.name}: {outcome}"


# --- a full disk ---


def with_room_for(size: int, act: Callable[[Path, int], None], path: Path, count: int) -> str:
    """Write in a process that may make no file greater than so many bytes; gives what it raised."""

    def child(_: Callable[[Any], None]) -> str:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            act(path, count)
        except (OSError, PipelineError) as error:
            return str(error)
        return ""

    return str(in_child(child))


def test_a_disk_that_is_full_at_any_size_is_a_clear_error_and_the_next_run_ends_well(tmp_path: Path):
    draw, errors, rounds = random.Random(0), 0, 200 if SOAK else 15
    for number in range(rounds):
        path = tmp_path / str(number)
        error = with_room_for(draw.randrange(2000), work, path, 3)
        assert error == "" or "File too large" in error
        assert harm(path, 3) == []
        assert (error == "") == (path / "manifest.json").exists()
        assert not list(path.rglob(f"{UNFINISHED}*"))
        work(path, 3)
        assert is_whole(path, 3)
        errors += error != ""
    assert errors
    report(f"a full disk: {rounds} sizes, {errors} errors, each clear; nothing wrong believed, all whole after the next run")


def test_control_a_disk_that_is_full_under_a_careless_writer_is_caught(tmp_path: Path):
    with_room_for(1500, careless, tmp_path / "x", 3)
    assert harm(tmp_path / "x", 3)


# --- damage ---

FILES = [*(file_of(name) for name in names_of(3)), *(f"commits/{name}.json" for name in names_of(3)), "manifest.json"]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    work(tmp_path / "finished", 3)
    return tmp_path / "finished"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder of the same stage with another key: the same names, other bytes."""
    work(tmp_path / "foreign", 3, salt="other")
    return tmp_path / "foreign"


def pieces_of(file: str) -> list[str]:
    return [] if file == "manifest.json" else [Path(file).stem.removeprefix("bytes-")]


def altered(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One bit, or one end, other than it was; of JSON not the last line's end alone."""
    if draw.random() < 0.3:
        return "cut", data[: draw.randrange(len(data) - 1)]
    flipped, bit = bytearray(data), draw.randrange(len(data) * 8)
    flipped[bit // 8] ^= 1 << bit % 8
    return "flipped", bytes(flipped)


def put(file: Path, data: bytes, way: str) -> None:
    before = file.stat()
    if way == "replaced":
        other = file.with_name(".other")
        other.write_bytes(data)
        os.replace(other, file)
    else:
        file.write_bytes(data)
    if way == "with its old time":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def damaged(path: Path, rounds: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Each file of a finished folder is damaged so many times, and mended: its name, and what was done."""
    draw = random.Random(seed)
    for file in FILES:
        data = (path / file).read_bytes()
        for _ in range(rounds):
            kind, other = altered(data, draw)
            way = draw.choice(["in place", "with its old time", "replaced"])
            time.sleep(TICK)
            put(path / file, other, way)
            yield file, f"{kind} {way}"
            put(path / file, data, way)


def refused(folder: FinishedFolder, file: str) -> bool:
    try:
        folder.file(file)
    except DamageError as error:
        return file in str(error)
    return False


def test_every_flip_and_cut_is_found_and_blamed_on_its_file_and_the_file_is_refused(finished: Path):
    reader = FinishedFolder(finished)
    kinds: Counter[str] = Counter()
    for file in FILES[:3]:
        reader.file(file)
    for file, kind in damaged(finished, 220 if SOAK else 22):
        found = findings(finished)
        assert list(found.damaged) == [file], kind
        assert (found.untrusted, found.pieces) == ({}, pieces_of(file)), kind
        if file == "manifest.json":
            with pytest.raises(DamageError, match=r"manifest\.json"):
                FinishedFolder(finished)
        elif file in FILES[:3]:
            assert refused(FinishedFolder(finished), file)
            assert refused(reader, file), kind
            assert refused(reader, file)
        kinds[kind.split()[0]] += 1
        for other in FILES[:3]:
            assert other == file or reader.file(other)
    assert is_whole(finished, 3)
    report(
        f"damage: {kinds['flipped']} flipped bits and {kinds['cut']} cuts in {len(FILES)} files: each found, blamed on its file alone, and a damaged piece refused at the first and at a later access"
    )


def test_control_a_reader_that_looks_only_at_sizes_finds_no_flip(finished: Path, monkeypatch: pytest.MonkeyPatch):
    real = folder.problem
    monkeypatch.setattr(folder, "problem", lambda file, entry, fast=False: real(file, entry, True))
    for file, kind in damaged(finished, 8):
        if file in FILES[:3]:
            assert bool(findings(finished).damaged) == kind.startswith("cut")
            assert refused(FinishedFolder(finished), file) == kind.startswith("cut")


def test_control_records_without_a_hash_of_their_own_hide_flips(finished: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder, "_self_hash", lambda body: mock.ANY)
    unseen = 0
    for file, _ in damaged(finished, 8):
        with suppress(KeyError, AttributeError, TypeError):  # nobody expects a key that is spelt otherwise
            unseen += file not in findings(finished).damaged
    assert unseen


def test_control_a_reader_that_never_looks_again_gives_a_file_that_was_damaged_later(finished: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder, "stats", lambda file: [1])
    reader = FinishedFolder(finished)
    for file in FILES[:3]:
        reader.file(file)
    assert not any(refused(reader, file) for file, _ in damaged(finished, 1) if file in FILES[:3])


@pytest.mark.parametrize("file", ["commits/00001.json", "manifest.json"])
def test_a_record_that_lacks_its_last_byte_is_found(finished: Path, file: str):
    put(finished / file, (finished / file).read_bytes()[:-1], "in place")
    assert list(findings(finished).damaged) == [file]


def test_a_flip_that_leaves_a_number_the_same_is_found(tmp_path: Path):
    out = RunFolder(tmp_path)
    out.seal("worker", fingerprint(IDENTITY), IDENTITY, {}, {"rate": 1e-05}, {})
    out.close()
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b"1e-05", b"1E-05"))
    assert list(findings(tmp_path).damaged) == ["manifest.json"]


ONE, TWO = FILES[:2]
RECORD, OTHER = FILES[3:5]
STRAY = "bytes-00009.bin"


def swap(path: Path, first: str, second: str) -> None:
    (path / first).rename(path / "aside")
    (path / second).rename(path / first)
    (path / "aside").rename(path / second)


def replace(path: Path, file: str, by: Callable[[Path], Any]) -> None:
    (path / file).unlink()
    by(path / file)


class Way(NamedTuple):
    do: Callable[[Path, Path], Any]
    """To a folder, with the help of that of another key."""
    damaged: set[str]
    untrusted: set[str]
    pieces: set[str]
    """Those to be made anew."""


WAYS = {
    "two files swapped": Way(lambda path, _: swap(path, ONE, TWO), {ONE, TWO}, set(), {"00000", "00001"}),
    "a file of another piece": Way(lambda path, _: shutil.copyfile(path / TWO, path / ONE), {ONE}, set(), {"00000"}),
    "a file of another key": Way(lambda path, foreign: shutil.copyfile(foreign / ONE, path / ONE), {ONE}, set(), {"00000"}),
    "a file missing": Way(lambda path, _: (path / ONE).unlink(), {ONE}, set(), {"00000"}),
    "a file renamed": Way(lambda path, _: (path / ONE).rename(path / STRAY), {ONE}, {STRAY}, {"00000"}),
    "a file empty": Way(lambda path, _: (path / ONE).write_bytes(b""), {ONE}, set(), {"00000"}),
    "a link in a file's place": Way(lambda path, foreign: replace(path, ONE, lambda file: file.symlink_to(foreign / ONE)), {ONE}, set(), {"00000"}),
    "a folder in a file's place": Way(lambda path, _: replace(path, ONE, Path.mkdir), {ONE}, set(), {"00000"}),
    "a file too many": Way(lambda path, _: (path / STRAY).write_bytes(b"x"), set(), {STRAY}, set()),
    "two records swapped": Way(lambda path, _: swap(path, RECORD, OTHER), {RECORD, OTHER}, set(), {"00000", "00001"}),
    "a record of another piece": Way(lambda path, _: shutil.copyfile(path / OTHER, path / RECORD), {RECORD}, set(), {"00000"}),
    "a record too many": Way(lambda path, _: shutil.copyfile(path / OTHER, path / "commits/00009.json"), {"commits/00009.json"}, set(), {"00009"}),
    "a record of another key": Way(lambda path, foreign: shutil.copyfile(foreign / RECORD, path / RECORD), {ONE}, {RECORD}, {"00000"}),
    "a record and its file of another key": Way(lambda path, foreign: [shutil.copyfile(foreign / file, path / file) for file in (RECORD, ONE)], set(), {RECORD}, {"00000"}),
    "the manifest of another key": Way(lambda path, foreign: shutil.copyfile(foreign / "manifest.json", path / "manifest.json"), set(), set(FILES[3:6]), set()),
    "an empty record": Way(lambda path, _: (path / RECORD).write_bytes(b""), {RECORD}, set(), {"00000"}),
    "an empty manifest": Way(lambda path, _: (path / "manifest.json").write_bytes(b""), {"manifest.json"}, set(), set()),
}


@pytest.mark.parametrize("name", WAYS)
def test_a_file_that_is_swapped_missing_renamed_or_too_many_is_named_and_never_read(name: str, finished: Path, foreign: Path):
    sound = {file: (finished / file).read_bytes() for file in FILES[:3]}
    reader = FinishedFolder(finished)
    for file in sound:
        reader.file(file)
    time.sleep(TICK)
    WAYS[name].do(finished, foreign)
    found = findings(finished)
    assert (set(found.damaged), set(found.untrusted), set(found.pieces)) == WAYS[name][1:4]
    assert found.exit_status
    for file, data in sound.items():
        if not (finished / file).is_file() or (finished / file).is_symlink() or (finished / file).read_bytes() != data:
            assert refused(reader, file)
            assert refused(FinishedFolder(finished), file)
    assert refused(reader, STRAY)


@pytest.mark.parametrize("name", WAYS)
def test_what_was_named_is_mended_by_a_repair_and_another_run(name: str, finished: Path, foreign: Path):
    WAYS[name].do(finished, foreign)
    folder.repair(finished, {})
    work(finished, 3)
    assert is_whole(finished, 3)
    assert findings(finished).exit_status == 0


@pytest.mark.parametrize("name", ["commits/00001.json", "manifest.json"])
def test_a_record_that_cannot_be_read_is_named(finished: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    real = Path.read_text

    def read(self: Path, *given: Any, **options: Any) -> str:
        if self == finished / name:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return real(self, *given, **options)

    monkeypatch.setattr(Path, "read_text", read)
    assert list(findings(finished).unchecked) == [name]


def test_a_folder_with_the_claim_of_a_dead_process_can_be_repaired_after_a_restart(finished: Path):
    (finished / "claims" / "00000").write_text(json.dumps({"owner": "x", "host": "lastboot", "process": "1", "beats": 0}))
    (finished / ONE).unlink()
    for _ in range(3):
        with suppress(InputError):
            folder.repair(finished, {})
            return
    raise AssertionError("refused three times")
