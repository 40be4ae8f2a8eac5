"""How often each student token stands where a teacher token stands, counted where both begin one at the same byte."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pipeline.signals.alignment import align
from pipeline.signals.projection import REST
from pipeline.signals.ragged import runs
from pipeline.signals.records import END, Tokens


@dataclass(frozen=True)
class Counts:
    """Compressed sparse rows: of teacher token t the entries begin[t] to begin[t + 1]."""

    begin: np.ndarray  # int64 [V_teacher + 1]
    student_id: np.ndarray  # int32 [E] ascending inside a row
    count: np.ndarray  # int64 [E]

    @property
    def total(self) -> np.ndarray:
        """int64 [V_teacher]: how often each teacher token was seen."""
        return np.diff(np.concatenate([[0], np.cumsum(self.count)])[self.begin])

    @classmethod
    def of_pairs(cls, teacher_id: np.ndarray, student_id: np.ndarray, count: np.ndarray, teacher_size: int) -> "Counts":
        """Of three columns; equal pairs are summed up."""
        span = int(student_id.max(initial=0)) + 1
        keys, inverse = np.unique(teacher_id.astype(np.int64) * span + student_id, return_inverse=True)
        begin = np.searchsorted(keys // span, np.arange(teacher_size + 1))
        return cls(begin, (keys % span).astype(np.int32), np.bincount(inverse, count, len(keys)).astype(np.int64))

    def matrix(self, student_id: np.ndarray, least_count: int, least_share: float) -> "Matrix":
        """How each teacher token's mass is shared out: (n[s, t] + 1[s = student_id[t]]) / (n[t] + 1).

        A teacher token that was seen fewer than least_count times goes to student_id[t] [V_teacher] whole. Where that is REST there
        is no event to add: n[s, t] / n[t], or nothing. Shares below least_share go to the rest.
        """
        size = len(student_id)
        seen = self.total >= least_count
        entries = np.diff(self.begin)
        known = np.flatnonzero(student_id != REST)
        teacher = np.concatenate([np.repeat(np.arange(size), entries)[np.repeat(seen, entries)], known])
        student = np.concatenate([self.student_id[np.repeat(seen, entries)], student_id[known]]).astype(np.int64)
        weight = np.concatenate([self.count[np.repeat(seen, entries)].astype(np.float64), np.ones(len(known))])
        span = int(student.max(initial=0)) + 1
        keys, inverse = np.unique(teacher * span + student, return_inverse=True)
        weight = np.bincount(inverse, weight, len(keys))
        owner, to = keys // span, keys % span
        share = weight / np.bincount(owner, weight, size)[owner]
        large = share >= least_share
        owner, share, to = owner[large], share[large], to[large]
        left = 1 - np.bincount(owner, share, size)
        rest = np.flatnonzero(left > 1e-9)
        owner, share, to = np.concatenate([owner, rest]), np.concatenate([share, left[rest]]), np.concatenate([to, np.full(len(rest), REST)])
        order = np.lexsort((to, owner))
        return Matrix(np.searchsorted(owner[order], np.arange(size + 1)), to[order].astype(np.int32), np.log(share[order]).astype(np.float32))


@dataclass(frozen=True)
class Matrix:
    """Compressed sparse rows: how each teacher token's mass is shared out; the shares of a row sum to 1."""

    begin: np.ndarray  # int64 [V_teacher + 1]
    student_id: np.ndarray  # int32 [E]; REST: no token
    log_share: np.ndarray  # float32 [E]

    def of(self, teacher_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The shares of these tokens, flat: which of them each belongs to, and its index."""
        return runs(self.begin[teacher_id], self.begin[teacher_id + 1] - self.begin[teacher_id])

    def largest(self) -> tuple[np.ndarray, np.ndarray]:
        """Per teacher token the student token with the largest share (REST if it has none), and that share."""
        size = len(self.begin) - 1
        owner = np.repeat(np.arange(size), np.diff(self.begin))
        share = np.where(self.student_id == REST, 0.0, np.exp(self.log_share))
        order = np.lexsort((share, owner))
        to, top = np.full(size, REST, dtype=np.int32), np.zeros(size)
        to[owner[order]], top[owner[order]] = self.student_id[order], share[order]  # of several the last: the largest
        return to, top


def pairs_of(teacher: Tokens, student: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """The tokens (teacher's, student's) of a record that begin at the same byte of an answer; not what ends it."""
    at_teacher, at_student = align(teacher, student)
    text = (teacher.kind[at_teacher + 1] != END) & (student.kind[at_student + 1] != END)
    return teacher.ids[at_teacher[text] + 1], student.ids[at_student[text] + 1]


def counted(records: Iterable[tuple[Tokens, Tokens]], teacher_size: int) -> Counts:
    """records: (teacher's tokens, student's tokens)."""
    teacher_id, student_id = [], []
    for teacher, student in records:
        ours, theirs = pairs_of(teacher, student)
        teacher_id.append(ours)
        student_id.append(theirs)
    empty = [np.zeros(0, dtype=np.int32)]
    one, other = np.concatenate(teacher_id or empty), np.concatenate(student_id or empty)
    return Counts.of_pairs(one, other, np.ones(len(one), dtype=np.int64), teacher_size)
