"""A stage without a model: pieces whose bytes are a function of their names, written as any stage writes them."""

import hashlib
import os
import random
import sys
import time
from pathlib import Path

from pipeline.files import appears_whole
from pipeline.running import claims, folder
from pipeline.running.fingerprint import fingerprint
from pipeline.running.folder import FinishedFolder, RunFolder

IDENTITY = {"stage": "worker", "version": 1, "sections": {}, "needs": {}}


def content(name: str, salt: str = "") -> bytes:
    return hashlib.sha256(f"{name}{salt}".encode()).digest() * 50


def file_of(name: str) -> str:
    return f"bytes-{name}.bin"


def names_of(count: int) -> list[str]:
    return [f"{number:05d}" for number in range(count)]


def work(path: Path, count: int, salt: str = "", slow: float = 0.0, log: Path | None = None) -> None:
    """Make the pieces that are missing, and finish the folder. log: a line for each piece that was made."""
    out = RunFolder(path, writers="several")
    try:
        out.plan("shards", count)
        for name in out.pieces(names_of(count)):
            time.sleep(random.random() * slow)
            if log:
                with log.open("a") as lines:
                    lines.write(f"{name}\n")
            try:
                with appears_whole(path / file_of(name), absent=True) as temporary:
                    temporary.write_bytes(content(name, salt))
                out.commit(name, {file_of(name): {}})
            except FileExistsError:
                digest = hashlib.sha256(content(name, salt)).hexdigest()
                out.agree(name, {file_of(name): {"sha256": digest}})
        out.seal("worker", fingerprint(IDENTITY), IDENTITY, {}, {"pieces": count}, {})
    finally:
        out.close()


def is_whole(path: Path, count: int) -> bool:
    finished = FinishedFolder(path)
    return all(finished.file(file_of(name)).read_bytes() == content(name) for name in names_of(count)) and len(finished.manifest["files"]) == count


def believed(path: Path, count: int) -> list[str]:
    """The pieces that a resuming stage would take for done."""
    out = RunFolder(path, writers="none")
    try:
        return [name for name in names_of(count) if out.stands(name)]
    finally:
        out.close()


if __name__ == "__main__":
    claims.BEAT, claims.STALE, folder.POLL = 0.05, 0.4, 0.02
    random.seed(os.getpid())
    work(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:4], slow=float(sys.argv[4]) if len(sys.argv) > 4 else 0.0)
