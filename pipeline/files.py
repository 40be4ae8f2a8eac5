"""Files and folders that appear whole or not at all."""

import errno
import glob
import hashlib
import importlib.util
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import DamageError

UNFINISHED = ".unfinished-"
LARGEST_JSON = 256 << 20
"""Bytes; a cache of a million shards stays below."""
FORGOTTEN_AFTER = 24 * 3600
"""Seconds after which a temporary file of a writer on another machine is taken for left behind."""


@contextmanager
def appears_whole(path: Path, absent: bool = False) -> Iterator[Path]:
    """A temporary name to write a file (or make a folder) under; `path` has it, synced, when the block ends well.

    An exception in the block, or a kill at any moment, leaves `path` as it was. What a kill leaves under the
    temporary name is swept away by `remove_unfinished`.
    absent: what stands under `path` by then stays; FileExistsError if it is not the same.
    """
    make_folder(path.parent)
    temporary = path.parent / f"{UNFINISHED}{HOST}-{os.getpid()}-{path.name}"
    try:
        yield temporary
        # sync first: the name may reach the disk before the bytes do
        for file in sorted(temporary.rglob("*")):
            sync(file)
        sync(temporary)
        if temporary.is_dir():
            if not _same_folder(temporary, path):
                shutil.rmtree(path, ignore_errors=True)
                os.replace(temporary, path)
        elif absent:
            if not name_if_absent(temporary, path) and sha256_of(path) != sha256_of(temporary):
                sync(path.parent)  # who gave the name may not have come so far
                raise FileExistsError(errno.EEXIST, "It is there already, with other bytes", str(path))
        else:
            os.replace(temporary, path)
        sync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """The folder and those above it, so that they are still there after a loss of power."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def name_if_absent(temporary: Path, path: Path) -> bool:
    """Give a file its name; False if the name is taken. Of several writers one succeeds, on a network file system, too."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        with suppress(FileNotFoundError):  # it is gone again
            return os.path.samefile(temporary, path)  # NFS may say so of its own success
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        if path.exists():
            return False
        os.replace(temporary, path)  # no hard links here: only one process may write
    return True


def _same_folder(one: Path, other: Path) -> bool:
    files, others = ({file.relative_to(folder): file for file in folder.rglob("*") if file.is_file()} for folder in (one, other))
    return files.keys() == others.keys() and all(sha256_of(file) == sha256_of(others[name]) for name, file in files.items())


def remove_unfinished(folder: Path) -> None:
    """Sweep away what killed writers left; what a living one may still be writing stays."""
    for left in list(folder.rglob(f"{UNFINISHED}*")):
        _, host, process, *_ = f"{left.name}---".split("-")
        with suppress(FileNotFoundError):
            if is_running(process) if host == HOST else time.time() - left.stat().st_mtime < FORGOTTEN_AFTER:
                continue
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def is_running(process: str) -> bool:
    """Whether a process of this machine, other than this one, is there. process: its number."""
    if not process.isdigit() or int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    with suppress(OSError):  # one that is dead and whose parent has not asked for it yet
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0] != "Z"
    return True


def _host() -> str:
    """Eight digits for the machine since it was started, and the container: where a process number means something."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii"), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]


HOST = _host()


def write_json(path: Path, value: Any, absent: bool = False) -> None:
    with appears_whole(path, absent) as temporary:
        temporary.write_text(as_json(value), encoding="utf-8")


def as_json(value: Any) -> str:
    """The text that `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, links: bool = False) -> Any:
    """DamageError if it is no JSON that we would write: no file, too large, too deep, a key given twice, NaN. links: follow them."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise ValueError("a key is given twice")
        return value

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        kind = (path.stat() if links else path.lstat()).st_mode
        if not stat.S_ISREG(kind):  # a pipe would be waited for, and a device has no end
            raise ValueError("it is no file" + (" but a link" if stat.S_ISLNK(kind) else " but a folder" if stat.S_ISDIR(kind) else ""))
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has {path.stat().st_size} bytes")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DamageError(f"{path} is damaged: {error}. Remove it and run the command again, or copy it anew.") from None


def read_json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_text(path: Path, text: str) -> None:
    with appears_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes, the same as `sha256sum` prints."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def stats(file: Path) -> list[int]:
    """What changes when a file is changed, short of reading it: device, inode, size, mtime and ctime."""
    found = os.stat(file)
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def files_named(pattern: str) -> list[Path]:
    """The files that `path:` in a YAML names: a file, a glob, or package:NAME/FILE inside an installed Python package."""
    if pattern.startswith("package:"):
        package, _, inside = pattern.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or []) if spec else []
        return [Path(place) / inside for place in places if (Path(place) / inside).is_file()]
    return [Path(file) for file in sorted(glob.glob(pattern, recursive=True)) if Path(file).is_file()]


def sync(path: Path) -> None:
    """A file's bytes, or the names in a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
