"""Examples to tensors: the student's tokens side by side, and one flat row for each position that is trained on."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.signals.attention import AttentionTarget, Matched, attention_target
from pipeline.signals.chunks import Chunked, Chunks, joined
from pipeline.signals.projection import Projected, SparseTarget, States, at_temperature, together
from pipeline.signals.records import Tokens

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Word:
    """What a teacher says of a batch's rows."""

    known: Tensor  # int64 [M] of which
    weights: Tensor  # float32 [M] the rows' weights times how much it counts there
    sureness: Tensor  # float32 [M] how much it counts: how reliable its word is, times its share among the teachers who have one
    target: SparseTarget  # [M, C]

    def rows(self, known: slice, first: int) -> "Word":
        return Word(self.known[known] - first, self.weights[known], self.sureness[known], self.target.rows(known))

    def to(self, device: torch.device) -> "Word":
        return Word(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # int64 [B, T]; packed: [1, T], the records one after another
    rows: Tensor  # int64 [N] the answers' positions, as indices into B*T
    realised: Tensor  # int64 [N] the tokens that follow them
    weights: Tensor  # float32 [N]
    record: Tensor  # int64 [N] which record a row belongs to
    known: Tensor  # int64 [M] the rows for which there is a word of the teacher
    known_weights: Tensor  # float32 [M] their weights times how reliable that word is
    reliability: Tensor  # float32 [M] with more teachers, times this one's share
    teacher: SparseTarget | None  # [M, C]; None if there is none
    states: "TeacherStates | None"  # if they were read
    chunks: Chunks | None
    attention: list[AttentionTarget] | None  # one for each layer that is compared
    tokens: int
    """Without padding."""
    cuts: "list[Cut]"
    """The parts of which logits are made."""
    specialty: Tensor | None = None  # int64 [N]
    others: tuple[Word, ...] = ()
    """Of further teachers, as `teacher` of the first."""
    positions: Tensor | None = None  # int64 [1, T] where it is packed: each token's in its own record
    words: Projected | None = None
    """What `teacher` was made from, where it is to be made at other temperatures."""

    def said(self) -> list[Word]:
        """All teachers' words."""
        own = [] if self.teacher is None else [Word(self.known, self.known_weights, self.reliability, self.teacher)]
        return [*own, *self.others]

    def weighted(self, factors: Tensor) -> "Batch":
        """With the weights of the records of each specialty times its factor. factors: float32 [S]."""
        if self.specialty is None:
            return self
        each = factors[self.specialty]
        others = tuple(replace(word, weights=word.weights * each[word.known]) for word in self.others)
        return replace(self, weights=self.weights * each, known_weights=self.known_weights * each[self.known], others=others)

    def part(self, cut: "Cut") -> "Batch":
        """The rows of a part, as a batch; of attention, which is no row's of logits, nothing."""
        rows, known = cut.rows, cut.known
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in ("rows", "realised", "weights", "record")},
            specialty=None if self.specialty is None else self.specialty[rows],
            words=None if self.words is None else self.words.rows(known),
            known=self.known[known] - rows.start,
            known_weights=self.known_weights[known],
            reliability=self.reliability[known],
            others=tuple(word.rows(which, rows.start) for word, which in zip(self.others, cut.others, strict=True) if which.start < which.stop),
            teacher=None if self.teacher is None or known.start == known.stop else self.teacher.rows(known),
            states=None if self.states is None else self.states.rows(known, cut.kept),
            chunks=None if self.chunks is None else self.chunks.rows(rows.start, cut.chunk_rows, cut.chunks),
            attention=None,
            cuts=[],
        )

    def to(self, device: torch.device) -> "Batch":
        moved = {name: getattr(self, name).to(device) for name in ("ids", "rows", "realised", "weights", "record", "known", "known_weights", "reliability")}
        others = {name: value.to(device) for name in ("teacher", "states", "chunks", "specialty", "positions") if (value := getattr(self, name)) is not None}
        attention = None if self.attention is None else [target.to(device) for target in self.attention]
        return replace(self, **moved, **others, attention=attention, others=tuple(word.to(device) for word in self.others))


@dataclass(frozen=True)
class Cut:
    """Where a part lies in a batch's flat lists."""

    rows: slice
    known: slice
    kept: slice  # of states
    chunk_rows: slice
    chunks: slice
    others: tuple[slice, ...] = ()  # of each further teacher


@dataclass(frozen=True)
class TeacherStates:
    """As signals.projection.States, of the rows that are known."""

    hidden: Tensor  # int8 [M, H]
    scale: Tensor  # float32 [M]
    row: Tensor  # int64 [E] of each kept token: which of the M,
    id: Tensor  # int64 [E] and the teacher's id

    @classmethod
    def joined(cls, parts: list[States]) -> "TeacherStates":
        hidden, scale, kept, ids = (torch.from_numpy(np.concatenate([getattr(part, name) for part in parts])) for name in ("hidden", "scale", "kept", "ids"))
        return cls(hidden, scale, torch.repeat_interleave(kept), ids.long())

    def rows(self, known: slice, kept: slice) -> "TeacherStates":
        return TeacherStates(self.hidden[known], self.scale[known], self.row[kept] - known.start, self.id[kept])

    def to(self, device: torch.device) -> "TeacherStates":
        return TeacherStates(*(getattr(self, name).to(device) for name in ("hidden", "scale", "row", "id")))


@dataclass(frozen=True)
class Said:
    """What a further teacher says of a batch's records."""

    words: list[Projected | None]
    shares: list[float]
    """Its weight beside the other teachers', of each record."""
    stored: list[float]
    """The temperatures of its cache."""

    def joined(self, positions: list[np.ndarray], temperature: float) -> tuple[np.ndarray, np.ndarray, SparseTarget | None]:
        """Which rows it speaks of, how reliable its word is there, and the word. positions: each record's rows."""
        rows, words, first = [np.zeros(0, dtype=np.int64)], [], 0
        for there, word in zip(positions, self.words, strict=True):
            if word is not None and len(word.position):
                rows.append(first + np.searchsorted(there, word.position))
                words.append(word)
            first += len(there)
        sure = np.concatenate([*(word.reliability for word in words), np.zeros(0, dtype=np.float32)])
        return np.concatenate(rows), sure, at_temperature(words, self.stored, temperature) if words else None


def make_batch(
    records: list[Tokens],
    projected: list[Projected | None],
    weights: list[float],
    stored: list[float],
    temperature: float,
    chunks: list[Chunked] | None = None,
    begins_anew: Tensor | None = None,
    attention: list[list[Matched]] | None = None,
    groups: int = 1,
    rows_at_once: int = 2**62,
    specialties: list[int] | None = None,
    keep_words: bool = False,
    packed: bool = False,
    others: list["Said"] | None = None,
    own_share: list[float] | None = None,
) -> Batch:
    """One batch; `projected` is None for records without a teacher's word, `chunks` and `attention` where none are asked for.

    stored: the cache's temperatures; begins_anew: see Chunks. attention: for each layer all records' rows, of so many groups of heads.
    rows_at_once: how many rows are in a part at most; where chunks are asked for, which reach over rows, a part is at least a record.
    specialties: of each record, by number. keep_words: for targets at other temperatures.
    packed: all in one row, without padding but for the last few tokens. others: what further teachers say; own_share: the weight of
    the first beside them, of each record.
    """
    lengths = [len(tokens) for tokens in records]
    width = -(-(sum(lengths) if packed else max(lengths)) // 8) * 8
    starts = [sum(lengths[:b]) if packed else b * width for b in range(len(records))]
    ids = np.zeros((1 if packed else len(records), width), dtype=np.int64)
    own = np.zeros_like(ids)
    rows, realised, known, record_of = [], [], [], []
    first = 0
    for b, (tokens, word) in enumerate(zip(records, projected, strict=True)):
        here = slice(starts[b], starts[b] + len(tokens))
        ids.ravel()[here], own.ravel()[here] = tokens.ids, np.arange(len(tokens))
        positions = tokens.answer_positions()
        rows.append(starts[b] + positions.astype(np.int64))
        realised.append(tokens.ids[positions + 1].astype(np.int64))
        record_of.append(np.full(len(positions), b))
        if word is not None:
            known.append(first + np.searchsorted(positions, word.position))
        first += len(positions)
    words = [word for word in projected if word is not None and len(word.position)]
    record = np.concatenate(record_of)
    known_rows = np.concatenate([*known, np.zeros(0, dtype=np.int64)]).astype(np.int64)
    weight = np.asarray(weights, dtype=np.float32)[record]
    reliability = np.concatenate([*(word.reliability for word in words), np.zeros(0, dtype=np.float32)])
    further = [other.joined([tokens.answer_positions() for tokens in records], temperature) for other in others or []]
    if further:
        every = [
            (known_rows, np.asarray(own_share, dtype=np.float32)),
            *((rows, share) for (rows, _, _), share in zip(further, (np.asarray(other.shares, np.float32) for other in others or []), strict=True)),
        ]
        total = np.zeros(len(weight), dtype=np.float32)
        for those, share in every:
            total[those] += share[record[those]]
        counts = [share[record[those]] / np.maximum(total[those], 1e-9) for those, share in every]
        reliability = reliability * counts[0]
    voices = [
        Word(torch.from_numpy(those), torch.from_numpy(weight[those] * sure * count), torch.from_numpy(sure * count), target)
        for (those, sure, target), count in zip(further, counts[1:] if further else [], strict=True)
        if target is not None
    ]
    states = TeacherStates.joined([word.states for word in words if word.states]) if words and words[0].states else None
    spanning = None if chunks is None else joined(chunks, [tokens.answer_positions() for tokens in records], begins_anew)
    return Batch(
        ids=torch.from_numpy(ids),
        rows=torch.from_numpy(np.concatenate(rows)),
        realised=torch.from_numpy(np.concatenate(realised)),
        weights=torch.from_numpy(weight),
        record=torch.from_numpy(record),
        known=torch.from_numpy(known_rows),
        known_weights=torch.from_numpy(weight[known_rows] * reliability),
        reliability=torch.from_numpy(reliability),
        teacher=at_temperature(words, stored, temperature) if words else None,
        states=states,
        chunks=spanning,
        attention=None if attention is None else [attention_target(layer, [tokens.answer_positions() for tokens in records], width, groups) for layer in attention],
        tokens=sum(lengths),
        positions=torch.from_numpy(own) if packed else None,
        cuts=_cuts(_ends([len(part) for part in rows], rows_at_once, spanning is not None), known_rows, states, spanning, voices),
        others=tuple(voices),
        specialty=None if specialties is None else torch.from_numpy(np.asarray(specialties, dtype=np.int64)[record]),
        words=together(words) if keep_words and words else None,
    )


def micro_batches(lengths: list[int], records: int, tokens: int | None, packed: bool) -> list[slice]:
    """Which of these records, side by side, are one micro-batch: at most so many, or instead so many tokens, with padding; a longer record is alone."""
    found, begin = [], 0
    for end in range(1, len(lengths) + 1):
        part = lengths[begin : end + 1]
        size = sum(part) if packed else len(part) * max(part)
        if end == len(lengths) or (size > tokens if tokens else end - begin == records):
            found.append(slice(begin, end))
            begin = end
    return found


def _ends(records: list[int], rows_at_once: int, whole: bool) -> list[int]:
    """Where parts end. records: rows of each; whole: no record is in two parts."""
    if not whole:
        total = sum(records)
        return [*range(rows_at_once, total, rows_at_once), total]
    ends = [0, 0]
    for count in records:
        if ends[-1] + count - ends[-2] > rows_at_once and ends[-1] > ends[-2]:
            ends.append(ends[-1])
        ends[-1] += count
    return ends[1:]


def _cuts(ends: list[int], known: np.ndarray, states: TeacherStates | None, chunks: Chunks | None, voices: list[Word]) -> list[Cut]:
    """known, and the flat lists of states and chunks, ascend."""
    bounds = np.array([0, *ends])
    of_known = np.searchsorted(known, bounds)
    none = np.zeros_like(bounds)
    lists = [bounds, of_known, none if states is None else np.searchsorted(states.row.numpy(), of_known)]
    lists += [none, none] if chunks is None else [np.searchsorted(chunks.row.numpy(), bounds), np.searchsorted(chunks.last.numpy(), bounds)]
    lists += [np.searchsorted(word.known.numpy(), bounds) for word in voices]
    parts = ([slice(begin, end) for begin, end in part] for part in zip(*(pairwise(places.tolist()) for places in lists), strict=True))
    return [Cut(rows, of_known, kept, chunk_rows, chunk, tuple(others)) for rows, of_known, kept, chunk_rows, chunk, *others in parts]


def made_ahead(make: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """make(item) for each item, in order; `workers` threads are at most that many items ahead. 0: made when asked for."""
    if workers == 0:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future[R]] = []
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
