"""Who works on what, so that several processes, on one machine or on many with a common folder, do not do the same work.

A claim is a small file that its process touches up now and then. Nothing is believed because of a claim: what is finished
is decided by commits alone, and two that work on the same thing lose time and nothing else.
"""

import json
import os
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.files import HOST, UNFINISHED, is_running, name_if_absent

BEAT = 30.0
"""Seconds between two signs of life."""
STALE = 120.0
"""Seconds without one after which a claim of another machine (or of a stopped process) is taken over."""


OWNERS: set[str] = set()
"""All that this process has claimed under: in a container a process that was killed often has its number."""


class Claims:
    """This process's claims in a folder; all are let go of when the block ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._me = uuid.uuid4().hex
        OWNERS.add(self._me)
        self._held: set[str] = set()
        self._seen: dict[str, tuple[str, float]] = {}
        """What another's claim said when it last changed, and when that was by our own clock: no two clocks are compared."""
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, daemon=True)

    def take(self, name: str) -> bool:
        """Claim a thing; False where another has."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            temporary = self._temporary()
            try:
                self._write(temporary, 0)
                if not name_if_absent(temporary, self._folder / name):
                    if not self._is_left_behind(name):
                        return False
                    os.replace(temporary, self._folder / name)
                    if self._of(name).get("owner") != self._me:
                        return False  # somebody else was a moment later
            finally:
                temporary.unlink(missing_ok=True)
            self._held.add(name)
        return True

    def take_in_time(self, name: str) -> bool:
        """Like `take`, but waits to see whether another machine's process (or this one's, before it was started again) is alive."""
        before = self._read(name)
        while not self.take(name):
            if self._lives(name, before):
                return False
            time.sleep(STALE / 100)
        return True

    def living(self) -> list[str]:
        """The names that processes which are alive hold; waits where that cannot be told at once."""
        before = {file.name: self._read(file.name) for file in self._folder.glob("[!.]*")}
        while names := [file.name for file in self._folder.glob("[!.]*") if file.name not in self._held and not self._is_left_behind(file.name)]:
            if sure := [name for name in names if self._lives(name, before.get(name, ""))]:
                return sorted(sure)
            time.sleep(STALE / 100)
        return []

    def holds(self, name: str) -> bool:
        return name in self._held

    def still_holds(self, name: str) -> bool:
        """Whether nobody has taken it over since."""
        return name in self._held and self._of(name).get("owner") == self._me

    def release(self, name: str) -> None:
        with self._lock:
            self._held.discard(name)
            if self._of(name).get("owner") == self._me:
                (self._folder / name).unlink(missing_ok=True)

    def __enter__(self) -> "Claims":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()
        for name in list(self._held):
            self.release(name)

    def _is_left_behind(self, name: str) -> bool:
        text = self._read(name)
        try:
            of = json.loads(text)
            if of["host"] == HOST and not _runs_here(of):
                return True
        except (ValueError, TypeError, KeyError):
            pass  # not ours to understand; if it stays so, its owner is gone
        before, since = self._seen.get(name, ("", 0.0))
        if name not in self._seen or before != text:
            self._seen[name] = (text, time.monotonic())
            return False
        return time.monotonic() - since >= STALE

    def _lives(self, name: str, before: str) -> bool:
        """Whether a claim is of a running process of this machine, or has changed."""
        of = self._of(name)
        return (of.get("host") == HOST and _runs_here(of)) or self._read(name) not in (before, "")

    def _keep_alive(self) -> None:
        beats = 0
        while not self._end.wait(BEAT):
            beats += 1
            with self._lock:
                for name in list(self._held):
                    with suppress(OSError):
                        if self._of(name).get("owner") == self._me:
                            self._write(self._temporary(), beats)
                            os.replace(self._temporary(), self._folder / name)

    def _of(self, name: str) -> dict[str, Any]:
        try:
            return dict(json.loads(self._read(name)))
        except ValueError:
            return {}

    def _read(self, name: str) -> str:
        try:
            return (self._folder / name).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def _temporary(self) -> Path:
        return self._folder / f"{UNFINISHED}{HOST}-{os.getpid()}-{self._me}"

    def _write(self, file: Path, beats: int) -> None:
        text = json.dumps({"owner": self._me, "host": HOST, "process": str(os.getpid()), "beats": beats})
        file.write_text(text, encoding="ascii")


def _runs_here(of: dict[str, Any]) -> bool:
    """Whether a claim of this machine is of a process that is there."""
    return of.get("owner") in OWNERS if of["process"] == str(os.getpid()) else is_running(str(of["process"]))
