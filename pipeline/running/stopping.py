"""A machine that is about to be taken away says so with SIGTERM: the work ends at once, or where it asks to."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pipeline.errors import Stopped

T = TypeVar("T")
_asked = False
_later = False


@contextmanager
def stops_when_asked() -> Iterator[None]:
    """Within the block SIGTERM raises Stopped: between two lines, or after the tensor operation that runs."""
    global _asked, _later
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked = _later = False
    before = signal.signal(signal.SIGTERM, _on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def one_by_one(items: Iterable[T]) -> Iterator[T]:
    """The items; while they are gone through SIGTERM is only remembered, and who goes through them looks whether it was `asked`."""
    global _later
    _later = True
    try:
        yield from items
    finally:
        _later = False


def asked() -> bool:
    """Whether SIGTERM has come."""
    return _asked


def _on_signal(number: int, frame: object) -> None:
    global _asked
    _asked = True
    if not _later:
        raise Stopped
