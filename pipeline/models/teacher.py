"""What the teacher says of tokens: forward at fixed shapes, logits in chunks of positions."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import NumericsError
from pipeline.models.attention import Capture
from pipeline.models.heads import RowLogits
from pipeline.signals.attention import Rows, heads_of
from pipeline.signals.codec import encode_hidden
from pipeline.signals.records import Tokens
from pipeline.signals.selection import Kept, class_masses, concatenated, drawn, strongest, tail_sums, workspace
from pipeline.signals.targets import Targets

BUCKET = 32
"""Rows are padded to a multiple of so many tokens: the bits of a record's logits depend on the shape of its batch, not on its batch-mates."""
CHUNK_BYTES = 128 << 20
"""Of logits that exist at once, at two bytes each: the head's weights are read once per chunk."""
CHUNK_POSITIONS = 2048
"""At most so many at once, where the vocabulary is small: a chunk is filled up with zeros."""
TAIL_EVERY = 8
"""Of the positions of a shard with tail marginals one in so many is looked at: averages need no more."""


@dataclass(frozen=True)
class Question:
    """What the teacher is asked for at a position."""

    temperatures: list[float]
    threshold: float
    least: int
    most: int
    draws: int = 0
    """0: the strongest tokens; otherwise so many are drawn."""
    class_of: Tensor | None = None  # int64 [V]
    classes: int = 0
    hidden: bool = False


class Tail:
    """Sums up, token by token, the probability that the teacher gives it where it is not kept."""

    def __init__(self, temperatures: list[float], vocabulary_size: int, device: torch.device) -> None:
        self._sums = torch.zeros((len(temperatures), vocabulary_size), device=device)
        self.reset()

    def reset(self) -> None:
        self._sums.zero_()
        self.positions = 0
        self._seen = 0

    def add(self, logits: Tensor, kept: Kept, temperatures: list[float], space: Tensor | None = None) -> None:
        # one of each few in a row, at random: answers of one length would else be looked at in the same places
        draw = np.random.Generator(np.random.Philox(key=self._seen))
        first = np.arange(0, len(logits), TAIL_EVERY)
        chosen = first + draw.integers(0, np.minimum(TAIL_EVERY, len(logits) - first))
        tail_sums(logits, kept, temperatures, self._sums, torch.from_numpy(chosen).to(logits.device), space)
        self.positions += len(chosen)
        self._seen += len(logits)

    def log_means(self, size: int) -> tuple[np.ndarray, int]:
        """float32 [S, size], -inf for what the head has no row for; and over how many positions."""
        means = (self._sums / max(self.positions, 1)).log().cpu().numpy()
        return np.pad(means, ((0, 0), (0, size - means.shape[1])), constant_values=-np.inf), self.positions


def said_of(
    teacher: RowLogits,
    records: Sequence[Tokens],
    question: Question,
    *,
    everywhere: bool,
    batch_records: int,
    tail: Tail | None = None,
    capture: Capture | None = None,
    after_batch: Callable[[], None] = lambda: None,
) -> list[Targets]:
    """The teacher's targets for each record, at its answer positions or everywhere. capture: what looks at its attention.

    NumericsError if the teacher's logits are not finite, with the record's number and the position in `.args[1:]`.
    """
    order: list[int] = []
    positions: list[np.ndarray] = []
    answers = _Answers(teacher, question, tail, capture)
    try:
        for batch in _batches(records, batch_records):
            where = [np.arange(len(records[i]) - 1, dtype=np.int32) if everywhere else records[i].answer_positions() for i in batch]
            order += batch
            positions += where
            answers.read([records[i] for i in batch], where, batch_records)
            after_batch()
        answers.rest()
    except NumericsError as error:
        ends = np.cumsum([len(where) for where in positions])
        record = int(np.searchsorted(ends, error.args[1], side="right"))
        raise NumericsError(error.args[0], order[record], int(positions[record][error.args[1] - ends[record]])) from None
    result: list[Targets | None] = [None] * len(records)
    for i, targets in zip(order, answers.by_record(positions), strict=True):
        result[i] = targets
    return [targets for targets in result if targets is not None]


def positions_at_once(vocabulary_size: int) -> int:
    """Whose logits are made together: a fixed number, because their bits can depend on it."""
    return max(1, min(CHUNK_POSITIONS, CHUNK_BYTES // (2 * vocabulary_size)))


def _batches(records: Sequence[Tokens], batch_records: int) -> Iterator[list[int]]:
    """Numbers of records of like length, at most batch_records each."""
    by_bucket: dict[int, list[int]] = {}
    for i, tokens in enumerate(records):
        by_bucket.setdefault(_bucket(len(tokens)), []).append(i)
    for bucket in sorted(by_bucket):
        numbers = by_bucket[bucket]
        for begin in range(0, len(numbers), batch_records):
            yield numbers[begin : begin + batch_records]


def _bucket(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


class _Answers:
    """The body batch by batch, the head on full chunks of positions whichever batch they are of."""

    def __init__(self, teacher: RowLogits, question: Question, tail: Tail | None, capture: Capture | None) -> None:
        self._teacher, self._question, self._tail, self._capture = teacher, question, tail, capture
        self._device = next(teacher.parameters()).device
        self._chunk = positions_at_once(teacher.vocabulary_size)
        self._logits = teacher.space(self._chunk)
        self._space = workspace(teacher.vocabulary_size, self._device)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # hidden states, what follows, numbers to draw with
        self._kept: list[Kept] = []
        self._masses: list[Tensor] = []
        self._states: list[Tensor] = []
        self._attention: list[dict[int, Rows]] = []
        self._done = 0

    @torch.inference_mode()
    def read(self, records: list[Tokens], positions: list[np.ndarray], batch_records: int) -> None:
        width = _bucket(max(len(tokens) for tokens in records))
        ids = np.zeros((batch_records, width), dtype=np.int64)  # short batches keep their shape: rows of zeros
        for row, tokens in enumerate(records):
            ids[row, : len(tokens)] = tokens.ids
        rows = np.concatenate([row * width + where for row, where in enumerate(positions)]).astype(np.int64)
        follows = np.concatenate([tokens.ids[where + 1] for tokens, where in zip(records, positions, strict=True)]).astype(np.int64)
        draws = np.concatenate([_uniform(tokens, where, self._question.draws) for tokens, where in zip(records, positions, strict=True)])
        if self._capture is not None:
            self._capture.rows(rows)
        states = self._teacher.hidden(torch.from_numpy(ids).to(self._device))
        if self._capture is not None:
            self._attention.append(self._capture.taken())
        self._waiting.append((states[torch.from_numpy(rows).to(self._device)], torch.from_numpy(follows).to(self._device), torch.from_numpy(draws)))
        hidden, realised, uniform = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        whole = len(hidden) // self._chunk * self._chunk
        for begin in range(0, whole, self._chunk):
            self._ask(hidden[begin : begin + self._chunk], realised[begin : begin + self._chunk], uniform[begin : begin + self._chunk])
        self._waiting = [(hidden[whole:], realised[whole:], uniform[whole:])]

    @torch.inference_mode()
    def rest(self) -> None:
        """The positions that fill no chunk."""
        for hidden, realised, uniform in self._waiting:
            if len(hidden):
                self._ask(hidden, realised, uniform)

    def _ask(self, hidden: Tensor, realised: Tensor, uniform: Tensor) -> None:
        question = self._question
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, self._chunk - len(hidden)))  # a chunk keeps its shape, too
        logits = self._teacher.head(padded, self._logits)[: len(hidden)]
        try:
            kept = drawn(logits, realised, uniform, question.temperatures, self._space) if question.draws else self._strongest(logits, realised)
        except NumericsError as error:
            raise NumericsError(error.args[0], self._done + error.args[1]) from None
        if self._tail is not None:
            self._tail.add(logits, kept, question.temperatures, self._space)
        if question.class_of is not None:
            self._masses.append(class_masses(logits, kept.logsumexp, question.class_of, question.classes, self._space))
        if question.hidden:
            self._states.append(hidden.float())
        self._kept.append(kept)
        self._done += len(hidden)

    def _strongest(self, logits: Tensor, realised: Tensor) -> Kept:
        question = self._question
        return strongest(logits, realised, question.threshold, question.least, question.most, question.temperatures, self._space)

    def by_record(self, positions: list[np.ndarray]) -> Iterator[Targets]:
        """The kept tokens of all positions, shared out to their records."""
        if self._kept:
            boundary = torch.cat(self._masses).cpu().numpy() if self._masses else None
            states = torch.cat(self._states).cpu().numpy() if self._states else None
            attention = {layer: Rows.joined([batch[layer] for batch in self._attention]) for layer in (self._attention[0] if self._attention else {})}
            yield from shared_out(concatenated(self._kept), positions, boundary, states, attention or None)


def shared_out(kept: Kept, positions: list[np.ndarray], boundary: np.ndarray | None = None, states: np.ndarray | None = None, attention: dict[int, Rows] | None = None) -> Iterator[Targets]:
    """What is kept of all positions, record by record. positions: those of each record; boundary: [N, CLASSES]; states: [N, H]; attention: by layer."""
    counts, ids, logprobs = (values.cpu().numpy() for values in (kept.kept, kept.ids, kept.logprobs))
    rests, realised, entropy, logsumexp = (values.float().cpu().numpy() for values in (kept.rests, kept.realised_logprob, kept.entropy, kept.logsumexp))
    draws = None if kept.counts is None else kept.counts.cpu().numpy().astype(np.uint8)
    hidden, scale = (None, None) if states is None else encode_hidden(states)
    ends = np.concatenate([[0], np.cumsum(counts)])
    first = 0
    looked = {layer: rows.split([len(where) * heads_of(rows, counts) for where in positions]) for layer, rows in (attention or {}).items()}
    for number, where in enumerate(positions):
        here = slice(first, first + len(where))
        entries = slice(ends[first], ends[first + len(where)])
        yield Targets(
            position=where,
            kept=counts[here].astype(np.uint16),
            ids=ids[entries].astype(np.int32),
            logprobs=logprobs[entries],
            rests=rests[:, here],
            realised_logprob=realised[here],
            counts=None if draws is None else draws[entries],
            entropy=entropy[here],
            logsumexp=logsumexp[here],
            boundary=None if boundary is None else boundary[here],
            hidden=None if hidden is None else hidden[here],
            hidden_scale=None if scale is None else scale[here],
            attention=None if attention is None else {layer: rows[number] for layer, rows in looked.items()},
        )
        first += len(where)


def _uniform(tokens: Tokens, positions: np.ndarray, draws: int) -> np.ndarray:
    """float64 [P, draws] in [0, 1): of these tokens alone, whatever the batch and the machine."""
    seed = int.from_bytes(hashlib.sha256(np.ascontiguousarray(tokens.ids, dtype="<i4").tobytes()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=seed)).random((len(positions), draws))
