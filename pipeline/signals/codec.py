"""How a teacher's word is stored: one byte a log-probability, the gap between frequency ranks a token id, steps of 0.05 a rest.

Every encoder has its decoder; flat lists run over positions, position after position. docs/cache-format.md says the same in words.
"""

import numpy as np

from pipeline.signals.ragged import begins, gaps

CODES = 256
REST_STEP = 0.05
"""Nats. A stored rest differs from the true one by at most half of it."""
NO_REST = -32768
"""Stored for a rest of -inf: nothing is left."""


def step_table(narrow: float, wide: float) -> np.ndarray:
    """float64 [256]: the log-probability that a code stands for, min(wide, narrow * exp(-logprob / 2)) nats apart.

    With F' = 1 / step, code c is where F(0) - F(logprob) = c: uniform in the square root of the probability near the top
    (an error in probability of narrow / 2 * sqrt(p)), uniform in its logarithm below. The last also stands for all below.
    """
    code = np.arange(CODES)
    knee = min(-2 * float(np.log(wide / narrow)), 0.0)  # where both are equal
    knee_code = 2 / narrow * (1 - float(np.exp(knee / 2)))
    upper = 2 * np.log(np.maximum(1 - narrow * code / 2, 1e-30))
    return np.where(code <= knee_code, upper, knee - wide * (code - knee_code))


def count_table(draws: int) -> np.ndarray:
    """float64 [256]: the log-probability that a count of draws stands for; -1e4 for none."""
    count = np.arange(CODES)
    return np.where(count > 0, np.log(np.maximum(count, 1) / draws), -1e4)


def encode_logprobs(logprobs: np.ndarray, kept: np.ndarray, table: np.ndarray) -> np.ndarray:
    """uint8: the code of the nearest entry of a falling table, but no other token has that of its position's strongest.

    Of equally strong ones the first counts, so ascending ids give the total order's.
    """
    between = ((table[1:] + table[:-1]) / 2)[::-1].astype(np.float32)
    codes = (CODES - 1 - np.searchsorted(between, logprobs)).astype(np.uint8)
    first = begins(kept)
    if not len(first):
        return codes
    at_top = np.flatnonzero(logprobs == np.repeat(np.maximum.reduceat(logprobs, first), kept[kept > 0]))
    position = np.searchsorted(first, at_top, side="right")
    argmax = at_top[np.diff(position, prepend=0) > 0]
    codes[argmax] = np.minimum(codes[argmax], CODES - 2)
    tied = codes == np.repeat(codes[argmax], kept[kept > 0])
    tied[argmax] = False
    codes[tied] += 1
    return codes


def logprob_error(logprobs: np.ndarray, table: np.ndarray) -> np.ndarray:
    """float64: by how much a log-probability between the table's ends can differ from its code's, before positions are normalised.

    Half the distance of its two codes, and the next one for a token that gave way to its position's strongest.
    """
    above = np.clip(CODES - 1 - np.searchsorted(table[::-1], logprobs), 0, CODES - 3)
    return (table[above] - table[above + 1]) / 2 + table[above + 1] - table[above + 2]


def ranks(ids: np.ndarray) -> np.ndarray:
    """int32 [R]: the tokens among `ids`, those that occur more often first (in classes of doubled counts, ascending inside one).

    A token's rank is its place there. Classes, not counts: ascending runs make the list itself cheap to store.
    """
    counts = np.bincount(ids) if len(ids) else np.zeros(0, dtype=np.int64)
    there = np.flatnonzero(counts)
    return there[np.argsort(-np.frexp(counts[there].astype(np.float64))[1], kind="stable")].astype(np.int32)


def encode_ids(ids: np.ndarray, codes: np.ndarray, kept: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gaps between ascending ranks inside a position (the first is the rank itself), int32, and the codes in that order.

    order: what `ranks` gave, or another list that has every id once. ids are unique inside a position.
    """
    rank_of = np.zeros(int(order.max(initial=-1)) + 1, dtype=np.int64)
    rank_of[order] = np.arange(len(order))
    owner = np.repeat(np.arange(len(kept)), kept)
    key = np.sort(((owner * len(order) + rank_of[ids]) << 8) | codes)
    rank = (key >> 8) - owner * len(order)
    return gaps(rank, kept), (key & 255).astype(np.uint8)


def decode_ids(stored: np.ndarray, kept: np.ndarray, order: np.ndarray) -> np.ndarray:
    """int32: the ids, ranks ascending inside a position. IndexError if a rank is not in `order`."""
    rank = np.cumsum(stored, dtype=np.int32)  # where it wraps around, the differences do not
    first = begins(kept)
    rank -= np.repeat(rank[first] - stored[first], kept[kept > 0])
    if len(rank) and (rank.min() < 0 or rank.max() >= len(order)):
        raise IndexError("a rank that no token has")
    return order.take(rank)


def encode_rests(rests: np.ndarray) -> np.ndarray:
    """int16 of log masses in nats; -inf, and what is below -1638, is stored as NO_REST."""
    steps = np.rint(np.maximum(rests, NO_REST * REST_STEP) / REST_STEP)
    return np.clip(steps, NO_REST, -NO_REST - 1).astype(np.int16)


def decode_rests(stored: np.ndarray) -> np.ndarray:
    """float32 nats."""
    return np.where(stored == NO_REST, -np.inf, stored * np.float32(REST_STEP)).astype(np.float32)


def decode_logprobs(codes: np.ndarray, kept: np.ndarray, table: np.ndarray, rest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kept log-probabilities and the log rest at temperature 1, float32, such that a position's mass is 1.

    Each code is off by up to half a step, and so is their sum; all outcomes are divided by it.
    """
    mass = np.zeros(len(kept))
    filled = kept > 0
    if len(codes):
        mass[filled] = np.add.reduceat(np.exp(table)[codes], begins(kept))
    with np.errstate(divide="ignore"):
        normaliser = np.log(mass + np.exp(rest.astype(np.float64)))
    shift = np.where(np.isfinite(normaliser), normaliser, 0.0).astype(np.float32)
    return table.astype(np.float32)[codes] - np.repeat(shift, kept), rest - shift


def encode_hidden(hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [P, H] and float32 [P]: a state is its row times its scale, off by at most half a scale per element."""
    scale = np.abs(hidden).max(-1, initial=0.0).astype(np.float32) / 127
    return np.rint(hidden / np.maximum(scale, 1e-30)[:, None]).astype(np.int8), scale


def decode_hidden(stored: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 [P, H]."""
    return stored.astype(np.float32) * scale[:, None]


def spans(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int32, int32: first positions and lengths of the runs of ascending positions."""
    first = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    return positions[first].astype(np.int32), np.diff(first, append=len(positions)).astype(np.int32)


def positions_of(first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int32: the positions that spans are of."""
    return (np.repeat(first - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())).astype(np.int32)
