"""Whether the code that can change a stage's result is the code that its version was given for.

`values.lock` has, for each stage, its version and the SHA-256 of every file of ours that it imports, other than those of
INERT. `make bless` renews it, if the version was raised or the results are bit-identical.
"""

import ast
import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.files import read_json, sha256_of
from pipeline.running.stage import Stage

ROOT = Path(__file__).parents[2]
LOCK = Path(__file__).parent / "values.lock"
INERT = ("pipeline/running/", "pipeline/reporting/", "pipeline/files.py", "pipeline/errors.py", "pipeline/lookup.py")
"""What decides where a result lies, how it is shown and what an error says, and never what it is."""


def version_of(stage: Stage, named: Iterable[str] = ()) -> int | str:
    """The stage's version; with a mark of the code where that is not what the version was given for.

    named: the files of the losses, datasets and so on that the experiment names, which may be the user's own.
    """
    locked = _lock().get(stage.name, {})
    files = locked.get("files", {})
    now = {file: _sha256(file) for file in files}
    if now != files or locked.get("version") != stage.version:
        now = files_of(stage, named)
    elif own := set(named) - files.keys():
        now = {file: digest for file, digest in imported(own).items() if file not in files}
    else:
        return stage.version
    return f"{stage.version}+{hashlib.sha256(repr(sorted(now.items())).encode()).hexdigest()[:8]}"


def files_of(stage: Stage, named: Iterable[str] = ()) -> dict[str, str]:
    """Of each of our files that the stage imports, directly or not, and that can change its result: the SHA-256."""
    return imported([_file(stage.module), *named])


def imported(files: Iterable[str]) -> dict[str, str]:
    """Of these files and all of ours that they import, directly or not, and that can change a result: the SHA-256."""
    found: set[str] = set()
    waiting = list(files)
    while waiting:
        file = waiting.pop()
        if file in found or not (ROOT / file).is_file() or file.startswith(INERT):
            continue
        found.add(file)
        imports, folders = _asked_for((ROOT / file).read_text(encoding="utf-8"))
        waiting += imports
        for folder in folders:
            waiting += [path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline" / folder).glob("*.py")]
    return {file: sha256_of(ROOT / file) for file in sorted(found)}


@cache
def _asked_for(source: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files that a source could import, and the folders in which it looks for functions by their names."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [_file(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [_file(node.module), *(_file(f"{node.module}.{alias.name}") for alias in node.names)]
    return tuple(found), tuple(re.findall(r'find\("(\w+)"', source))


def _file(module: str) -> str:
    return f"{module.replace('.', '/')}.py"


@cache
def _lock() -> dict[str, Any]:
    return dict(read_json(LOCK)) if LOCK.exists() else {}


@cache
def _sha256(file: str) -> str:
    return sha256_of(ROOT / file) if (ROOT / file).is_file() else "missing"
