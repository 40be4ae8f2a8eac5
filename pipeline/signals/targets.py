"""The teacher's word on a record: the log-probabilities of what is kept at each position, and the mass of all others.

Natural logarithms of probabilities at temperature 1 over the whole vocabulary.
"""

from dataclasses import dataclass, replace

import numpy as np

from pipeline.signals.attention import Rows


@dataclass(frozen=True)
class Targets:
    """A record's targets. The kept tokens lie flat, position after position."""

    position: np.ndarray  # int32 [P]; position t describes token t+1
    kept: np.ndarray  # uint16 [P] how many tokens are kept
    ids: np.ndarray  # int32 [sum of kept]
    logprobs: np.ndarray  # float32 [sum of kept]
    rests: np.ndarray  # float32 [S, P] log of the sum of exp(logprob / temperature) over the tokens not kept
    realised_logprob: np.ndarray  # float32 [P] of the token that follows in the record
    counts: np.ndarray | None = None  # uint8 [sum of kept] how often each token was drawn, if tokens were drawn
    entropy: np.ndarray | None = None  # float32 [P] nats, of the full distribution
    logsumexp: np.ndarray | None = None  # float32 [P] of the raw logits
    boundary: np.ndarray | None = None  # float32 [P, CLASSES] log mass of the classes of the next token's first byte
    hidden: np.ndarray | None = None  # int8 [P, H] the last hidden state, in units of hidden_scale
    hidden_scale: np.ndarray | None = None  # float32 [P]
    attention: dict[int, Rows] | None = None  # by layer, a row for each position (and head)


def rest_at(rests: np.ndarray, stored: list[float], unkept: np.ndarray, temperature: float | np.ndarray) -> np.ndarray:
    """float64 [P]: the log of the sum over the tokens not kept of exp(logprob / temperature), at any temperature >= 1.

    Through the stored values and the one that is known for an infinite temperature, log(unkept), a polynomial in
    1/temperature (Lagrange's form; exact at the stored temperatures). rests: [S, P]; unkept: [P], how many are not kept. temperature: one, or [P].
    """
    if not isinstance(temperature, np.ndarray) and temperature in stored:
        return rests[stored.index(temperature)].astype(np.float64)
    nodes = np.array([1 / t for t in stored] + [0.0])
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.concatenate([np.maximum(rests, -1e4).astype(np.float64), np.log(unkept.astype(np.float64))[None]])
        x = np.broadcast_to(1 / np.asarray(temperature, dtype=np.float64), rests.shape[1:])
        result = np.zeros(rests.shape[1])
        for i, node in enumerate(nodes):
            result = result + values[i] * np.prod([(x - other) / (node - other) for other in np.delete(nodes, i)], axis=0)
        # the true values are convex in 1/temperature: where a rest too faint for float32 bends the polynomial, the chord holds
        left = np.maximum((nodes[:, None] > x).sum(0) - 1, 0)
        low, high = (values[side, np.arange(len(x))] for side in (left, left + 1))
        result = np.minimum(result, low + (high - low) * (x - nodes[left]) / (nodes[left + 1] - nodes[left]))
    # nothing unkept, or nothing left to them by design: no mass at any temperature
    return np.where((unkept > 0) & (rests > -np.inf).any(0), result, -np.inf)


def with_realised(targets: Targets, realised: np.ndarray, temperatures: list[float]) -> Targets:
    """The same targets with the realised token among the kept ones everywhere, its mass taken out of the rests.

    realised: int32 [P], the token that follows each position. What was drawn stays as it is: it is an unbiased estimate.
    """
    if targets.counts is not None:
        return targets
    has = np.zeros(len(targets.kept), dtype=bool)
    counts = targets.kept.astype(np.int64)
    ends = np.cumsum(counts)
    has[np.searchsorted(ends, np.flatnonzero(targets.ids == np.repeat(realised, counts)), side="right")] = True
    missing = np.flatnonzero(~has & np.isfinite(targets.realised_logprob))
    if not len(missing):
        return targets
    counts[missing] += 1
    old = np.ones(len(targets.ids) + len(missing), dtype=bool)
    old[ends[missing] + np.arange(len(missing))] = False  # behind the others of its position
    ids = np.empty(len(old), dtype=targets.ids.dtype)
    ids[old], ids[~old] = targets.ids, realised[missing]
    logprobs = np.empty(len(old), dtype=targets.logprobs.dtype)
    logprobs[old], logprobs[~old] = targets.logprobs, targets.realised_logprob[missing]
    rests = targets.rests.copy()
    taken = targets.realised_logprob[missing].astype(np.float64) / np.array(temperatures)[:, None] - rests[:, missing]
    rests[:, missing] += _log1mexp(np.minimum(taken, -1e-7))
    return replace(targets, kept=counts.astype(targets.kept.dtype), ids=ids, logprobs=logprobs, rests=rests)


def _log1mexp(x: np.ndarray) -> np.ndarray:
    """log(1 - exp(x)) for x < 0 without cancellation (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    return np.where(x > -np.log(2), np.log(-np.expm1(x)), np.log1p(-np.exp(x)))
