"""From the teacher's word in its own vocabulary to a target in the student's.

A projection is linear: a share of each kept token's mass goes to one student token, what is left of it to the rest. Mass
is tempered before it is projected: projecting first would be another distribution.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.signals.alignment import align
from pipeline.signals.records import END, Tokens
from pipeline.signals.targets import Targets, rest_at, with_realised
from pipeline.signals.vocabulary import Vocabulary

REST = -1


@dataclass(frozen=True)
class Projection:
    """What a method in pipeline/projections/ gives."""

    student_id: np.ndarray  # int32 [V_teacher] the student token that receives a teacher token's mass; REST: none
    realised_path: bool = False
    """Place the realised teacher token by what followed it in the record, not by the map."""


@dataclass(frozen=True)
class Projected:
    """A record's targets at the student's positions. Flat lists: entries (kept teacher tokens) and columns (student tokens)."""

    position: np.ndarray  # int64 [P] the student's positions
    entries: np.ndarray  # int64 [P] entries per position
    logprobs: np.ndarray  # float32 [sum of entries]
    log_share: np.ndarray  # float32 [sum of entries] log of the share of its mass that is placed
    column: np.ndarray  # int64 [sum of entries] into column_ids; REST: not placed
    columns: np.ndarray  # int64 [P] columns per position
    column_ids: np.ndarray  # int32 [sum of columns] student tokens, ascending inside a position
    rests: np.ndarray  # float32 [S, P]
    unkept: np.ndarray  # int64 [P]


@dataclass(frozen=True)
class SparseTarget:
    """Distributions over C student tokens and one rest. Columns that a row does not need repeat one of its tokens with probability 0."""

    ids: Tensor  # int64 [N, C]
    probs: Tensor  # float32 [N, C]
    rest: Tensor  # float32 [N] the mass of all other tokens
    temperature: float

    def to(self, device: torch.device) -> "SparseTarget":
        return SparseTarget(self.ids.to(device), self.probs.to(device), self.rest.to(device), self.temperature)

    def top(self) -> Tensor:
        """int64 [N]: the student token with the most mass."""
        return self.ids.gather(-1, self.probs.argmax(-1, keepdim=True))[:, 0]


def project(projection: Projection, targets: Targets, temperatures: list[float], vocabulary_size: int, teacher: Tokens, student: Tokens) -> Projected:
    """The record's targets at every position where the two tokenizers meet.

    The realised token takes part everywhere, whether it was among the kept ones or not.
    vocabulary_size: the teacher's, without unused rows of its head.
    """
    at_teacher, at_student = align(teacher, student)
    row = np.searchsorted(targets.position, at_teacher)
    described = (row < len(targets.position)) & (np.append(targets.position, -1)[row] == at_teacher)
    at_teacher, at_student, row = at_teacher[described], at_student[described], row[described]

    targets = with_realised(targets, teacher.ids[targets.position + 1], temperatures)
    first = np.concatenate([[0], np.cumsum(targets.kept.astype(np.int64))])
    entries = targets.kept[row].astype(np.int64)
    owner = np.repeat(np.arange(len(row)), entries)
    flat = np.arange(entries.sum()) - np.repeat(np.cumsum(entries) - entries, entries) + first[row][owner]
    ids, logprobs = targets.ids[flat], targets.logprobs[flat]

    placed = projection.student_id[ids].astype(np.int64)
    log_share = np.zeros(len(ids), dtype=np.float32)
    if projection.realised_path:
        there, share = _realised(targets, teacher, student, at_teacher, at_student)
        is_realised = ids == teacher.ids[at_teacher + 1][owner]
        placed = np.where(is_realised, there[owner], placed)
        log_share = np.where(is_realised, share[owner], log_share).astype(np.float32)

    informative = np.bincount(owner[placed != REST], minlength=len(row)) > 0
    if not informative.all():  # nothing of it can be placed: that position says nothing
        inside = informative[owner]
        logprobs, placed, log_share = logprobs[inside], placed[inside], log_share[inside]
        at_student, row, entries = at_student[informative], row[informative], entries[informative]
        owner = np.repeat(np.arange(len(row)), entries)

    span = int(max(placed.max(initial=0), 0)) + 1
    keys, column = np.unique(np.where(placed == REST, -1, owner * span + placed), return_inverse=True)
    unplaced = int(len(keys) > 0 and keys[0] == -1)
    keys = keys[unplaced:]
    return Projected(
        position=at_student,
        entries=entries,
        logprobs=logprobs,
        log_share=log_share,
        column=column - unplaced,  # REST where not placed
        columns=np.bincount(keys // span, minlength=len(row)),
        column_ids=(keys % span).astype(np.int32),
        rests=targets.rests[:, row],
        unkept=vocabulary_size - entries,
    )


def _realised(targets: Targets, teacher: Tokens, student: Tokens, at_teacher: np.ndarray, at_student: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per pair: the student token that the realised teacher token belongs to, and the log of the share of its mass that does.

    A teacher token that reaches at least as far as the student's leads to it for certain. A shorter one leads to it if the
    text goes on as it did: with the probability of the teacher's further tokens up to the same byte. Where those end
    elsewhere the share is not known: REST.
    """
    realised, wanted = at_teacher + 1, at_student + 1
    logprob = np.full(len(teacher), np.nan)
    logprob[targets.position + 1] = targets.realised_logprob
    until = np.concatenate([[0.0], np.cumsum(np.nan_to_num(logprob))])
    unknown = np.concatenate([[0], np.cumsum(np.isnan(logprob))])
    last = np.searchsorted(teacher.end, student.end[wanted])  # the first teacher token that ends there or later
    last = np.maximum(np.minimum(last, len(teacher) - 1), realised)
    reaches = (teacher.end[realised] >= student.end[wanted]) | (teacher.kind[realised] == END)
    follows = (teacher.end[last] == student.end[wanted]) & (unknown[last + 1] == unknown[realised + 1])
    share = np.where(reaches, 0.0, np.minimum(until[last + 1] - until[realised + 1], 0.0))
    return np.where(reaches | follows, student.ids[wanted], REST), np.where(reaches | follows, share, 0.0)


def at_temperature(records: list[Projected], stored: list[float], temperature: float) -> SparseTarget:
    """The targets of several records (at least one position), flat, as distributions at one temperature >= 1.

    Placed and unplaced mass of a position sum to 1; what is not placed is in the rest. Computed in float64.
    """
    entries = np.concatenate([record.entries for record in records])
    n = len(entries)
    owner = np.repeat(np.arange(n), entries)
    scaled = np.concatenate([record.logprobs for record in records]).astype(np.float64) / temperature
    log_rest = np.concatenate([rest_at(record.rests, stored, record.unkept, temperature) for record in records])
    top = np.maximum(log_rest, np.maximum.reduceat(scaled, np.cumsum(entries) - entries))
    normaliser = top + np.log(np.bincount(owner, np.exp(scaled - top[owner]), n) + np.exp(log_rest - top))
    mass = np.exp(scaled - normaliser[owner])
    share = np.exp(np.concatenate([record.log_share for record in records]).astype(np.float64))

    columns = np.concatenate([record.columns for record in records])
    first = np.cumsum(columns) - columns
    starts = np.cumsum([0, *(len(record.column_ids) for record in records)])
    column = np.concatenate([np.where(r.column == REST, REST, r.column + s) for r, s in zip(records, starts[:-1], strict=True)])
    placed = column != REST
    flat = np.bincount(column[placed], (mass * share)[placed], starts[-1])
    rest = np.exp(log_rest - normaliser) + np.bincount(owner, np.where(placed, mass * (1 - share), mass), n)

    width = int(columns.max(initial=1))
    inside = np.arange(width)[None] < columns[:, None]  # [N, C]
    index = np.where(inside, first[:, None] + np.arange(width)[None], first[:, None])
    ids = np.concatenate([record.column_ids for record in records])[index]
    probs = np.where(inside, flat[index], 0.0)
    return SparseTarget(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(probs.astype(np.float32)), torch.from_numpy(rest.astype(np.float32)), temperature)


def specials_to_specials(teacher: Vocabulary, student: Vocabulary, student_id: np.ndarray) -> np.ndarray:
    """Let what ends an answer on the teacher's side end it on the student's; no other special token receives mass."""
    student_id[np.flatnonzero(teacher.special)] = REST
    for end in teacher.end_ids:
        student_id[end] = student.end_ids[0] if student.end_ids else REST
    return student_id
