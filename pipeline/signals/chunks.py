"""The smallest stretches of text that two tokenizers both cut out: where the likelihoods of their tokens can be compared."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.signals.alignment import align
from pipeline.signals.records import ANSWER, END, Tokens
from pipeline.signals.targets import Targets
from pipeline.signals.vocabulary import BOUNDARY, CLASSES


@dataclass(frozen=True)
class Chunked:
    """Of one record."""

    begin: np.ndarray  # int64 [C] the position before a chunk's first student token
    end: np.ndarray  # int64 [C] the position before its last one
    logprob: np.ndarray  # float32 [C] what the teacher gives all its tokens of it, nats
    goes_on: np.ndarray  # bool [C] whether the next one begins where it ends
    boundary: np.ndarray | None  # float32 [C] log of the mass that the teacher has behind it on BOUNDARY; -inf: not known; None: not in the cache


@dataclass(frozen=True)
class Chunks:
    """Of a batch; rows as in Batch."""

    row: Tensor  # int64 [R] the rows whose next token belongs to a chunk
    chunk: Tensor  # int64 [R] which
    last: Tensor  # int64 [C] the row of each chunk's last token
    logprob: Tensor  # float32 [C]
    goes_on: Tensor  # bool [C]
    boundary: Tensor | None = None  # float32 [C]
    begins_anew: Tensor | None = None  # bool [V_student]

    def rows(self, first: int, rows: slice, chunks: slice) -> "Chunks":
        """Those of a part of the batch that begins at row `first`; `rows` and `chunks` say where they lie."""
        boundary = None if self.boundary is None else self.boundary[chunks]
        return Chunks(self.row[rows] - first, self.chunk[rows] - chunks.start, self.last[chunks] - first, self.logprob[chunks], self.goes_on[chunks], boundary, self.begins_anew)

    def to(self, device: torch.device) -> "Chunks":
        return replace(self, **{field.name: value.to(device) for field in fields(self) if (value := getattr(self, field.name)) is not None})


def chunked(teacher: Tokens, targets: Targets, student: Tokens) -> Chunked:
    """The chunks whose teacher tokens all have a log-probability. The end of an answer is one of its own.

    A stretch of an answer that only one side begins or ends at the same byte (another lead, no end token) is left out.
    """
    at_teacher, at_student = align(teacher, student)
    is_end = (teacher.kind[at_teacher + 1] == END) & (student.kind[at_student + 1] == END)
    last_t = np.where(is_end, at_teacher, np.append(at_teacher[1:], 0) - 1)
    last_s = np.where(is_end, at_student, np.append(at_student[1:], 0) - 1)
    text_t = np.cumsum(np.append(0, teacher.kind == ANSWER))
    text_s = np.cumsum(np.append(0, student.kind == ANSWER))
    inside = (last_t >= at_teacher) & (last_s >= at_student)
    inside &= is_end | ((text_t[last_t + 2] - text_t[at_teacher + 1] == last_t + 1 - at_teacher) & (text_s[last_s + 2] - text_s[at_student + 1] == last_s + 1 - at_student))
    logprob = np.full(len(teacher) + 1, np.nan)
    logprob[targets.position] = targets.realised_logprob
    sums = np.cumsum(np.append(0.0, np.nan_to_num(logprob, nan=0.0, neginf=-1e4)))
    unknown = np.cumsum(np.append(0, np.isnan(logprob)))
    known = inside & (unknown[last_t + 1] == unknown[at_teacher])
    begin_t, begin_s, last_t, last_s, is_end = at_teacher[known], at_student[known], last_t[known], last_s[known], is_end[known]
    goes_on = np.append((begin_t[1:] == last_t[:-1] + 1) & (begin_s[1:] == last_s[:-1] + 1) & ~is_end[:-1], False)[: len(begin_t)]
    boundary = None
    if targets.boundary is not None:
        mass = np.full(len(teacher) + 1, -np.inf)
        mass[targets.position] = np.logaddexp.reduce(targets.boundary[:, [CLASSES.index(name) for name in BOUNDARY]].astype(np.float64), 1)
        described = ~is_end & (np.append(student.kind, [0, 0])[last_s + 2] >= ANSWER)
        boundary = np.where(described, mass[last_t + 1], -np.inf).astype(np.float32)
    return Chunked(begin_s, last_s, (sums[last_t + 1] - sums[begin_t]).astype(np.float32), goes_on, boundary)


def joined(records: list[Chunked], positions: list[np.ndarray], begins_anew: Tensor | None = None) -> Chunks:
    """One for a batch. positions: each record's rows, as in Tokens.answer_positions; begins_anew: of the student's tokens."""
    rows, chunks, lasts, logprobs = [], [], [], []
    first_row = first_chunk = 0
    for record, position in zip(records, positions, strict=True):
        sizes = record.end - record.begin + 1
        chunk = np.repeat(np.arange(len(sizes)), sizes)
        inside = np.arange(len(chunk)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows.append(first_row + np.searchsorted(position, record.begin[chunk] + inside))
        chunks.append(first_chunk + chunk)
        lasts.append(first_row + np.searchsorted(position, record.end))
        logprobs.append(record.logprob)
        first_chunk += len(sizes)
        first_row += len(position)
    row, of, last = (torch.from_numpy(np.concatenate(parts).astype(np.int64)) for parts in (rows, chunks, lasts))
    goes_on = torch.from_numpy(np.concatenate([record.goes_on for record in records]))
    known = [record.boundary for record in records if record.boundary is not None]
    boundary = torch.from_numpy(np.concatenate(known)) if len(known) == len(records) else None
    return Chunks(row, of, last, torch.from_numpy(np.concatenate(logprobs)), goes_on, boundary, begins_anew)
