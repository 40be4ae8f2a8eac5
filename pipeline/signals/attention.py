"""Where a model looks: of each query's weights over its keys (a softmax, 1 in all) the strongest, and the weight of all others.

Rows of one layer lie flat: position after position and, where each head is kept apart, head after head (R = P * heads).
Two tokenizers' rows are compared in cells: stretches of tokens that stand for the same on both sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import InputError, Mismatch
from pipeline.signals.alignment import align
from pipeline.signals.ragged import begins, gaps, runs
from pipeline.signals.records import Tokens

STEPS = 255
RESTS = 65535
LEAST = (0.5 / STEPS) ** 2
"""Weights below have no code but 0, and are left with the others."""


@dataclass(frozen=True)
class Rows:
    """One layer's rows of a record."""

    kept: np.ndarray  # integers [R] how many keys
    key: np.ndarray  # int32 [sum of kept] which tokens, the nearest first
    weight: np.ndarray  # float32 [sum of kept]
    rest: np.ndarray  # float32 [R] of all other keys

    def split(self, rows: Sequence[int]) -> list["Rows"]:
        """The next so many rows each."""
        at_row = np.cumsum(rows)[:-1]
        at_entry = np.concatenate([[0], np.cumsum(self.kept, dtype=np.int64)])[at_row]
        parts = (np.split(self.kept, at_row), np.split(self.key, at_entry), np.split(self.weight, at_entry), np.split(self.rest, at_row))
        return [Rows(*part) for part in zip(*parts, strict=True)]

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def heads_of(rows: Rows, position: np.ndarray) -> int:
    """How many rows a position has."""
    return len(rows.rest) // max(len(position), 1)


# --- how rows are stored -----------------------------------------------------------------------------------------------


def encode_weights(weight: np.ndarray) -> np.ndarray:
    """uint8: steps of the square root (see weight_error)."""
    return np.rint(STEPS * np.sqrt(weight)).astype(np.uint8)


def decode_weights(code: np.ndarray) -> np.ndarray:
    """float32."""
    return np.square(code.astype(np.float32) / STEPS)


def weight_error(stored: np.ndarray) -> np.ndarray:
    """float64: by how much a weight may differ from what is read back."""
    return (STEPS * np.sqrt(stored.astype(np.float64)) + 0.5) / STEPS**2


def encode_weight_rests(rest: np.ndarray) -> np.ndarray:
    """uint16."""
    return np.rint(RESTS * rest).astype(np.uint16)


def decode_weight_rests(stored: np.ndarray) -> np.ndarray:
    """float32."""
    return stored.astype(np.float32) / RESTS


def encode_keys(key: np.ndarray, kept: np.ndarray, query: np.ndarray) -> np.ndarray:
    """int32: how far back the nearest key lies, then from each key to the next. query: int [R], the rows' own tokens."""
    return gaps(np.repeat(query, kept) - key, kept)


def decode_keys(stored: np.ndarray, kept: np.ndarray, query: np.ndarray) -> np.ndarray:
    """int32. IndexError if a key does not lie before its query, or not between the others."""
    back = np.cumsum(stored, dtype=np.int64)
    first = begins(kept)
    back -= np.repeat(back[first] - stored[first], kept[kept > 0])
    key = np.repeat(query, kept) - back
    later = np.ones(len(stored), dtype=bool)
    later[first] = False
    if len(key) and (key.min() < 0 or stored.min() < 0 or (stored[later] == 0).any()):
        raise IndexError("a key that no token is")
    return key.astype(np.int32)


# --- which layers and heads --------------------------------------------------------------------------------------------


def matched_layers(wanted: int, full: Sequence[bool]) -> list[int]:
    """So many layers spread evenly up to the last; those that see everything (`full`) before those with a window."""
    count = len(full)
    if wanted > count:
        raise InputError(f"targets.attention.matched: {wanted} layers are wanted, and the teacher has {count}.")
    ideal = [(i + 1) * count / wanted - 1 for i in range(wanted)]
    chosen: dict[int, int] = {}
    for candidates in ([layer for layer in range(count) if full[layer]], range(count)):
        # the nearest pair first, so that no layer takes the place of a better one
        for _, place, layer in sorted((abs(layer - ideal[place]), place, layer) for layer in candidates for place in range(wanted)):
            if place not in chosen and layer not in chosen.values():
                chosen[place] = layer
    return sorted(chosen.values())


def proportional(layer: int, teacher_layers: int, student_layers: int) -> int:
    """The student's layer at the same depth; the last is the last's."""
    return max(0, round((layer + 1) * student_layers / teacher_layers) - 1)


def head_groups(heads: str, teacher: int, student: int) -> int:
    """Into how many groups the heads of both go, whose rows are averages: one for `mean`, each head for `same`, as many as the fewer for `grouped`."""
    if heads == "same" and teacher != student:
        raise InputError(f"attention_match: heads: same needs as many heads on both sides, and the cache has {teacher} a layer, the student {student}. Use `mean` or `grouped`.")
    if heads == "grouped" and max(teacher, student) % min(teacher, student):
        raise InputError(f"attention_match: heads: grouped needs one number of heads to be a multiple of the other, and the cache has {teacher} a layer, the student {student}. Use `mean`.")
    return 1 if heads == "mean" else min(teacher, student)


# --- the teacher's rows in the student's keys --------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """What stands for the same on both sides. Every token is in one cell at most."""

    of_teacher: np.ndarray  # int64 [L_teacher] the cell of each token; -1: the student has nothing there
    begin: np.ndarray  # int64 [cells + 1] where each cell's student tokens begin in `token`
    token: np.ndarray  # int64 [L_student] student tokens, cell after cell


def cells_of(teacher: Tokens, student: Tokens) -> Cells:
    """The smallest stretches of content that both cut out, each with all its tokens; of the template, what stands between the same bytes.

    The first token, which takes what attention no token needs (the attention sink), is a cell of its own whatever it is on
    either side, a BOS or the first word of a template.
    """
    if np.array_equal(teacher.ids, student.ids) and np.array_equal(teacher.start, student.start):
        every = np.arange(len(student))
        return Cells(every, np.arange(len(student) + 1), every)
    wide_t, wide_s = teacher.end > teacher.start, student.end > student.start
    common = np.intersect1d(teacher.start[wide_t], student.start[wide_s])
    names_t, names_s = _names(teacher, wide_t, common), _names(student, wide_s, common)
    if not wide_t[0] and not wide_s[0]:
        names_t[0] = names_s[0] = -1
    names, cell = np.unique(names_s, return_inverse=True)
    token = np.argsort(cell, kind="stable")
    at = np.minimum(np.searchsorted(names, names_t), len(names) - 1)
    return Cells(np.where(names[at] == names_t, at, -1), np.searchsorted(cell[token], np.arange(len(names) + 1)), token)


def _names(tokens: Tokens, wide: np.ndarray, common: np.ndarray) -> np.ndarray:
    """A number for what each token stands for: odd for content, by the last common beginning; even for what lies between."""
    before = np.searchsorted(common, tokens.start, side="right") - 1
    return np.where(wide, 2 * np.append(common, -2)[before] + 1, 2 * tokens.start.astype(np.int64))


@dataclass(frozen=True)
class Matched:
    """A record's rows of one layer, for the student: weights of cells, each of some of the student's tokens."""

    position: np.ndarray  # int64 [P] the student's positions
    cells: np.ndarray  # int64 [P * G] how many cells a row has
    weight: np.ndarray  # float32 [M] of each cell
    rest: np.ndarray  # float32 [P * G] of everything else
    keys: np.ndarray  # int64 [M] how many of the student's tokens a cell has
    key: np.ndarray  # int64 [sum of keys] which


def matched(rows: Rows, described: np.ndarray, teacher: Tokens, student: Tokens, groups: int, cells: Cells | None = None) -> Matched:
    """The teacher's rows at the positions where both have read the same, heads averaged into groups; nothing of their weight is lost.

    described: int32 [P_teacher], the positions that the rows are of. What the student has no token for, and what it has
    not read yet, goes to the rest.
    """
    cells = cells or cells_of(teacher, student)
    at_teacher, at_student = align(teacher, student)
    row = np.searchsorted(described, at_teacher)
    known = np.append(described, -1)[row] == at_teacher
    row, position = row[known], at_student[known]
    if not len(described):
        return Matched(*(np.zeros(0, dtype=kind) for kind in (np.int64, np.int64, np.float32, np.float32, np.int64, np.int64)))
    heads = heads_of(rows, described)
    share = heads // groups
    # rows that are wanted, head after head
    wanted = (row[:, None] * heads + np.arange(heads)).ravel()
    group = np.arange(len(wanted)) // share
    kept = rows.kept.astype(np.int64)
    owner, entry = runs((np.cumsum(kept) - kept)[wanted], kept[wanted])
    cell = cells.of_teacher[rows.key[entry]]
    nearest = np.append(cells.token, 0)[cells.begin[:-1]]  # of each cell the first token
    there = (cell >= 0) & (nearest[cell] <= position[owner // heads])
    weight = rows.weight[entry].astype(np.float64) / share
    count = len(cells.begin) - 1
    names, where = np.unique((group[owner] * count + cell)[there], return_inverse=True)
    sums = np.bincount(where, weight[there], len(names))
    rest = np.bincount(group, rows.rest[wanted].astype(np.float64) / share, len(position) * groups)
    rest += np.bincount(group[owner][~there], weight[~there], len(rest))
    of_cell, in_row = names % count, names // count
    which, token = runs(cells.begin[of_cell], cells.begin[of_cell + 1] - cells.begin[of_cell])
    token = cells.token[token]
    read = token <= position[in_row[which] // groups]
    return Matched(
        position=position,
        cells=np.bincount(in_row, minlength=len(rest)),
        weight=sums.astype(np.float32),
        rest=rest.astype(np.float32),
        keys=np.bincount(which[read], minlength=len(names)),
        key=token[read],
    )


# --- for a batch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionTarget:
    """One layer's rows of a batch, and which of the student's weights each cell is the sum of. Entries go row after row."""

    query: np.ndarray  # int64 [n] the rows, ascending, as indices into B*T
    begin: np.ndarray  # int64 [n + 1] where each row's entries begin
    row: Tensor  # int64 [n] as rows of the batch
    groups: int
    entry_group: Tensor  # int64 [E]
    entry_row: Tensor  # int64 [E] of n
    entry_key: Tensor  # int64 [E] of T
    entry_cell: Tensor  # int64 [E] of M
    cell_row: Tensor  # int64 [M] of n * groups
    weight: Tensor  # float32 [M] the teacher's
    rest: Tensor  # float32 [n * groups]

    def to(self, device: torch.device) -> "AttentionTarget":
        moved: dict[str, Any] = {field.name: value.to(device) for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}
        return replace(self, **moved)


def attention_target(records: Sequence[Matched], positions: Sequence[np.ndarray], width: int, groups: int) -> AttentionTarget:
    """positions: each record's rows in the batch, as in Tokens.answer_positions. width: T."""
    query, row, first = [], [], 0
    for b, (record, there) in enumerate(zip(records, positions, strict=True)):
        at = np.searchsorted(there, record.position)
        if (np.append(there, -1)[at] != record.position).any():
            raise Mismatch("attention rows stand where the batch has none")
        query.append(b * width + record.position)
        row.append(first + at)
        first += len(there)
    cells, weight, rest, keys, key = (np.concatenate([getattr(record, name) for record in records]) for name in ("cells", "weight", "rest", "keys", "key"))
    cell_row = np.repeat(np.arange(len(cells)), cells)
    entry_cell = np.repeat(np.arange(len(keys)), keys)
    entry_row = cell_row[entry_cell] // groups
    count = sum(len(part) for part in query)
    return AttentionTarget(
        query=np.concatenate(query).astype(np.int64),
        begin=np.searchsorted(entry_row, np.arange(count + 1)),
        row=torch.from_numpy(np.concatenate(row).astype(np.int64)),
        groups=groups,
        entry_group=torch.from_numpy(cell_row[entry_cell] % groups),
        entry_row=torch.from_numpy(entry_row),
        entry_key=torch.from_numpy(key),
        entry_cell=torch.from_numpy(entry_cell),
        cell_row=torch.from_numpy(cell_row),
        weight=torch.from_numpy(weight),
        rest=torch.from_numpy(rest),
    )


@dataclass(frozen=True)
class Attended:
    """What a loss compares: for each pair of layers the teacher's weights of cells, and the student's."""

    rows: int
    """Of the batch."""
    layers: list[tuple[AttentionTarget, Tensor]]  # and float32 [M], the student's weight of each cell
