"""What a disk may hold after a loss of power: a log of what a process wrote, and every state that the log allows.

The model is harsher than any file system. The bytes of a file are safe once that file was synced; before, they may be
lost, cut, zeros, or all there. What a folder names (a new file, a link, a new name, a removal) is safe once that folder
was synced; before, any part of it may have happened, in whatever order it was done. A file's sync does nothing for its name.
"""

import itertools
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

FORK = multiprocessing.get_context("fork")
CHANGES = {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink"}
"""What Python announces (sys.addaudithook) before it does something to a file or a folder."""


def in_child(function: Callable[[Callable[[Any], None]], Any]) -> Any:
    """What a function gives, called in a forked process. It gets a function that ends the process at once, with a value."""
    ours, theirs = FORK.Pipe(duplex=False)

    def end(value: Any) -> None:
        theirs.send(value)
        os._exit(0)

    process = FORK.Process(target=lambda: end(function(end)))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        process.join()


class Thing(NamedTuple):
    """A file or a folder, whatever its names are."""

    number: int
    is_folder: bool


TOP = Thing(0, True)
"""The folder that is looked at."""


class Step(NamedTuple):
    kind: str
    """names (of a folder), bytes (of a file), sync, or note."""
    thing: Thing
    where: str
    """The thing's path, or the text of a note."""
    value: Any = None
    """What has changed of the names (name -> thing or None), or all bytes."""


@dataclass
class Log:
    """What is done under a folder, in order. What lies there at the beginning is safe."""

    root: Path
    steps: list[Step] = field(default_factory=list)
    folders: dict[Thing, dict[str, Thing]] = field(default_factory=dict)
    """At the beginning."""
    files: dict[Thing, bytes] = field(default_factory=dict)
    """At the beginning."""
    _count: int = 0
    _inodes: dict[int, Thing] = field(default_factory=dict)
    _names: dict[Thing, dict[str, Thing]] = field(default_factory=dict)
    _bytes: dict[Thing, bytes] = field(default_factory=dict)
    _places: dict[Thing, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._inodes[self.root.stat().st_ino] = TOP
        self.look()
        self.steps.clear()
        self.folders, self.files = self._names, self._bytes

    def look(self) -> None:
        """Put down what has changed since the last look."""
        inodes: dict[int, Thing] = {}
        names: dict[Thing, dict[str, Thing]] = {}
        contents: dict[Thing, bytes] = {}
        places: dict[Thing, str] = {}

        def visit(path: str, where: str) -> Thing:
            inode = os.stat(path).st_ino
            if inode not in self._inodes:
                self._count += 1
                self._inodes[inode] = Thing(self._count, os.path.isdir(path))
            thing = inodes[inode] = self._inodes[inode]
            places[thing] = where
            if thing.is_folder:
                names[thing] = {name: visit(f"{path}/{name}", f"{where}/{name}".lstrip("/")) for name in sorted(os.listdir(path))}
            else:
                contents[thing] = Path(path).read_bytes()
            return thing

        visit(str(self.root), "")
        for folder, now in names.items():
            before = self._names.get(folder, {})
            changed = {name: now.get(name) for name in before | now if before.get(name) != now.get(name)}
            assert len(changed) <= 2 or not self._names, f"more than one thing was done at once: {changed}"
            if changed:
                self.steps.append(Step("names", folder, places[folder], changed))
        for file, data in contents.items():
            if data != self._bytes.get(file, b""):
                self.steps.append(Step("bytes", file, places[file], data))
        self._inodes, self._names, self._bytes, self._places = inodes, names, contents, places  # a number that is free may be taken by another file

    def sync(self, handle: int) -> None:
        thing = self._inodes.get(os.fstat(handle).st_ino)
        if thing:
            self.steps.append(Step("sync", thing, self._places[thing]))

    def note(self, text: str) -> None:
        self.look()
        self.steps.append(Step("note", TOP, text))

    def without(self, left_out: Callable[[Step], bool]) -> "Log":
        """The log of a writer that leaves some syncs out."""
        steps = [step for step in self.steps if not (step.kind == "sync" and left_out(step))]
        assert len(steps) < len(self.steps)
        log = Log(self.root)
        log.steps, log.folders, log.files = steps, self.folders, self.files
        return log


def recorded(log: Log, act: Callable[[Log], None], killed_at: int | None = None) -> Log:
    """The log, longer by what `act` does in a process of its own; killed once the log has so many steps, or when it ends."""

    def child(end: Callable[[Any], None]) -> Log:
        looking, real = False, os.fsync

        def look() -> None:
            nonlocal looking
            looking = True
            log.look()
            looking = False
            if killed_at is not None and len(log.steps) >= killed_at:
                end(log)

        def sync(handle: int) -> None:
            look()
            real(handle)
            log.sync(handle)

        def announced(event: str, _: Any) -> None:
            if event in CHANGES and not looking:
                look()

        os.fsync = os.fdatasync = sync
        sys.addaudithook(announced)
        act(log)
        look()
        return log

    return in_child(child)


def notes(log: Log, moment: int) -> list[str]:
    return [step.where for step in log.steps[:moment] if step.kind == "note"]


class Unsynced(NamedTuple):
    folders: dict[Thing, dict[str, Thing]]
    files: dict[Thing, bytes]
    names: list[Step]
    """Changes of names that the disk may have or not."""
    bytes: dict[Thing, list[Step]]


def unsynced(log: Log, moment: int) -> Unsynced:
    """What is safe after so many steps, and what is not."""
    at = Unsynced({thing: dict(names) for thing, names in log.folders.items()}, dict(log.files), [], {})
    for step in log.steps[:moment]:
        if step.kind == "names":
            at.names.append(step)
        elif step.kind == "bytes":
            at.bytes.setdefault(step.thing, []).append(step)
        elif step.kind == "sync" and step.thing.is_folder:
            for change in [change for change in at.names if change.thing == step.thing]:
                _name(at.folders.setdefault(step.thing, {}), change.value)
                at.names.remove(change)
        elif step.kind == "sync" and step.thing in at.bytes:
            at.files[step.thing] = at.bytes.pop(step.thing)[-1].value
    return at


def _name(names: dict[str, Thing], changed: dict[str, Thing | None]) -> None:
    for name, thing in changed.items():
        if thing is None:
            names.pop(name, None)
        else:
            names[name] = thing


def states(log: Log, moment: int, most: int, draw: random.Random, aside: str) -> Iterator[dict[str, bytes | None]]:
    """What the disk may hold if the power goes after so many steps: path -> bytes, or None for a folder. Each state once.

    All states if there are no more than `most`, otherwise that many by draw. aside: the name of a folder in which
    everything is drawn, so that what does not matter does not crowd out what does.
    """
    at = unsynced(log, moment)
    choices: list[tuple[Step, list[Any]]] = [(change, [False, True]) for change in at.names]
    for file, versions in at.bytes.items():
        last = versions[-1].value
        forms = [at.files.get(file, b""), b"", last[: len(last) // 2], bytes(len(last)), *(version.value for version in versions)]
        choices.append((versions[-1], list(dict.fromkeys(forms))))
    drawn, told = [], []
    for choice in choices:
        (drawn if aside in choice[0].where.split("/") else told).append(choice)
    total = 1
    for _, forms in told:
        total *= len(forms)
    if total <= most:
        picks: Iterator[tuple[Any, ...]] = itertools.product(*(forms for _, forms in told))
    else:
        ends = [tuple(forms[end] for _, forms in told) for end in (0, -1)][: most - 1]
        picks = iter(ends + [tuple(draw.choice(forms) for _, forms in told) for _ in range(most - len(ends))])
    seen = set()
    for pick in picks:
        rest = tuple(draw.choice(forms) for _, forms in drawn)
        taken = list(zip([step for step, _ in told + drawn], pick + rest, strict=True))
        tree = _tree(log, at, [change for change, done in taken if done is True], {step.thing: form for step, form in taken if step.kind == "bytes"})
        if (key := tuple(sorted(tree.items()))) not in seen:
            seen.add(key)
            yield tree


def _tree(log: Log, at: Unsynced, names: list[Step], contents: dict[Thing, bytes]) -> dict[str, bytes | None]:
    folders = {thing: dict(entries) for thing, entries in at.folders.items()}
    for change in sorted(names, key=at.names.index):
        _name(folders.setdefault(change.thing, {}), change.value)
    tree: dict[str, bytes | None] = {}

    def visit(folder: Thing, where: str) -> None:
        for name, thing in folders.get(folder, {}).items():
            tree[f"{where}{name}"] = None if thing.is_folder else contents.get(thing, at.files.get(thing, b""))
            if thing.is_folder:
                visit(thing, f"{where}{name}/")

    visit(TOP, "")
    return tree


def build(root: Path, tree: dict[str, bytes | None]) -> None:
    for where, data in tree.items():
        if data is None:
            (root / where).mkdir()
        else:
            (root / where).write_bytes(data)
