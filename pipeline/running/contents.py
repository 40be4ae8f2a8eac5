"""What the files and models that an experiment names contain, as hashes, remembered in <runs>/inputs.json.

A thing is hashed again only when its device, inode, size, mtime or ctime changed. When it is no longer there, the
remembered hash stands for it, so that what was built from it is still found.
"""

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import DamageError, InputError
from pipeline.files import as_json, files_named, read_json, sha256_of, sync, write_json
from pipeline.files import stats as file_stats
from pipeline.running.folder import FinishedFolder

NOT_TOKENIZER = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|index\.json)|(generation_|adapter_)?config\.json")
CHOOSES_TOKENIZER = ("model_type", "tokenizer_class")
"""What a model's config.json says that decides which class reads the tokenizer's files."""
NOT_CONTENT = re.compile(r"(\..*|.*\.md)")


@dataclass
class Seen:
    """What has been looked at, and what was found then."""

    stats: dict[Path, list[int]] = field(default_factory=dict)
    listings: dict[str, tuple[Callable[[], list[Path]], list[Path]]] = field(default_factory=dict)
    """Which files a folder has or a glob matches: how to list them again, and the list."""

    def changed(self) -> list[Path]:
        """The files that are no longer what they were, are gone or have been added."""
        found = [file for listed, before in self.listings.values() for file in set(listed()) ^ set(before)]
        for file, before in self.stats.items():
            try:
                if file_stats(file) != before:
                    found.append(file)
            except OSError:
                found.append(file)
        return found


class Contents:
    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self.seen = Seen()
        self._file = runs / "inputs.json"
        self._remembered = self._read()

    def _read(self) -> dict[str, Any]:
        """Nothing if the file is not what was written: then all is hashed anew."""
        try:
            there = read_json(self._file)
            return dict(there["inputs"]) if there["self"] == _self_hash(there["inputs"]) else {}
        except (FileNotFoundError, DamageError, TypeError, KeyError):
            return {}

    def of_files(self, pattern: str) -> str:
        """Of one file, or of all files that a glob matches, in the order of their names."""
        return self._of("files", pattern, lambda: files_named(pattern), lambda file: str(file))

    def of_model(self, model: str, revision: str | None) -> str:
        """Of a hub model its commit; of a folder (or a finished student) its files."""
        refuse_folder(model, revision)
        return f"hub:{model}@{revision}" if revision else self._of_folder("model", model)

    def of_tokenizer(self, model: str, revision: str | None) -> str:
        """Like of_model, of what shapes its tokens alone: students that share a tokenizer share what is made for it."""
        refuse_folder(model, revision)
        return f"hub:{model}@{revision}" if revision else self._of_folder("tokenizer", model)

    def of_finished(self, folder: str) -> str:
        """Of a finished run's folder its root: what its manifest says of every file."""
        place, key = Path(folder).expanduser(), f"finished:{folder}"
        if not (place / "manifest.json").exists():
            if before := self._remembered.get(key):
                return str(before["content"])
            raise InputError(f"No finished folder is at {folder}: it has no manifest.json. Give <runs>/<stage>/<fingerprint>, as `pipeline status` shows it.")
        content = FinishedFolder(place).root
        if self._remembered.get(key) != {"content": content}:
            self._remembered[key] = {"content": content}
            self._write()
        return content

    def _of_folder(self, kind: str, model: str) -> str:
        folder = model_folder(model, self._runs)
        chooses = folder / "config.json"

        def files() -> list[Path]:
            there = [file for file in _files_in(folder) if not any(NOT_CONTENT.fullmatch(part) for part in file.relative_to(folder).parts)]
            return [file for file in there if not NOT_TOKENIZER.fullmatch(file.name)] if kind == "tokenizer" else there

        return self._of(kind, model, files, lambda file: file.relative_to(folder).as_posix(), chooses if kind == "tokenizer" and chooses.is_file() else None)

    def _of(self, kind: str, name: str, listed: Callable[[], list[Path]], relative: Callable[[Path], str], chooses: Path | None = None) -> str:
        key = f"{kind}:{name}"
        before = self._remembered.get(key)
        files = listed()
        if not files:
            if before:
                return str(before["content"])
            raise InputError(_not_there(kind, name))
        watched = [*files, chooses] if chooses else files
        stats = {relative(file): file_stats(file) for file in watched}
        if not before or before["stats"] != stats:
            for file in watched:
                with suppress(OSError):
                    sync(file)  # what is written through a map from now on has a new time
            stats = {relative(file): file_stats(file) for file in watched}
        self.seen.stats |= {file: stats[relative(file)] for file in watched}
        self.seen.listings[key] = (listed, files)
        if before and before["stats"] == stats:
            return str(before["content"])
        digest = hashlib.sha256()
        for file in files:
            inner_name = "" if kind == "files" else relative(file)
            digest.update(f"{inner_name}\0{sha256_of(file)}\n".encode())
        if chooses:
            said = read_json(chooses, links=True)
            digest.update(repr([said.get(key) for key in CHOOSES_TOKENIZER]).encode())
        if self.seen.changed():
            raise InputError(f"{name} changed while it was read. Run the command again when nobody writes to it.")
        size = sum(file.stat().st_size for file in files)
        self._remembered[key] = {"content": f"sha256:{digest.hexdigest()}", "size": size, "stats": stats}
        self._write()
        return str(self._remembered[key]["content"])

    def _write(self) -> None:
        write_json(self._file, {"inputs": self._remembered, "self": _self_hash(self._remembered)})


def _self_hash(value: Any) -> str:
    return hashlib.sha256(as_json(value).encode()).hexdigest()


def refuse_folder(name: str, revision: str | None) -> None:
    """InputError where a folder would be read instead of the hub."""
    if revision and Path(name).exists():
        raise InputError(f"{name} with a `revision` is of the hub, but a folder of that name is here and would be read instead. Leave out `revision`, or run the command elsewhere.")


def _files_in(folder: Path) -> list[Path]:
    """Also those in linked folders, as transformers finds them."""
    found: list[Path] = []
    entered: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        entered.add(os.path.realpath(place))
        folders[:] = [name for name in folders if os.path.realpath(Path(place, name)) not in entered]
        found += [Path(place, name) for name in names]
    return sorted(file for file in found if file.is_file())


def model_folder(model: str, runs: Path) -> Path:
    """Where a model without a revision lies: a folder, or the finished student of run:train-student/FINGERPRINT."""
    if model.startswith("run:"):
        return runs / model.removeprefix("run:") / "student"
    return Path(model).expanduser()


def _not_there(kind: str, name: str) -> str:
    if kind == "files":
        if name.startswith("package:"):
            return f"{name} is not there. Install the package with pip, or give `path` as a file of your own."
        return f"No file is at {name}. `path` is taken from the folder you run the command in."
    return f"No model folder is at {name}. Give an existing folder, or a hub id together with `revision` (the commit, 40 hexadecimal digits)."
