"""What the teacher says of tokens: forward at fixed shapes, logits in chunks of positions."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import NumericsError
from pipeline.models.heads import RowLogits
from pipeline.signals.records import Tokens
from pipeline.signals.targets import Kept, Targets, concatenated, strongest

BUCKET = 32
"""Rows are padded to a multiple of so many tokens: the bits of a record's logits depend on the shape of its batch, not on its batch-mates."""
CHUNK_BYTES = 64 << 20
"""Of float32 logits that exist at once."""


def said_of(
    teacher: RowLogits,
    records: Sequence[Tokens],
    *,
    everywhere: bool,
    keep: int,
    temperatures: list[float],
    batch_records: int,
) -> list[Targets]:
    """The teacher's targets for each record, at its answer positions or everywhere.

    NumericsError if the teacher's logits are not finite, with the record's number and the position in `.args[1:]`.
    """
    result: list[Targets | None] = [None] * len(records)
    for batch in _batches(records, batch_records):
        positions = [np.arange(len(records[i]) - 1, dtype=np.int32) if everywhere else records[i].answer_positions() for i in batch]
        kept = _forward(teacher, [records[i] for i in batch], positions, keep, temperatures, batch_records, batch)
        first = 0
        for i, where in zip(batch, positions, strict=True):
            result[i] = _targets(kept, first, where)
            first += len(where)
    return [targets for targets in result if targets is not None]


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


def _forward(
    teacher: RowLogits,
    records: list[Tokens],
    positions: list[np.ndarray],
    keep: int,
    temperatures: list[float],
    batch_records: int,
    numbers: list[int],
) -> Kept:
    device = next(teacher.parameters()).device
    width = _bucket(max(len(tokens) for tokens in records))
    ids = np.zeros((batch_records, width), dtype=np.int64)  # short batches keep their shape: rows of zeros
    for row, tokens in enumerate(records):
        ids[row, : len(tokens)] = tokens.ids
    rows = np.concatenate([row * width + where for row, where in enumerate(positions)]).astype(np.int64)
    realised = np.concatenate([tokens.ids[where + 1] for tokens, where in zip(records, positions, strict=True)]).astype(np.int64)
    chunk = max(1, CHUNK_BYTES // (4 * teacher.vocabulary_size))
    parts: list[Kept] = []
    with torch.inference_mode():
        hidden = teacher.hidden(torch.from_numpy(ids).to(device))
        for begin in range(0, len(rows), chunk):
            wanted = np.zeros(chunk, dtype=np.int64)
            here = rows[begin : begin + chunk]
            wanted[: len(here)] = here
            logits = teacher.head(hidden[torch.from_numpy(wanted).to(device)])[: len(here)]
            follows = torch.from_numpy(realised[begin : begin + chunk]).to(device)
            try:
                parts.append(strongest(logits, follows, keep, temperatures))
            except NumericsError as error:
                row, position = divmod(int(here[error.args[1]]), width)
                raise NumericsError(error.args[0], numbers[row], position) from None
    return concatenated(parts)


def _targets(kept: Kept, first: int, positions: np.ndarray) -> Targets:
    here = slice(first, first + len(positions))

    def flat(values: Tensor, kind: type) -> np.ndarray:
        return values[here].reshape(-1).cpu().numpy().astype(kind)

    return Targets(
        position=positions,
        kept=np.full(len(positions), kept.ids.shape[1], dtype=np.uint16),
        ids=flat(kept.ids, np.int32),
        logprobs=flat(kept.logprobs, np.float32),
        rests=kept.rests[:, here].cpu().numpy().astype(np.float32),
        realised_logprob=flat(kept.realised_logprob, np.float32),
        entropy=flat(kept.entropy, np.float32),
    )
