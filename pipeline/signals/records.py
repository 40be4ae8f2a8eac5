"""Records and tokens: the values that everything else is about.

Letters for shapes, used throughout:
    B  rows of a batch              L, T  tokens of a record, of a padded row
    P  described positions          N     positions of several records, flat
    V  vocabulary                   K     kept tokens of a position
    S  stored temperatures          C     student tokens that a projected target gives mass to

Content coordinates: the content of a record is the UTF-8 bytes of its segments' texts joined. Every token of every
tokenizer covers a byte span of it; what a template adds covers none. L tokens have L-1 next-token distributions;
position t predicts token t+1.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

ROLES = ("system", "context", "user", "assistant")
TEMPLATE, CONTENT, ANSWER, END = range(4)
"""What a token is: of the template; of the content; of an answer (assistant content); the special token that ends an answer."""


@dataclass(frozen=True)
class Segment:
    role: str
    text: str


@dataclass(frozen=True)
class Record:
    id: str
    segments: tuple[Segment, ...]
    source: str = ""
    specialty: str | None = None
    split: str = "train"
    group: str | None = None
    """Records of one group (all questions about one thing) go into the same split."""
    weight: float = 1.0
    options: tuple[str, ...] | None = None
    answer_index: int | None = None
    choice_of: str | None = None
    """The id of the question that this record answers with one of its options."""

    @property
    def content(self) -> bytes:
        return "".join(segment.text for segment in self.segments).encode()

    def digest(self) -> str:
        """SHA-256 over what is asked and answered; equal records have equal digests."""
        parts = [f"{segment.role}\0{segment.text}" for segment in self.segments] + list(self.options or ())
        return hashlib.sha256("\1".join(parts).encode()).hexdigest()

    def question_digest(self) -> str:
        """SHA-256 over what is asked alone, whatever the spacing and the case."""
        asked = [" ".join(segment.text.casefold().split()) for segment in self.segments if segment.role != "assistant"]
        return hashlib.sha256("\1".join(asked).encode()).hexdigest()

    def choices(self) -> list["Record"]:
        """One record per option, with the option as the answer; the record itself where it already answers with that option."""
        *before, last = self.segments
        return [
            self if option == last.text else replace(self, id=f"{self.id}#choice{i}", segments=(*before, Segment("assistant", option)), choice_of=self.id, options=None, answer_index=None)
            for i, option in enumerate(self.options or ())
        ]


@dataclass(frozen=True)
class Tokens:
    """A record as one tokenizer and template render it."""

    ids: np.ndarray  # int32 [L]
    start: np.ndarray  # int32 [L] first content byte that the token covers
    end: np.ndarray  # int32 [L] one past the last; equal to start for the template's tokens
    kind: np.ndarray  # uint8 [L] TEMPLATE, CONTENT, ANSWER or END
    lead: np.ndarray  # int64 [L] the template's bytes at the beginning of a content token (" " of " yes"), as a number; 0: none

    def __len__(self) -> int:
        return len(self.ids)

    def answer_positions(self) -> np.ndarray:
        """int32 [P]: the positions whose NEXT token belongs to an answer or ends one."""
        return np.flatnonzero(self.kind[1:] >= ANSWER).astype(np.int32)

    def answer_bytes(self) -> int:
        """Bytes of all answers."""
        answer = self.kind == ANSWER
        return int((self.end[answer] - self.start[answer]).sum())


def lead_as_number(lead: bytes) -> int:
    """A number that tells template bytes apart: equal exactly if the bytes are (up to their last six)."""
    return int.from_bytes(b"\1" + lead[-6:], "big") if lead else 0


def number_as_lead(number: int) -> bytes:
    """The (last six) bytes that a lead's number is of."""
    return number.to_bytes(8, "big").lstrip(b"\0")[1:] if number else b""
