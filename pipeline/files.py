"""Files and folders that appear whole or not at all."""

import glob
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import DamageError

UNFINISHED = ".unfinished-"


@contextmanager
def appears_whole(path: Path) -> Iterator[Path]:
    """A temporary name to write a file (or make a folder) under; `path` has it, synced, when the block ends well.

    An exception in the block, or a kill at any moment, leaves `path` as it was. What a kill leaves under the
    temporary name is swept away by `remove_unfinished`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{UNFINISHED}{os.getpid()}-{path.name}"
    try:
        yield temporary
        if temporary.is_dir():
            for file in sorted(temporary.rglob("*")):
                _sync(file)
            shutil.rmtree(path, ignore_errors=True)
        # sync first: the rename may reach the disk before the bytes do
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Sweep away what killed writers left; only for a folder that nobody else writes to."""
    for left in list(folder.rglob(f"{UNFINISHED}*")):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    with appears_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
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


def files_named(pattern: str) -> list[Path]:
    """The files that `path:` in a YAML names: a file, a glob, or package:NAME/FILE inside an installed Python package."""
    if pattern.startswith("package:"):
        package, _, inside = pattern.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or []) if spec else []
        return [Path(place) / inside for place in places if (Path(place) / inside).is_file()]
    return [Path(file) for file in sorted(glob.glob(pattern, recursive=True)) if Path(file).is_file()]


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
