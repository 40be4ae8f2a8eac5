"""From the teacher's word in its own vocabulary to a target in the student's.

A projection is linear: a share of each kept token's mass goes to one student token, what is left of it to the rest. Mass
is tempered before it is projected: projecting first would be another distribution.
"""

from dataclasses import dataclass, replace
from functools import cached_property

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

    @cached_property
    def is_identity(self) -> bool:
        """Every token is itself."""
        return not self.realised_path and bool((self.student_id == np.arange(len(self.student_id))).all())


@dataclass(frozen=True)
class Projected:
    """A record's targets at the student's positions. Flat lists: entries (kept teacher tokens) and columns (student tokens)."""

    position: np.ndarray  # int64 [P] the student's positions
    entries: np.ndarray  # int64 [P] entries per position
    logprobs: np.ndarray  # float32 [sum of entries]
    log_share: np.ndarray | None  # float32 [sum of entries] log of the share of its mass that is placed; None: all of it
    column: np.ndarray | None  # int64 [sum of entries] into column_ids; REST: not placed; None: each entry is a column
    columns: np.ndarray  # int64 [P] columns per position
    column_ids: np.ndarray  # int32 [sum of columns] student tokens, each once inside a position
    rests: np.ndarray  # float32 [S, P]
    unkept: np.ndarray  # int64 [P]
    hidden: tuple[np.ndarray, np.ndarray] | None = None  # int8 [P, H] and float32 [P]: the teacher's last states and their scales


@dataclass(frozen=True)
class SparseTarget:
    """Distributions over C student tokens and one rest. Columns that a row does not need repeat one of its tokens with probability 0.

    How the rest is shared out is the student's own affair, unless `log_ratio` or `log_tail` says otherwise.
    """

    ids: Tensor  # int64 [N, C]
    probs: Tensor  # float32 [N, C]
    rest: Tensor  # float32 [N] the mass of all other tokens
    temperature: float
    log_ratio: Tensor | None = None  # float32 [V] the student's own shares are multiplied by exp of it
    log_tail: Tensor | None = None  # float32 [N, V] the rest is shared out in proportion to exp of it

    def to(self, device: torch.device) -> "SparseTarget":
        tensors = {name: value.to(device) for name in ("ids", "probs", "rest", "log_ratio", "log_tail") if (value := getattr(self, name)) is not None}
        return replace(self, **tensors)

    def top(self) -> Tensor:
        """int64 [N]: the student token with the most mass."""
        return self.ids.gather(-1, self.probs.argmax(-1, keepdim=True))[:, 0]

    def log_shares(self, log_student: Tensor) -> Tensor | None:
        """float32 [N, V]: log of each other token's share of the rest; None: as the student has it.

        log_student: the student's log-shares of its own rest, very low for the target's tokens.
        """
        if self.log_ratio is not None:
            return (log_student + self.log_ratio).log_softmax(-1)
        if self.log_tail is not None:
            return self.log_tail.scatter(-1, self.ids, NO_SHARE).log_softmax(-1)
        return None


NO_SHARE = -1e9
"""The log of nothing, but finite."""


def project(projection: Projection, targets: Targets, temperatures: list[float], vocabulary_size: int, teacher: Tokens, student: Tokens) -> Projected:
    """The record's targets at every position where the two tokenizers meet.

    The realised token takes part everywhere, whether it was among the kept ones or not.
    vocabulary_size: the teacher's, without unused rows of its head.
    """
    if projection.is_identity and teacher is student and np.array_equal(targets.position, teacher.answer_positions()):
        return _as_it_is(with_realised(targets, teacher.ids[targets.position + 1], temperatures), vocabulary_size)
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
        hidden=None if targets.hidden is None or targets.hidden_scale is None else (targets.hidden[row], targets.hidden_scale[row]),
    )


def _as_it_is(targets: Targets, vocabulary_size: int) -> Projected:
    """With the same tokens in the same places there is nothing to do."""
    entries = targets.kept.astype(np.int64)
    return Projected(
        position=targets.position.astype(np.int64),
        entries=entries,
        logprobs=targets.logprobs,
        log_share=None,
        column=None,
        columns=entries,
        column_ids=targets.ids,
        rests=targets.rests,
        unkept=vocabulary_size - entries,
        hidden=None if targets.hidden is None or targets.hidden_scale is None else (targets.hidden, targets.hidden_scale),
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
    begins = np.cumsum(entries) - entries
    scaled = np.concatenate([record.logprobs for record in records]).astype(np.float64) / temperature
    log_rest = rest_at(np.concatenate([record.rests for record in records], 1), stored, np.concatenate([record.unkept for record in records]), temperature)
    top = np.maximum(log_rest, np.maximum.reduceat(scaled, begins))
    scaled -= np.repeat(top, entries)
    mass = np.exp(scaled, out=scaled)
    rest = np.exp(log_rest - top)
    total = np.add.reduceat(mass, begins) + rest
    mass /= np.repeat(total, entries)
    rest /= total

    columns = np.concatenate([record.columns for record in records])
    ids = np.concatenate([record.column_ids for record in records])
    if any(record.column is not None for record in records):
        mass, rest = _placed(records, mass, rest)
    width = int(columns.max(initial=1))
    inside = np.arange(width) < columns[:, None]  # [N, C]
    has = columns > 0
    padded = np.zeros(inside.shape, dtype=np.int64)
    padded[has] = ids[(np.cumsum(columns) - columns)[has], None]
    padded[inside] = ids
    probs = np.zeros(inside.shape, dtype=np.float32)
    probs[inside] = mass
    return SparseTarget(torch.from_numpy(padded), torch.from_numpy(probs), torch.from_numpy(rest.astype(np.float32)), temperature)


def _placed(records: list[Projected], mass: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The entries' mass summed up in columns, what is not placed in the rest."""
    columns, shares, first = [], [], 0
    for record in records:
        column = np.arange(len(record.logprobs)) if record.column is None else record.column
        columns.append(np.where(column == REST, REST, column + first))
        shares.append(np.ones(len(column)) if record.log_share is None else np.exp(record.log_share.astype(np.float64)))
        first += len(record.column_ids)
    column, share = np.concatenate(columns), np.concatenate(shares)
    placed = column != REST
    unplaced = np.where(placed, mass * (1 - share), mass)
    owner = np.repeat(np.arange(len(rest)), np.concatenate([record.entries for record in records]))
    return np.bincount(column[placed], (mass * share)[placed], first), rest + np.bincount(owner, unplaced, len(rest))


def specials_to_specials(teacher: Vocabulary, student: Vocabulary, student_id: np.ndarray) -> np.ndarray:
    """Let what ends an answer on the teacher's side end it on the student's; no other special token receives mass."""
    student_id[np.flatnonzero(teacher.special)] = REST
    for end in teacher.end_ids:
        student_id[end] = student.end_ids[0] if student.end_ids else REST
    return student_id
