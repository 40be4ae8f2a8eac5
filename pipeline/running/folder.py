"""A run's folder: <runs>/<stage>/<fingerprint>/.

    plan.json             how much there is to do, written first
    commits/NAME.json     one per finished piece (a shard, a checkpoint): size and SHA-256 of its files, and of itself
    manifest.json         written last: the identity, every file's size and SHA-256, the summary. With it the run is finished

What has no commit is not there, whatever lies in the folder; what has no manifest is not finished.
"""

import fcntl
import hashlib
import json
import shutil
from pathlib import Path
from typing import IO, Any

from pipeline.errors import DamageError, InputError
from pipeline.files import UNFINISHED, read_json, remove_unfinished, sha256_of, write_json
from pipeline.running.fingerprint import Identity

FORMAT = 1
LOCK = ".lock"
SCRATCH = ("checkpoints", "tensorboard")
"""Folders that are useful while a stage runs, or to look at, but no part of its result."""


class RunFolder:
    """A folder that a stage writes its result into."""

    def __init__(self, path: Path, only_writer: bool = True) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(path / LOCK) if only_writer else None
        if only_writer:
            remove_unfinished(path)

    def close(self) -> None:
        """Let others write."""
        if self._lock:
            self._lock.close()

    def plan(self, unit: str, total: int) -> None:
        """Say how much there is to do, so that `pipeline status` can tell how far it is."""
        write_json(self.path / "plan.json", {"unit": unit, "total": total})

    def unfinished(self, count: int) -> list[int]:
        """The shards that have no commit, or whose files are not what the commit says: only these are left to do."""
        return [shard for shard in range(count) if not self._stands(f"{shard:05d}")]

    def committed(self) -> list[str]:
        """The names of all pieces whose files are what their commit says, in order."""
        return [name for name in _commit_names(self.path) if self._stands(name)]

    def names(self) -> list[str]:
        """The names of all pieces that have a commit, in order, unchecked."""
        return _commit_names(self.path)

    def info(self, name: str) -> dict[str, Any]:
        """What was said of a piece when it was committed."""
        return dict(_read_commit(self.path, name)["info"])

    def commit(self, name: str, files: list[str], **info: Any) -> None:
        """Say that a piece is finished; its files (paths inside the folder) are whole under their final names."""
        entries = {file: describe(self.path / file) for file in files}
        body = {"name": name, "files": entries, "info": info}
        write_json(self.path / "commits" / f"{name}.json", body | {"self": _self_hash(body)})

    def withdraw(self, name: str) -> None:
        """Take a piece back, the commit first, so that nothing is believed that is half gone."""
        record = self.path / "commits" / f"{name}.json"
        files = list(_read_commit(self.path, name)["files"]) if record.exists() else []
        record.unlink(missing_ok=True)
        for file in files:
            (self.path / file).unlink(missing_ok=True)

    def seal(self, stage: str, fingerprint: str, identity: Identity, summary: dict[str, Any], machine: dict[str, Any]) -> None:
        """Write the manifest: the run is finished."""
        files: dict[str, dict[str, Any]] = {}
        for name in _commit_names(self.path):
            commit = _read_commit(self.path, name)
            files |= {file: entry for file, entry in commit["files"].items() if not file.startswith(SCRATCH)}
        for file in sorted(self.path.rglob("*")):
            relative = file.relative_to(self.path)
            if file.is_file() and not file.name.startswith((UNFINISHED, LOCK)) and relative.parts[0] not in (*SCRATCH, "commits", "manifest.json", "plan.json"):
                files.setdefault(relative.as_posix(), {})
        files = {file: entry or describe(self.path / file) for file, entry in sorted(files.items())}
        body = {"format": FORMAT, "stage": stage, "fingerprint": fingerprint, "identity": identity}
        body |= {"files": files, "summary": summary, "machine": machine}
        write_json(self.path / "manifest.json", body | {"self": _self_hash(body)})
        for name in _commit_names(self.path):
            # what only served to go on after a kill has served
            if all(file.startswith(SCRATCH) for file in _read_commit(self.path, name)["files"]):
                self.withdraw(name)

    def _stands(self, name: str) -> bool:
        try:
            commit = _read_commit(self.path, name)
        except DamageError:
            return False
        return not any(problem(self.path / file, entry) for file, entry in commit["files"].items())


class FinishedFolder:
    """A finished run's folder, to read from: each file is checked against the manifest when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.identity: Identity = self.manifest["identity"]
        self.summary: dict[str, Any] = self.manifest["summary"]
        self._checked: set[str] = set()

    def check_sizes(self) -> None:
        """DamageError if a file is gone or has another size: what can be seen without reading everything."""
        for name, entry in self.manifest["files"].items():
            file = self.path / name
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
        if name not in self._checked:
            wrong = problem(self.path / name, self.manifest["files"][name])
            if wrong:
                raise DamageError(f"{self.path / name} {wrong}. Run `pipeline verify {self.path} --repair`, then the stage {self.manifest['stage']} again, or copy the file anew.")
            self._checked.add(name)
        return self.path / name

    def folder(self, name: str) -> Path:
        """A folder inside, once all its files are known to be what was written."""
        for file in self.names(f"{name}/"):
            self.file(file)
        return self.path / name


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a finished run; a DamageError if it is not what was written, FileNotFoundError if there is none."""
    manifest = read_json(path / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("self") != _self_hash({k: v for k, v in manifest.items() if k != "self"}):
        raise DamageError(f"{path / 'manifest.json'} is damaged (its own hash does not fit). Copy it anew, or remove it and run the stage again.")
    if manifest["format"] != FORMAT:
        raise DamageError(f"{path} has format {manifest['format']}; this version reads format {FORMAT}. Use the version that wrote it.")
    return manifest


def progress(path: Path) -> dict[str, Any] | None:
    """How far a run that is not finished has come: {"done", "total", "unit"}; None if it has not begun."""
    if not (path / "plan.json").exists():
        return None
    try:
        plan = read_json(path / "plan.json")
        unit, total = str(plan["unit"]), int(plan["total"])
    except (DamageError, TypeError, KeyError, ValueError):
        unit, total = "shards", 0  # the stage writes it anew; what is done is in the commits
    names = _commit_names(path)
    done = len(names) if unit == "shards" else max((int(name.rpartition("-")[2]) for name in names), default=0)
    return {"done": done, "total": total, "unit": unit}


def damage(path: Path) -> tuple[dict[str, str], list[str]]:
    """What is wrong in a run's folder: file -> problem, and the names of the pieces that are hit."""
    wrong: dict[str, str] = {}
    pieces: list[str] = []
    listed: dict[str, dict[str, Any]] = {}
    if (path / "manifest.json").exists():
        try:
            listed |= read_manifest(path)["files"]
        except DamageError as error:
            wrong["manifest.json"] = str(error)
    for name in _commit_names(path):
        try:
            commit = _read_commit(path, name)
        except DamageError as error:
            wrong[f"commits/{name}.json"] = str(error)
            pieces.append(name)
            continue
        found = {file: text for file, entry in commit["files"].items() if (text := problem(path / file, entry))}
        if found:
            wrong |= found
            pieces.append(name)
        for file in commit["files"]:
            listed.pop(file, None)
    wrong |= {file: text for file, entry in listed.items() if (text := problem(path / file, entry))}
    return wrong, pieces


def repair(path: Path, found: dict[str, str]) -> None:
    """Take back every damaged piece, and the manifest, so that the next run of the stage redoes just those.

    found: file -> problem, for files that are as they were written and yet wrong.
    """
    folder = RunFolder(path)  # first: nobody may be writing while pieces are taken back
    try:
        wrong, pieces = damage(path)
        wrong |= found
        pieces += [name for name in _commit_names(path) if name not in pieces and found.keys() & _read_commit(path, name)["files"].keys()]
        if wrong:
            (path / "manifest.json").unlink(missing_ok=True)
        for name in pieces:
            if f"commits/{name}.json" in wrong:
                (path / "commits" / f"{name}.json").unlink(missing_ok=True)
            else:
                folder.withdraw(name)
        for file in wrong:
            (path / file).unlink(missing_ok=True)
            # a folder inside a result, such as student/, is made as a whole and so is taken back as a whole
            if "/" in file and not file.startswith("commits/"):
                shutil.rmtree(path / file.split("/")[0], ignore_errors=True)
    finally:
        folder.close()


def _locked(path: Path) -> IO[str]:
    """Held while a process writes, and let go of when it ends, however it ends. Guards against a command given twice by mistake."""
    file = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"Another process is writing {path.parent}. Wait until it has finished, or stop it first.") from None
    return file


def describe(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": sha256_of(file)}


def problem(file: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file, as the end of a sentence that begins with its name; None if it is what was written."""
    if not file.is_file() or file.is_symlink():
        return "is missing"
    size = file.stat().st_size
    if size != entry["size"]:
        return f"is damaged: it has {size} bytes, {entry['size']} were written"
    return None if sha256_of(file) == entry["sha256"] else "is damaged: its SHA-256 is not the one that was written"


def _commit_names(path: Path) -> list[str]:
    return sorted(file.stem for file in (path / "commits").glob("*.json") if not file.name.startswith(UNFINISHED))


def _read_commit(path: Path, name: str) -> dict[str, Any]:
    file = path / "commits" / f"{name}.json"
    if not file.exists():
        raise DamageError(f"{file} is missing")
    commit = read_json(file)
    if not isinstance(commit, dict) or commit.get("self") != _self_hash({k: v for k, v in commit.items() if k != "self"}):
        raise DamageError(f"{file} is damaged (its own hash does not fit)")
    return commit


def _self_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
