"""From the teacher's word in its own vocabulary to a target in the student's.

A projection is linear: each kept token's mass is shared out among student tokens and the rest, by shares that do not depend
on the temperature. Mass is tempered before it is projected: projecting first would be another distribution.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from pipeline.signals.alignment import align
from pipeline.signals.ragged import runs
from pipeline.signals.records import ANSWER, Tokens
from pipeline.signals.targets import Targets, rest_at
from pipeline.signals.vocabulary import Vocabulary

REST = -1
Form = Literal["shares", "ranks", "values"]
"""shares: the teacher's mass shared out among student tokens; ranks: the same, but what is called student tokens are none; values:
a distribution over student tokens that is no sharing-out."""
FORMS = get_args(Form)


@dataclass(frozen=True)
class Projected:
    """A record's targets at the student's positions. Entries are shares of kept teacher tokens, flat; those of one student token lie side by side."""

    position: np.ndarray  # int64 [P] the student's positions
    entries: np.ndarray  # int64 [P] entries per position
    student_id: np.ndarray  # int32 [sum of entries] the student token that receives the share; REST: none
    logprobs: np.ndarray  # float32 [sum of entries] of the teacher's token
    log_share: np.ndarray | None  # float32 [sum of entries] log of the share of its mass; None: each is all of it
    rests: np.ndarray  # float32 [S, P] as in Targets
    unkept: np.ndarray  # int64 [P] how many of the teacher's tokens the rests are of
    reliability: np.ndarray  # float32 [P] 1 less the mass that went where it usually goes, whatever stood there, and that was left out
    row: np.ndarray  # int64 [P] the described position of the teacher that this one speaks of
    states: "States | None" = None

    def rows(self, which: slice) -> "Projected":
        """Some of its positions; without their states."""
        ends = np.concatenate([[0], np.cumsum(self.entries)])
        inside = slice(int(ends[which.start]), int(ends[which.stop]))
        flat: dict[str, Any] = {name: None if (values := getattr(self, name)) is None else values[inside] for name in ("student_id", "logprobs", "log_share")}
        each = {name: getattr(self, name)[which] for name in ("position", "entries", "unkept", "reliability", "row")}
        return replace(self, **flat, **each, rests=self.rests[:, which], states=None)


@dataclass(frozen=True)
class States:
    """The teacher's last hidden states at P positions, and which of its tokens are kept there."""

    hidden: np.ndarray  # int8 [P, H]
    scale: np.ndarray  # float32 [P]
    kept: np.ndarray  # int64 [P] how many
    ids: np.ndarray  # int32 [sum of kept]

    @classmethod
    def of(cls, targets: Targets, row: np.ndarray) -> "States | None":
        if targets.hidden is None or targets.hidden_scale is None:
            return None
        kept = targets.kept.astype(np.int64)
        return cls(targets.hidden[row], targets.hidden_scale[row], kept[row], targets.ids[runs((np.cumsum(kept) - kept)[row], kept[row])[1]])


@dataclass(frozen=True)
class SparseTarget:
    """Distributions over C student tokens and one rest. Columns that a row does not need repeat one of its tokens with probability 0.

    How the rest is shared out is the student's own affair, unless `log_ratio` or `log_tail` says otherwise.
    """

    ids: Tensor  # int64 [N, C]
    probs: Tensor  # float32 [N, C]
    rest: Tensor  # float32 [N] the mass of all other tokens
    temperature: float | Tensor  # one for all, or float32 [N]
    log_ratio: Tensor | None = None  # float32 [V] the student's own shares are multiplied by exp of it
    log_tail: Tensor | None = None  # float32 [N, V] the rest is shared out in proportion to exp of it

    def to(self, device: torch.device) -> "SparseTarget":
        tensors = {name: value.to(device) for name in ("ids", "probs", "rest", "temperature", "log_ratio", "log_tail") if isinstance(value := getattr(self, name), Tensor)}
        return replace(self, **tensors)

    def rows(self, which: slice) -> "SparseTarget":
        return replace(self, **{name: value[which] for name in ("ids", "probs", "rest", "temperature", "log_tail") if isinstance(value := getattr(self, name), Tensor)})

    @property
    def column(self) -> float | Tensor:
        """The temperature, to divide logits [N, V] by."""
        return self.temperature[:, None] if isinstance(self.temperature, Tensor) else self.temperature

    @property
    def shapes_rest(self) -> bool:
        """Whether it says how its rest is shared out."""
        return self.log_ratio is not None or self.log_tail is not None

    def top(self) -> Tensor:
        """int64 [N]: the student token with the most mass."""
        return self.ids.gather(-1, self.probs.argmax(-1, keepdim=True))[:, 0]

    def log_shares(self, log_student: Tensor) -> Tensor:
        """[N, V]: log of each other token's share of the rest, where `shapes_rest`.

        log_student: the student's log-shares of its own rest, very low for the target's tokens.
        """
        if self.log_tail is not None:
            return self.log_tail.scatter(-1, self.ids, NO_SHARE).log_softmax(-1)
        assert self.log_ratio is not None
        return (log_student + self.log_ratio).log_softmax(-1)


NO_SHARE = -1e9
"""The log of nothing, but finite."""


@dataclass(frozen=True)
class Meeting:
    """A record's targets (the realised token takes part everywhere), and where the student's tokens meet them."""

    content: bytes
    teacher: Tokens
    student: Tokens
    targets: Targets
    row: np.ndarray  # int64 [P] the described positions at which both begin a token at the same byte
    at_student: np.ndarray  # int64 [P] the student's positions there

    @cached_property
    def first(self) -> np.ndarray:
        """int64 [rows + 1]: where each row's kept tokens begin."""
        return np.concatenate([[0], np.cumsum(self.targets.kept.astype(np.int64))])

    def kept(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The kept tokens of these rows, flat: which of `row` each belongs to, and its index in targets.ids."""
        return runs(self.first[row], self.targets.kept[row])

    @cached_property
    def realised(self) -> np.ndarray:
        """int32 [rows]: the teacher's token that follows."""
        return self.teacher.ids[self.targets.position + 1]

    @cached_property
    def goes_on(self) -> np.ndarray:
        """bool [rows]: whether the next row describes what the teacher says once it has read that token, of the same answer."""
        position = self.targets.position
        return (np.append(position[1:], -1) == position + 1) & (self.teacher.kind[position + 1] == ANSWER)

    @cached_property
    def mass(self) -> np.ndarray:
        """float64 [rows]: of all that is kept, at temperature 1."""
        logprobs = self.targets.logprobs.astype(np.float64)
        return np.add.reduceat(np.exp(logprobs), self.first[:-1]) if len(self.targets.kept) else np.zeros(0)

    @cached_property
    def shares(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 [sum of kept] and [rows]: of each kept token, at temperature 1, if what is not kept is as the others that are, and of what is left.

        What is not kept is not the realised token: that one has its probability.
        """
        p = np.exp(self.targets.logprobs.astype(np.float64)) / np.repeat(self.mass + np.exp(self.targets.rests[0].astype(np.float64)), self.targets.kept)
        owner = np.repeat(np.arange(len(self.targets.kept)), self.targets.kept)
        is_realised = self.targets.ids == self.realised[owner]
        there = np.bincount(owner[is_realised], p[is_realised], len(self.targets.kept)).astype(np.float64)
        others = np.bincount(owner[~is_realised], p[~is_realised], len(self.targets.kept)).astype(np.float64)
        factor = np.where(others > 0, (1 - there) / np.maximum(others, 1e-300), 0.0)
        return np.where(is_realised, p, p * factor[owner]), np.where(others > 0, 0.0, 1 - there)


def meet(content: bytes, teacher: Tokens, targets: Targets, student: Tokens) -> Meeting:
    """targets: with the realised token among the kept ones everywhere (see with_realised)."""
    at_teacher, at_student = align(teacher, student)
    row = np.searchsorted(targets.position, at_teacher)
    described = (row < len(targets.position)) & (np.append(targets.position, -1)[row] == at_teacher)
    return Meeting(content, teacher, student, targets, row[described], at_student[described])


@dataclass(frozen=True)
class Shares:
    """Which student tokens the kept tokens' mass goes to, for one record: all that a projection decides."""

    position: np.ndarray  # int64 [P] the student's positions, ascending
    row: np.ndarray  # int64 [P] the described position of the teacher that each speaks of
    inside: np.ndarray  # bool [P] whether the student's token begins inside a teacher's
    reliability: np.ndarray  # float32 [P]
    owner: np.ndarray  # int64 [E] which position a share is of
    kept: np.ndarray  # int64 [E] which kept token it is of, in targets.ids
    student_id: np.ndarray  # int32 [E]; REST: none
    log_share: np.ndarray | None  # float32 [E]; None: each is all of it

    def in_order(self) -> "Shares":
        """Position after position, and of each the kept tokens in their order."""
        order = np.lexsort((self.student_id, self.kept, self.owner))
        flat = {name: value[order] for name in ("owner", "kept", "student_id", "log_share") if (value := getattr(self, name)) is not None}
        return replace(self, **flat)

    def placed(self) -> np.ndarray:
        """bool [P]: where some mass goes to a token."""
        return np.bincount(self.owner[self.student_id != REST], minlength=len(self.position)) > 0

    def where(self, wanted: np.ndarray) -> "Shares":
        """At some positions only. wanted: bool [P]."""
        taken = wanted[self.owner]
        flat = {name: value[taken] for name in ("kept", "student_id", "log_share") if (value := getattr(self, name)) is not None}
        positions = {name: getattr(self, name)[wanted] for name in ("position", "row", "inside", "reliability")}
        return replace(self, owner=(np.cumsum(wanted) - 1)[self.owner[taken]], **positions, **flat)


def no_shares() -> Shares:
    """Of a record that nothing is said of."""
    flat, bools, ids = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool), np.zeros(0, dtype=np.int32)
    return Shares(flat, flat, bools, np.zeros(0, dtype=np.float32), flat, flat, ids, None)


def no_values(temperatures: int) -> Projected:
    """The same as values. temperatures: how many the cache has."""
    flat, reals = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    return Projected(flat, flat, flat.astype(np.int32), reals, None, np.zeros((temperatures, 0), dtype=np.float32), flat, reals, flat)


class Projection(Protocol):
    """What a method in pipeline/projections/ gives.

    One whose form is `values` has values(meeting, temperatures) -> Projected instead of `shares`: its word where both begin a
    token, with the rests at the temperatures that the cache has them at.
    """

    form: ClassVar[Form]

    @property
    def student_id(self) -> np.ndarray:
        """int32 [V_teacher]: the student token that most of a teacher token's mass goes to, if nothing else is known; REST: none."""
        ...

    def shares(self, meeting: Meeting) -> Shares: ...


@dataclass(frozen=True)
class TokenMap:
    """Each teacher token is one student token, or none."""

    form: ClassVar[Form] = "shares"
    student_id: np.ndarray  # int32 [V_teacher]

    @cached_property
    def is_identity(self) -> bool:
        """Every token is itself."""
        return bool((self.student_id == np.arange(len(self.student_id))).all())

    def shares(self, meeting: Meeting) -> Shares:
        owner, kept = meeting.kept(meeting.row)
        return at_meetings(meeting, owner, kept, self.student_id[meeting.targets.ids[kept]], None)


def at_meetings(meeting: Meeting, owner: np.ndarray, kept: np.ndarray, student_id: np.ndarray, log_share: np.ndarray | None) -> Shares:
    """Shares at the positions where both begin a token, and nowhere else."""
    count = len(meeting.row)
    return Shares(meeting.at_student, meeting.row, np.zeros(count, dtype=bool), np.ones(count, dtype=np.float32), owner, kept, student_id, log_share)


def projected(targets: Targets, shares: Shares, vocabulary_size: int) -> Projected:
    """A record's targets for a student. Positions at which nothing is placed say nothing and are left out.

    Where the student's token begins inside a teacher's, only tokens that go on with its bytes take part, and there is no rest:
    how much of it would go on so is not known. vocabulary_size: the teacher's, without unused rows of its head.
    """
    shares = shares.where(shares.placed())
    # by owner and student token: one stable sort of one key takes a twentieth of a lexsort's time
    order = np.argsort(shares.owner * (int(shares.student_id.max(initial=0)) + 2) + shares.student_id, kind="stable")
    row = shares.row
    return Projected(
        position=shares.position,
        entries=np.bincount(shares.owner, minlength=len(row)),
        student_id=shares.student_id[order],
        logprobs=targets.logprobs[shares.kept[order]],
        log_share=None if shares.log_share is None else shares.log_share[order],
        rests=np.where(shares.inside, np.float32(-np.inf), targets.rests[:, row]),
        unkept=np.where(shares.inside, 0, vocabulary_size - targets.kept[row].astype(np.int64)),
        reliability=shares.reliability,
        row=row,
        states=States.of(targets, row),
    )


def as_it_is(targets: Targets, vocabulary_size: int) -> Projected:
    """With the same tokens in the same places there is nothing to do. targets: with the realised token, as in `meet`."""
    entries = targets.kept.astype(np.int64)
    return Projected(
        position=targets.position.astype(np.int64),
        entries=entries,
        student_id=targets.ids,
        logprobs=targets.logprobs,
        log_share=None,
        rests=targets.rests,
        unkept=vocabulary_size - entries,
        reliability=np.ones(len(entries), dtype=np.float32),
        row=np.arange(len(entries)),
        states=States.of(targets, np.arange(len(entries))),
    )


def together(records: list[Projected]) -> Projected:
    """Their positions one after another; `position` and `row` still count in each record. Without their states."""
    if len(records) == 1:
        return records[0]
    shares = None
    if any(record.log_share is not None for record in records):
        shares = np.concatenate([np.zeros(len(record.logprobs), np.float32) if record.log_share is None else record.log_share for record in records])
    joined: dict[str, Any] = {name: np.concatenate([getattr(record, name) for record in records]) for name in ("position", "entries", "student_id", "logprobs", "unkept", "reliability", "row")}
    return Projected(**joined, log_share=shares, rests=np.concatenate([record.rests for record in records], 1))


def at_temperature(records: list[Projected], stored: list[float], temperature: float | np.ndarray) -> SparseTarget:
    """The targets of several records (at least one position), flat, as distributions at one temperature >= 1, or at one for each position.

    Placed and unplaced mass of a position sum to 1; what is not placed is in the rest. Computed in float64.
    """
    record = together(records)
    entries = record.entries
    begins = np.cumsum(entries) - entries
    owner = np.repeat(np.arange(len(entries)), entries)
    scaled = record.logprobs.astype(np.float64) / (temperature[owner] if isinstance(temperature, np.ndarray) else temperature)
    if record.log_share is not None:
        scaled += record.log_share
    log_rest = rest_at(record.rests, stored, record.unkept, temperature)
    top = np.maximum(log_rest, np.maximum.reduceat(scaled, begins))
    scaled -= np.repeat(top, entries)
    mass = np.exp(scaled, out=scaled)
    rest = np.exp(log_rest - top)
    total = np.add.reduceat(mass, begins) + rest
    mass /= np.repeat(total, entries)
    rest /= total

    ids = record.student_id
    new = np.ones(len(ids), dtype=bool)  # each run of entries of one student token is a column
    new[1:] = (ids[1:] != ids[:-1]) | (owner[1:] != owner[:-1])
    placed = ids != REST
    new &= placed
    if not new.all():
        if not placed.all():
            rest += np.bincount(owner[~placed], mass[~placed], len(rest))
        mass = np.bincount(np.cumsum(new)[placed] - 1, mass[placed])
        ids = ids[new]
    columns = np.bincount(owner[new], minlength=len(entries))

    width = int(columns.max(initial=1))
    inside = np.arange(width) < columns[:, None]  # [N, C]
    has = columns > 0
    padded = np.zeros(inside.shape, dtype=np.int64)
    padded[has] = ids[(np.cumsum(columns) - columns)[has], None]
    padded[inside] = ids
    probs = np.zeros(inside.shape, dtype=np.float32)
    probs[inside] = mass
    return SparseTarget(
        torch.from_numpy(padded),
        torch.from_numpy(probs),
        torch.from_numpy(rest.astype(np.float32)),
        torch.from_numpy(temperature.astype(np.float32)) if isinstance(temperature, np.ndarray) else temperature,
    )


def specials_to_specials(teacher: Vocabulary, student: Vocabulary, student_id: np.ndarray) -> np.ndarray:
    """Let what ends an answer on the teacher's side end it on the student's; no other special token receives mass."""
    student_id[np.flatnonzero(teacher.special)] = REST
    for end in teacher.end_ids:
        student_id[end] = student.end_ids[0] if student.end_ids else REST
    return student_id
