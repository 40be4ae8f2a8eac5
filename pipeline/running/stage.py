"""What the runner has to know of a stage before it loads it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    name: str
    module: str
    version: int
    """Raised by hand when the code changes a result; `make bless` tells."""
    reads: tuple[str, ...]
    """The sections of the experiment that `run` is given, and no others."""
    help: str
    needs: tuple[str, ...] = ()
    on_the_way: bool = False
    """Made from finished stages alone, without teacher or raw data: run when a stage that needs it is asked for."""
    parallel: bool = False
    """Started as several processes (accelerate launch), all take part; of another stage only the first does the work."""
    several: bool = False
    """Any number of processes, each started by itself, may do its pieces together."""
    pieces: str | None = None
    """A module whose `keys` says what each piece is made from, so that pieces of other runs can be taken over."""
    not_in_pieces: tuple[str, ...] = ()
    """Settings that say which input there is and how it is cut: no piece depends on them other than through its own input."""
    if_live: bool = False
    """Only where a benchmark asks the teacher what its cache cannot answer."""
    same_as: str | None = None
    """The stage whose work and folder this is, with the experiment's settings without the teacher."""

    @property
    def folder(self) -> str:
        return self.same_as or self.name
