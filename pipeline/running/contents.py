"""What the files and models that an experiment names contain, as hashes, remembered in <runs>/inputs.json.

A thing is hashed again only when its device, inode, size, mtime or ctime changed. When it is no longer there, the
remembered hash stands for it, so that what was built from it is still found.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from pipeline.errors import DamageError, InputError
from pipeline.files import files_named, read_json, sha256_of, write_json
from pipeline.files import stats as file_stats

TOKENIZER_FILES = re.compile(r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template.*|.*\.model)")
NOT_CONTENT = re.compile(r"(\..*|.*\.md)")


class Contents:
    def __init__(self, runs: Path) -> None:
        self._runs = runs
        self._file = runs / "inputs.json"
        self._remembered: dict[str, Any] = read_json(self._file) if self._file.exists() else {}
        if not isinstance(self._remembered, dict) or not all(isinstance(entry, dict) and {"content", "stats"} <= entry.keys() for entry in self._remembered.values()):
            raise DamageError(f"{self._file} is damaged. Remove it: what is still there is hashed anew.")

    def of_files(self, pattern: str) -> str:
        """Of one file, or of all files that a glob matches, in the order of their names."""
        return self._of("files", pattern, files_named(pattern), lambda file: str(file))

    def of_model(self, model: str, revision: str | None) -> str:
        """Of a hub model its commit; of a folder (or a finished student) its files."""
        return f"hub:{model}@{revision}" if revision else self._of_folder("model", model)

    def of_tokenizer(self, model: str, revision: str | None) -> str:
        """Like of_model, of the tokenizer's files alone: students that share a tokenizer share what is made for it."""
        return f"hub:{model}@{revision}" if revision else self._of_folder("tokenizer", model)

    def _of_folder(self, kind: str, model: str) -> str:
        folder = model_folder(model, self._runs)
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()] if folder.is_dir() else []
        wanted = TOKENIZER_FILES if kind == "tokenizer" else re.compile(".*")
        files = [file for file in files if wanted.fullmatch(file.name) and not NOT_CONTENT.fullmatch(file.name)]
        return self._of(kind, model, files, lambda file: file.relative_to(folder).as_posix())

    def _of(self, kind: str, name: str, files: list[Path], relative: Any) -> str:
        key = f"{kind}:{name}"
        before = self._remembered.get(key)
        if not files:
            if before:
                return str(before["content"])
            raise InputError(_not_there(kind, name))
        stats = {relative(file): file_stats(file) for file in files}
        if before and before["stats"] == stats:
            return str(before["content"])
        digest = hashlib.sha256()
        for file in files:
            inner_name = "" if kind == "files" else relative(file)
            digest.update(f"{inner_name}\0{sha256_of(file)}\n".encode())
        if any(file_stats(file) != stats[relative(file)] for file in files):
            raise InputError(f"{name} changed while it was read. Run the command again when nobody writes to it.")
        size = sum(file.stat().st_size for file in files)
        self._remembered[key] = {"content": f"sha256:{digest.hexdigest()}", "size": size, "stats": stats}
        write_json(self._file, self._remembered)
        return str(self._remembered[key]["content"])


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
