"""A progress bar with tokens/s and time left on stderr; a plain line now and then where that is no terminal."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 20


class Progress:
    def __init__(self, what: str, total: int, done: int, unit: str, silent: bool = False) -> None:
        self._what, self._total, self._done, self._unit = what, total, done, unit
        self._begun = self._told = time.monotonic()
        self._first = done
        self._tokens = 0
        self._bar: Bar | None = None
        self._silent = silent
        console = Console(stderr=True)
        if console.is_terminal and not silent:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=console)
            self._task = self._bar.add_task(what, total=total, completed=done, speed="")
            self._bar.start()

    def advance(self, steps: int, tokens: int, note: str = "") -> None:
        self._done += steps
        self._tokens += tokens
        now = time.monotonic()
        seconds = max(now - self._begun, 1e-9)
        speed = f"{f'{self._tokens / seconds:,.0f} tokens/s ' if self._tokens else ''}{note}".rstrip()
        if self._bar:
            self._bar.update(self._task, completed=self._done, speed=speed)
            if self._done >= self._total:
                self.finish()
        elif not self._silent and (now - self._told > SECONDS_BETWEEN_LINES or self._done >= self._total):
            self._told = now
            left = seconds / (self._done - self._first) * (self._total - self._done)
            print(f"{self._what}: {self._done} of {self._total} {self._unit}, {f'{speed}, ' if speed else ''}{left:.0f} s left", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Nothing more will come."""
        if self._bar:
            self._bar.stop()
