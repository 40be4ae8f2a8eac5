"""What a model has answered so far in a stage that is not finished: after a kill only the rest is asked."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.running.folder import RunFolder

EVERY = 5.0
"""Seconds between two commits."""


class Answers:
    """Values by key, each kept in a commit without files; the manifest does away with them. Only for a sole writer.

    progress: makes what tells how far it is (reporting.Progress).
    """

    def __init__(self, out: RunFolder, model: str, progress: Callable[[str, int, int, str], Any] | None = None) -> None:
        self._out, self._model, self._prefix, self._progress = out, model, f"answers-{model}-", progress
        self._names = [name for name in out.committed() if name.startswith(self._prefix)]
        self._known: dict[str, Any] = {}
        for name in self._names:
            self._known |= out.info(name)["answers"]
        self._new: dict[str, Any] = {}
        self._since = time.monotonic()

    def __call__(self, keys: Sequence[str], ask: Callable[[list[int]], list[Any]], at_once: int) -> list[Any]:
        """All values, in order. ask: gives those of the keys at these places; it is asked for so many at a time, those that are known left out.

        Which are asked for together depends on the keys alone, so that a stage that was killed asks the same together as one that was not.
        """
        known = sum(key in self._known for key in keys)
        progress = self._progress(f"{self._out.path.parent.name}: {self._model}", len(keys), known, "answers") if self._progress else None
        try:
            for begin in range(0, len(keys), at_once):
                places = [place for place in range(begin, min(begin + at_once, len(keys))) if keys[place] not in self._known]
                for place, value in zip(places, ask(places) if places else [], strict=True):
                    self._known[keys[place]] = self._new[keys[place]] = value
                if places and progress:
                    progress.advance(len(places), 0)
                if time.monotonic() - self._since > EVERY:
                    self._commit()
        finally:
            if progress:
                progress.finish()
            self._commit()
        return [self._known[key] for key in keys]

    @property
    def known(self) -> dict[str, Any]:
        return dict(self._known)

    def _commit(self) -> None:
        if self._new:
            name = f"{self._prefix}n{len(self._names)}"
            self._out.commit(name, {}, answers=self._new)
            self._names.append(name)
            self._new = {}
        self._since = time.monotonic()
