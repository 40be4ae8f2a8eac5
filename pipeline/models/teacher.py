"""What the teacher says of tokens: forward at fixed shapes, logits in chunks of positions."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import NumericsError
from pipeline.models.heads import RowLogits
from pipeline.signals.codec import encode_hidden
from pipeline.signals.records import Tokens
from pipeline.signals.selection import Kept, class_masses, concatenated, drawn, strongest, tail_sums
from pipeline.signals.targets import Targets

BUCKET = 32
"""Rows are padded to a multiple of so many tokens: the bits of a record's logits depend on the shape of its batch, not on its batch-mates."""
CHUNK_BYTES = 128 << 20
"""Of logits that exist at once, at two bytes each: the head's weights are read once per chunk."""
TAIL_EVERY = 4
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
        self.positions = 0

    def add(self, logits: Tensor, kept: Kept, temperatures: list[float]) -> None:
        self.positions += tail_sums(logits, kept, temperatures, self._sums, TAIL_EVERY)

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
    after_batch: Callable[[], None] = lambda: None,
) -> list[Targets]:
    """The teacher's targets for each record, at its answer positions or everywhere.

    NumericsError if the teacher's logits are not finite, with the record's number and the position in `.args[1:]`.
    """
    result: list[Targets | None] = [None] * len(records)
    for batch in _batches(records, batch_records):
        positions = [np.arange(len(records[i]) - 1, dtype=np.int32) if everywhere else records[i].answer_positions() for i in batch]
        for i, targets in zip(batch, _forward(teacher, [records[i] for i in batch], positions, question, tail, batch_records, batch), strict=True):
            result[i] = targets
        after_batch()
    return [targets for targets in result if targets is not None]


def positions_at_once(vocabulary_size: int) -> int:
    """Whose logits are made together: a fixed number, because their bits can depend on it."""
    return max(1, CHUNK_BYTES // (2 * vocabulary_size))


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


def _forward(teacher: RowLogits, records: list[Tokens], positions: list[np.ndarray], question: Question, tail: Tail | None, batch_records: int, numbers: list[int]) -> Iterator[Targets]:
    device = next(teacher.parameters()).device
    width = _bucket(max(len(tokens) for tokens in records))
    ids = np.zeros((batch_records, width), dtype=np.int64)  # short batches keep their shape: rows of zeros
    for row, tokens in enumerate(records):
        ids[row, : len(tokens)] = tokens.ids
    rows = np.concatenate([row * width + where for row, where in enumerate(positions)]).astype(np.int64)
    realised = np.concatenate([tokens.ids[where + 1] for tokens, where in zip(records, positions, strict=True)]).astype(np.int64)
    uniform = np.concatenate([_uniform(tokens, where, question.draws) for tokens, where in zip(records, positions, strict=True)])
    chunk = positions_at_once(teacher.vocabulary_size)
    kept: list[Kept] = []
    masses: list[Tensor] = []
    states: list[Tensor] = []
    with torch.inference_mode():
        hidden = teacher.hidden(torch.from_numpy(ids).to(device))
        for begin in range(0, len(rows), chunk):
            here = rows[begin : begin + chunk]
            wanted = np.zeros(chunk, dtype=np.int64)
            wanted[: len(here)] = here
            chosen = hidden[torch.from_numpy(wanted).to(device)]
            logits = teacher.head(chosen)[: len(here)]
            follows = torch.from_numpy(realised[begin : begin + chunk]).to(device)
            try:
                if question.draws:
                    kept.append(drawn(logits, follows, torch.from_numpy(uniform[begin : begin + chunk]), question.temperatures))
                else:
                    kept.append(strongest(logits, follows, question.threshold, question.least, question.most, question.temperatures))
            except NumericsError as error:
                row, position = divmod(int(here[error.args[1]]), width)
                raise NumericsError(error.args[0], numbers[row], position) from None
            if tail is not None:
                tail.add(logits, kept[-1], question.temperatures)
            if question.class_of is not None:
                masses.append(class_masses(logits, kept[-1].logsumexp, question.class_of, question.classes))
            if question.hidden:
                states.append(chosen[: len(here)].float())
    return _by_record(kept, masses, states, positions)


def _uniform(tokens: Tokens, positions: np.ndarray, draws: int) -> np.ndarray:
    """float64 [P, draws] in [0, 1): of these tokens alone, whatever the batch and the machine."""
    seed = int.from_bytes(hashlib.sha256(np.ascontiguousarray(tokens.ids, dtype="<i4").tobytes()).digest()[:16], "little")
    return np.random.Generator(np.random.Philox(key=seed)).random((len(positions), draws))


def _by_record(parts: list[Kept], masses: list[Tensor], states: list[Tensor], positions: list[np.ndarray]) -> Iterator[Targets]:
    """The kept tokens of all positions of a batch, shared out to its records."""
    if not parts:
        raise ValueError("a batch without a position")
    all = concatenated(parts)
    counts, ids, logprobs = (values.cpu().numpy() for values in (all.kept, all.ids, all.logprobs))
    rests, realised, entropy, logsumexp = (values.float().cpu().numpy() for values in (all.rests, all.realised_logprob, all.entropy, all.logsumexp))
    drawn_counts = None if all.counts is None else all.counts.cpu().numpy().astype(np.uint8)
    boundary = torch.cat(masses).cpu().numpy() if masses else None
    state, scale = encode_hidden(torch.cat(states).cpu().numpy()) if states else (None, None)
    ends = np.concatenate([[0], np.cumsum(counts)])
    first = 0
    for where in positions:
        here = slice(first, first + len(where))
        entries = slice(ends[first], ends[first + len(where)])
        yield Targets(
            position=where,
            kept=counts[here].astype(np.uint16),
            ids=ids[entries].astype(np.int32),
            logprobs=logprobs[entries],
            rests=rests[:, here],
            realised_logprob=realised[here],
            counts=None if drawn_counts is None else drawn_counts[entries],
            entropy=entropy[here],
            logsumexp=logsumexp[here],
            boundary=None if boundary is None else boundary[here],
            hidden=None if state is None else state[here],
            hidden_scale=None if scale is None else scale[here],
        )
        first += len(where)
