"""A run's folder: <runs>/<stage>/<fingerprint>/.

    key.json              the identity: all that shapes the result; written first
    built_on.json         the roots of the results that this one is made from; given once
    plan.json             how much there is to do
    claims/               who works on what; nothing is believed because of them
    commits/NAME.json     one per finished piece (a shard, a checkpoint): size and SHA-256 of its files, and of itself
    quarantine/           what was damaged and has been, or is to be, made anew
    manifest.json         written last: the identity, every file's size and SHA-256, the summary. With it the run is finished

What has no commit is not there, whatever lies in the folder; what has no manifest is not finished. Several processes may
write into one folder: of a piece's files, its commit and the manifest the first of each name stays.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import DamageError, Disagreement, InputError, PipelineError
from pipeline.files import UNFINISHED, appears_whole, as_json, make_folder, read_json, remove_unfinished, sha256_of, stats, sync, write_json
from pipeline.running.claims import Claims
from pipeline.running.fingerprint import Identity, fingerprint

FORMAT = 1
WHOLE = "whole"
"""The claim of a process that must be a folder's only writer."""
SCRATCH = ("checkpoints", "tensorboard")
OPTIONAL = ("attention-",)
"""Files whose names begin so may be left behind, all of them, when a finished folder is copied."""
"""Folders that are useful while a stage runs, or to look at, but no part of its result."""
PLAIN_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9._-]*/)?[A-Za-z0-9_][A-Za-z0-9._-]*")
"""A file, or a file in a folder: nothing that leads elsewhere, and nothing hidden."""
OWN = ("claims", "commits", "quarantine", "manifest.json", "plan.json", "key.json", "built_on.json")
"""What the folder keeps for itself."""
POLL = 1.0
"""Seconds between two looks at what other processes have finished."""


class RunFolder:
    """A folder that a stage writes its result into; claims are let go of by `close`.

    writers: one (InputError if there is another), several, or none (a process that only takes part in the computation).
    settings: the digest of what the stage's pieces are made with, other than their input.
    """

    def __init__(self, path: Path, writers: str = "one", settings: str = "") -> None:
        self.path = path
        self.settings = settings
        self._kept: list[str] = []
        self._asked: set[str] = set()
        self._sole = writers == "one"
        self.before_commit: Callable[[], None] = lambda: None
        """Called before anything is vouched for; may raise."""
        make_folder(path / "commits")
        for folder in (path, *path.absolute().parents[:3]):
            sync(folder)  # a process that was killed may have made them, and no more
        self._claims = Claims(path / "claims").__enter__()
        if writers == "one" and not self._claims.take_in_time(WHOLE):
            self.close()
            raise InputError(f"Another process is writing {path}. Wait until it has finished, or stop it first; if there is none, remove {path / 'claims' / WHOLE}.")
        self._writes = writers != "none"
        if self._writes:
            remove_unfinished(path)

    def close(self) -> None:
        """Let others write."""
        self._claims.__exit__(None, None, None)

    def plan(self, unit: str, total: int) -> None:
        """Say how much there is to do, so that `pipeline status` can tell how far it is."""
        write_json(self.path / "plan.json", {"unit": unit, "total": total})

    def pieces(self, names: Sequence[str], meanwhile: Callable[[], None] = lambda: None, keys: Mapping[str, str] | None = None) -> Iterator[str]:
        """The pieces that nobody has finished or is working on, each claimed for this process until it is committed.

        Ends when every piece is committed or claimed here: waits for those that other processes work on, and does their work
        if they die. A piece whose files (`...-NAME.*`) are not what its commit says goes to the quarantine first.
        meanwhile: called while waiting. keys: what `info["key"]` of each piece's commit must be.
        """

        def stands(name: str) -> bool:
            return self.stands(name) and (keys is None or self.info(name).get("key") == keys[name])

        self._asked.update(names)
        checked: set[str] = set()
        while True:
            waiting = False
            for name in names:
                if self._claims.holds(name) or name in checked:
                    continue
                if stands(name):
                    checked.add(name)
                elif not self._claims.take(name):
                    waiting = True
                elif stands(name):  # finished while we looked
                    self._claims.release(name)
                else:
                    self._clear(name)
                    yield name
            if not waiting:
                return
            meanwhile()
            time.sleep(POLL)

    def made_elsewhere(self) -> dict[str, tuple[Path, str]]:
        """By its key (`info["key"]`), where each piece lies that another run of this stage has made: folder and name."""
        return {key: place for key, place in pieces_by_key(self.path.parent).items() if place[0] != self.path}

    def take_over(self, name: str, folder: Path, theirs: str, renamed: Callable[[list[str]], dict[str, str]]) -> bool:
        """Make a piece out of an equal one of another run; False if that is damaged or lacks a file.

        renamed: of the names of its files -> those that are wanted, and their names here; none if one is lacking.
        """
        commit = _read_commit(folder, theirs)
        files = renamed(list(commit["files"]))
        if not files or any(problem(folder / file, commit["files"][file]) for file in files):
            return False
        try:
            for file, here in files.items():
                with appears_whole(self.path / here, absent=True) as temporary:
                    try:
                        os.link(folder / file, temporary)
                    except OSError:
                        shutil.copyfile(folder / file, temporary)
        except FileExistsError:  # another process has made it otherwise: that will be seen when it is made here
            return False
        self.commit(name, {here: {key: value for key, value in commit["files"][file].items() if key not in ("size", "sha256")} for file, here in files.items()}, **commit["info"])
        return True

    def committed(self) -> list[str]:
        """The names of all pieces whose files are what their commit says, in order; the others go to the quarantine."""
        standing = [name for name in _commit_names(self.path) if self.stands(name)]
        for name in set(_commit_names(self.path)) - set(standing) if self._writes else ():
            self._clear(name)
        return standing

    def stands(self, name: str) -> bool:
        """Whether a piece has a commit, and its files are what that says."""
        try:
            commit = _read_commit(self.path, name)
        except DamageError:
            return False
        return commit["name"] == name and not any(problem(self.path / file, entry) for file, entry in commit["files"].items())

    def names(self) -> list[str]:
        """The names of all pieces that have a commit, in order, unchecked."""
        return _commit_names(self.path)

    def info(self, name: str) -> dict[str, Any]:
        """What was said of a piece when it was committed."""
        return dict(_read_commit(self.path, name)["info"])

    def commit(self, name: str, files: dict[str, dict[str, Any]], **info: Any) -> None:
        """Say that a piece is finished; its files (paths inside the folder) are whole under their final names.

        files: what else is to be said of each file. Disagreement if somebody has committed the piece with other content.
        """
        self._refuse_if_replaced()
        self.before_commit()
        entries = {file: describe(self.path / file) | said for file, said in files.items()}
        body = {"name": name, "files": entries, "info": info}
        try:
            write_json(self.path / "commits" / f"{name}.json", body | {"self": _self_hash(body)}, absent=True)
        except FileExistsError:
            self.agree(name, entries)
        self._claims.release(name)

    def agree(self, name: str, files: dict[str, dict[str, Any]]) -> None:
        """Disagreement unless a piece that is committed has the same content: rows where the rows' digest is known, otherwise bytes."""
        theirs = _read_commit(self.path, name)["files"]
        for file, ours in files.items():
            key = "rows_digest" if "rows_digest" in ours else "sha256"
            if theirs.get(file, {}).get(key) != ours[key]:
                raise Disagreement(
                    f"{self.path / file}: another process has made this file with other content from the same input. Both ran with settings "
                    "that must give the same; look for different devices, threads, library versions or machine.teacher_batch_records. Theirs is kept."
                )
        self._claims.release(name)

    def withdraw(self, name: str) -> None:
        """Take a piece back, the commit first, so that nothing is believed that is half gone."""
        record = self.path / "commits" / f"{name}.json"
        files = list(_read_commit(self.path, name)["files"]) if record.exists() else []
        record.unlink(missing_ok=True)
        for file in files:
            (self.path / file).unlink(missing_ok=True)

    def quarantine(self, files: Sequence[str]) -> None:
        """Put files (or folders) out of the way, commits first, where they can still be looked at."""
        place = self.path / "quarantine" / f"{len(list(self.path.glob('quarantine/*'))):04d}"
        for file in sorted(files, key=lambda file: not file.startswith("commits/")):
            if (self.path / file).exists() or (self.path / file).is_symlink():
                (place / file).parent.mkdir(parents=True, exist_ok=True)
                (self.path / file).rename(place / file)

    def _clear(self, name: str) -> None:
        record = self.path / "commits" / f"{name}.json"
        files = [file.relative_to(self.path).as_posix() for file in self.path.glob(f"[!.]*-{name}.*")]
        if record.exists():
            with suppress(DamageError):
                files += _read_commit(self.path, name)["files"]
            self.quarantine([f"commits/{record.name}", *dict.fromkeys(files)])
        else:  # of a writer that was killed before it could commit
            for file in files:
                (self.path / file).unlink(missing_ok=True)

    @contextmanager
    def result(self, name: str) -> Iterator[Path]:
        """A temporary name for a file, or folder, that belongs to the result and to no piece. Only for a sole writer."""
        self._refuse_if_replaced()
        with appears_whole(self.path / name) as temporary:
            yield temporary
            self._refuse_if_replaced()
        self._kept.append(name)

    def keep(self, *names: str) -> None:
        """Files that were written step by step belong to the result, too."""
        self._refuse_if_replaced()
        self._kept += names

    def _refuse_if_replaced(self) -> None:
        """A process that was stopped for so long that another has taken its place must not touch what that has made."""
        if self._sole and (self.sealed() or not self._claims.still_holds(WHOLE)):
            raise InputError(f"Another process has taken over {self.path} while this one was stopped, so this one ends. What the other makes is the result.")

    def sealed(self) -> bool:
        return (self.path / "manifest.json").exists()

    def seal(self, stage: str, fingerprint: str, identity: Identity, built_on: dict[str, str], summary: dict[str, Any], machine: dict[str, Any]) -> None:
        """Write the manifest: the run is finished. Disagreement if somebody has finished it with other files.

        built_on: the roots of the results that it was made from. A piece that nobody asked for is no part of the result.
        """
        self._refuse_if_replaced()
        remove_unfinished(self.path)
        files: dict[str, dict[str, Any]] = {}
        for name in sorted(self._asked):
            commit = _read_commit(self.path, name)
            files |= {file: entry for file, entry in commit["files"].items() if not file.startswith(SCRATCH)}
        for name in self._kept:
            place = self.path / name
            files |= {file.relative_to(self.path).as_posix(): describe(file) for file in ([place] if place.is_file() else sorted(place.rglob("*"))) if file.is_file()}
        files = dict(sorted(files.items()))
        if wrong := _misshapen(files):
            raise PipelineError(f"{self.path}: {wrong}, and nobody could read that.")
        body = {"format": FORMAT, "stage": stage, "fingerprint": fingerprint, "identity": identity, "built_on": built_on}
        body |= {"files": files, "root": root(fingerprint, files), "summary": summary, "machine": machine}
        try:
            write_json(self.path / "manifest.json", body | {"self": _self_hash(body)}, absent=True)
        except FileExistsError:
            if read_manifest(self.path)["root"] != body["root"]:
                raise Disagreement(f"{self.path / 'manifest.json'}: another process has finished this folder with other files. Theirs is kept.") from None
        for name in _commit_names(self.path):
            # what only served to go on after a kill has served
            try:
                served = all(file.startswith(SCRATCH) for file in _read_commit(self.path, name)["files"])
            except DamageError:
                self._clear(name)
                continue
            if served:
                self.withdraw(name)

    def others(self) -> list[str]:
        """The pieces that other processes are working on."""
        return self._claims.living()


class FinishedFolder:
    """A finished run's folder, to read from: each file is checked against the manifest when it is first asked for, and again when it has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.identity: Identity = self.manifest["identity"]
        self.summary: dict[str, Any] = self.manifest["summary"]
        self.root = root(self.fingerprint, self.manifest["files"])
        self._checked: dict[str, list[int]] = {}

    def check_sizes(self) -> None:
        """DamageError if a file is gone or has another size: what can be seen without reading everything."""
        absent = left_behind(self.path, self.manifest["files"])
        for name, entry in self.manifest["files"].items():
            file = self.path / name
            if name in absent:
                continue
            if not file.is_file() or file.stat().st_size != entry["size"]:
                self.file(name)

    def names(self, beginning: str | tuple[str, ...] = "") -> list[str]:
        return [name for name in self.manifest["files"] if name.startswith(beginning)]

    def size(self, beginning: str | tuple[str, ...] = "") -> int:
        """Bytes of the files whose names begin so."""
        return sum(self.manifest["files"][name]["size"] for name in self.names(beginning))

    def file(self, name: str) -> Path:
        """The file's path, once its bytes are known to be what was written."""
        if name not in self.manifest["files"]:
            raise DamageError(f"{self.path} has no file {name} in its manifest. Run the stage {self.manifest['stage']} again.")
        try:
            before = stats(self.path / name)
        except OSError:
            before = []
        if not before or self._checked.get(name) != before:
            wrong = problem(self.path / name, self.manifest["files"][name])
            if wrong and name in left_behind(self.path, self.manifest["files"]):
                raise DamageError(f"{self.path / name} is not here: such files may be left behind when a folder is copied, but this needs them. Copy them, too.")
            if wrong:
                raise DamageError(f"{self.path / name} {wrong}. Run `pipeline verify {self.path} --repair`, then the stage {self.manifest['stage']} again, or copy the file anew.")
            self._checked[name] = before
        return self.path / name

    def folder(self, name: str) -> Path:
        """A folder inside, once all its files are known to be what was written, and there are no others."""
        known = self.names(f"{name}/")
        for file in known:
            self.file(file)
        for there in sorted((self.path / name).rglob("*")):
            if there.relative_to(self.path).as_posix() not in known:
                raise DamageError(f"{there} is not of the result. Run `pipeline verify {self.path} --repair`, or remove it.")
        return self.path / name


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished run; a DamageError if it is not what was written, FileNotFoundError if there is none."""
    manifest = read_json(path / "manifest.json")
    if not _fits(path / "manifest.json", manifest):
        raise DamageError(f"{path / 'manifest.json'} is damaged (its own hash does not fit). Copy it anew, or remove it and run the stage again.")
    if manifest.get("format") != FORMAT:
        raise DamageError(f"{path} has format {manifest.get('format')}; this version reads format {FORMAT}. Use the version that wrote it.")
    kinds = {"stage": str, "fingerprint": str, "identity": dict, "summary": dict, "machine": dict}
    wrong = _misshapen(manifest.get("files")) or next((f"'{key}' is missing or no {kind.__name__}" for key, kind in kinds.items() if not isinstance(manifest.get(key), kind)), None)
    if wrong or not all(isinstance(manifest["identity"].get(key), kind) for key, kind in (("stage", str), ("sections", dict), ("needs", dict))):
        raise DamageError(f"{path / 'manifest.json'}: {wrong or 'its identity is none'}. Do not use this folder.")
    try:
        fits = fingerprint(manifest["identity"]) == manifest["fingerprint"]
    except (TypeError, KeyError, AttributeError):
        fits = False
    if not fits:
        raise DamageError(f"{path / 'manifest.json'} says something else of what it was made from than its fingerprint does. Do not use this folder.")
    return manifest


def pieces_by_key(stage: Path) -> dict[str, tuple[Path, str]]:
    """Of all runs of a stage, begun or finished: key -> folder and name of a committed piece."""
    found: dict[str, tuple[Path, str]] = {}
    for record in sorted(stage.glob("*/commits/[!.]*.json")):
        with suppress(DamageError, KeyError, FileNotFoundError):
            found[_read_commit(record.parent.parent, record.stem)["info"]["key"]] = (record.parent.parent, record.stem)
    return found


def progress(path: Path) -> dict[str, Any] | None:
    """How far a run that is not finished has come: {"done", "total", "unit"}; None if it has not begun."""
    if not (path / "plan.json").exists():
        return None
    try:
        plan = read_json(path / "plan.json")
        unit, total = str(plan["unit"]), int(plan["total"])
    except (DamageError, TypeError, KeyError, ValueError):
        unit, total = "shards", 0  # the stage writes it anew; what is done is in the commits
    names = [name for name in _commit_names(path) if _is_there(path, name)]
    if unit == "shards":
        done = sum(name.isdigit() and (not total or int(name) < total) for name in names)
    else:
        done = max((int(number) for name in names if (number := name.rpartition("-")[2]).isdigit()), default=0)
    return {"done": done, "total": total, "unit": unit}


def _is_there(path: Path, name: str) -> bool:
    """Whether a piece's files have the sizes that its commit says."""
    try:
        return not any(problem(path / file, entry, fast=True) for file, entry in _read_commit(path, name)["files"].items())
    except DamageError:
        return False


@dataclass
class Findings:
    """What a look at a run's folder found: file -> problem, as the end of a sentence that begins with its name."""

    damaged: dict[str, str] = field(default_factory=dict)
    untrusted: dict[str, str] = field(default_factory=dict)
    """Not damaged, but nothing that the stage has vouched for, or not what was expected."""
    unchecked: dict[str, str] = field(default_factory=dict)
    """Could not be read."""
    mixed: bool = False
    """Pieces were made on different devices, batch sizes or thread counts."""
    pieces: list[str] = field(default_factory=list)
    """The names of the pieces that are damaged."""
    left_behind: set[str] = field(default_factory=set)
    """Files that are not here and need not be."""

    @property
    def exit_status(self) -> int:
        return sum(bit for bit, found in ((1, self.damaged), (2, self.untrusted), (4, self.unchecked), (8, self.mixed)) if found)

    def look(self, path: Path, name: str, entry: dict[str, Any], fast: bool) -> bool:
        """Whether a file is what its entry says."""
        if name in self.left_behind:
            return True
        try:
            text = problem(path / name, entry, fast)
        except OSError as error:
            self.unchecked[name] = f"cannot be read: {error.strerror}"
            return True
        if text:
            self.damaged[name] = text
        return not text


def findings(path: Path, fast: bool = False, expect: str | None = None) -> Findings:
    """fast: look at commits, manifest and sizes only, not at the files' bytes. expect: the root that the folder should have."""
    found = Findings()
    listed: dict[str, dict[str, Any]] = {}
    finished = (path / "manifest.json").exists()
    if finished:
        try:
            manifest = read_manifest(path)
            listed |= manifest["files"]
            found.left_behind = left_behind(path, manifest["files"])
            found.mixed = bool(manifest["summary"].get("mixed_numerics"))
            if expect and (is_so := root(manifest["fingerprint"], listed)) != expect:
                found.untrusted["manifest.json"] = f"has the root {is_so}, and {expect} was expected"
        except DamageError as error:
            found.damaged["manifest.json"] = str(error)
        except OSError as error:
            found.unchecked["manifest.json"] = f"cannot be read: {error.strerror}"
    elif expect:
        found.untrusted["manifest.json"] = "is missing, so the folder has no root yet"
    known, foreign = set(listed), list[str]()
    for name in _commit_names(path):
        try:
            commit = _read_commit(path, name)
        except DamageError as error:
            found.damaged[f"commits/{name}.json"] = str(error)
            found.pieces.append(name)
            continue
        except OSError as error:
            found.unchecked[f"commits/{name}.json"] = f"cannot be read: {error.strerror}"
            continue
        if commit["name"] != name:
            found.damaged[f"commits/{name}.json"] = f"is the commit of {commit['name']}"
            found.pieces.append(name)
            continue
        right = [found.look(path, file, entry, fast) for file, entry in commit["files"].items()]
        if not all(right):
            found.pieces.append(name)
        if contradicting := [file for file, entry in commit["files"].items() if file in listed and listed[file]["sha256"] != entry["sha256"]]:
            found.untrusted[f"commits/{name}.json"] = f"says something else of {contradicting[0]} than manifest.json"
            foreign.append(name)
        known |= commit["files"].keys() if not finished else set()
        for file in commit["files"]:
            listed.pop(file, None)
    if foreign != _commit_names(path):  # if all contradict the manifest, then that is the foreign one
        found.pieces += foreign
    for file, entry in listed.items():
        found.look(path, file, entry, fast)
    for file in sorted(path.rglob("*")) if finished and "manifest.json" not in (found.damaged | found.unchecked) else []:
        name = file.relative_to(path).as_posix()
        if (file.is_symlink() or not file.is_dir()) and name not in known and name.split("/")[0] not in (*SCRATCH, *OWN) and not file.name.startswith(UNFINISHED):
            found.untrusted[name] = "is not listed in manifest.json"
    return found


def repair(path: Path, found: dict[str, str]) -> None:
    """Put every piece that is damaged or contradicts the manifest, and every stray file, into the quarantine, and the manifest, so that the next run of the stage redoes just those.

    found: file -> problem, for files that are as they were written and yet wrong. InputError while somebody writes here.
    """
    folder = RunFolder(path)
    try:
        if working := [name for name in folder.others() if name != WHOLE]:
            raise InputError(f"Another process is writing piece {working[0]} of {path}. Wait until it has finished, or stop it first.")
        seen = findings(path)
        wrong, pieces = seen.damaged | seen.untrusted | found, list(dict.fromkeys(seen.pieces))
        pieces += [name for name in _commit_names(path) if name not in pieces and found.keys() & _read_commit(path, name)["files"].keys()]
        away = ["manifest.json"] if wrong else []
        for name in pieces:
            away.append(f"commits/{name}.json")
            if f"commits/{name}.json" not in wrong:
                away += _read_commit(path, name)["files"]
        # a folder inside a result, such as student/, is made as a whole and so is taken back as a whole
        away += [file.split("/")[0] if "/" in file and not file.startswith("commits/") else file for file in wrong]
        folder.quarantine(list(dict.fromkeys(away)))
    finally:
        folder.close()


def left_behind(path: Path, names: Iterable[str]) -> set[str]:
    """Those of a finished folder's files that were left out, as they may be, when it was copied."""
    kinds = [[name for name in names if name.startswith(beginning)] for beginning in OPTIONAL]
    return {name for kind in kinds if not any((path / name).exists() for name in kind) for name in kind}


def root(fingerprint: str, files: dict[str, dict[str, Any]]) -> str:
    """One digest for a finished result: of its fingerprint and of each file's name and SHA-256."""
    lines = [fingerprint, *(f"{entry['sha256']}  {name}" for name, entry in sorted(files.items()))]
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def describe(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": sha256_of(file)}


def problem(file: Path, entry: dict[str, Any], fast: bool = False) -> str | None:
    """What is wrong with a file, as the end of a sentence that begins with its name; None if it is what was written. fast: by its size."""
    if file.is_symlink() or file.parent.is_symlink():
        return "is a link: links are not followed here"
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    if size != entry["size"]:
        return f"is damaged: it has {size} bytes, {entry['size']} were written"
    return None if fast or sha256_of(file) == entry["sha256"] else "is damaged: its SHA-256 is not the one that was written"


def _commit_names(path: Path) -> list[str]:
    return sorted(file.stem for file in (path / "commits").glob("*.json") if not file.name.startswith(UNFINISHED))


def _read_commit(path: Path, name: str) -> dict[str, Any]:
    file = path / "commits" / f"{name}.json"
    if not file.exists():
        raise DamageError(f"{file} is missing")
    commit = read_json(file)
    if not _fits(file, commit):
        raise DamageError(f"{file} is damaged (its own hash does not fit)")
    if not isinstance(commit.get("name"), str) or not isinstance(commit.get("info"), dict) or _misshapen(commit.get("files")):
        raise DamageError(f"{file} is no commit: {_misshapen(commit.get('files')) or 'it lacks its name'}. Do not use this folder.")
    return commit


def _misshapen(files: Any) -> str | None:
    """What keeps this from being a list of files inside a folder, with their sizes and hashes."""
    if not isinstance(files, dict):
        return "it names no files"
    for name, entry in files.items():
        if not PLAIN_NAME.fullmatch(name):
            return f"it names a file {name!r}, which no stage writes"
        if not isinstance(entry, dict) or not isinstance(entry.get("size"), int) or entry["size"] < 0 or not re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))):
            return f"it does not say the size and SHA-256 of {name}"
    return None


def _fits(file: Path, value: Any) -> bool:
    """Whether a JSON is what was written: what it says, and to the byte how it says it."""
    return isinstance(value, dict) and value.get("self") == _self_hash({k: v for k, v in value.items() if k != "self"}) and file.read_text(encoding="utf-8") == as_json(value)


def _self_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
