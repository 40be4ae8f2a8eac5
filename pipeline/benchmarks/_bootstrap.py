"""How far a mean could have come out otherwise: percentile bootstrap over held-out records, and over seeds where there are several.

A figure is a ratio of two sums over records (KL over aligned positions, nats over bytes), and of several seeds the mean of
their ratios. The records are the same for every seed, so records and seeds are drawn independently of each other, with
replacement: a record that is drawn twice counts twice under every seed.
"""

from collections.abc import Iterator

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
AT_ONCE = 1 << 22
"""Draws that are held in memory."""
RECORDS, SEEDS = 1, 2
"""What a generator of draws is for, so that no two draw the same."""


def resampled(over: np.ndarray, under: np.ndarray, resamples: int = RESAMPLES, stream: int = 0) -> np.ndarray:
    """float64 [resamples, F]: the ratios of the sums of F figures, in each resample of the records. NaN where `under` sums to 0.

    over, under: [records, F]. Figures that are given together meet the same draws; so do those of other calls with the
    same stream and number of records.
    """
    records, figures = over.shape
    both = np.concatenate([over, under], 1, dtype=np.float64)
    sums = np.concatenate([counts @ both for counts in _counts(records, resamples, stream)])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[:, figures:] != 0, sums[:, :figures] / sums[:, figures:], np.nan)


def over_seeds(ratios: np.ndarray, apart: bool = False) -> np.ndarray:
    """float64 [resamples]: the mean over seeds that are drawn, too. ratios: [resamples, seeds]; of one seed they are the result.

    The same draws for as many seeds, so that the same seeds stay together; apart: other draws.
    """
    resamples, seeds = ratios.shape
    if seeds == 1:
        return ratios[:, 0]
    drawn = np.random.default_rng([SEEDS, int(apart)]).integers(0, seeds, (resamples, seeds))
    return np.take_along_axis(ratios, drawn, 1).mean(1)


def interval(values: np.ndarray) -> tuple[float, float] | None:
    """What the middle 95 % of the resamples lie between; None if a figure was not there in too many of them."""
    known = values[np.isfinite(values)]
    if len(known) < LEVEL * len(values):
        return None
    low, high = np.percentile(known, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def _counts(records: int, resamples: int, stream: int) -> Iterator[np.ndarray]:
    """float64 [block, records]: how often each record was drawn."""
    generator = np.random.default_rng([RECORDS, stream] if stream else 0)
    block = max(AT_ONCE // records, 1)
    for begin in range(0, resamples, block):
        rows = min(block, resamples - begin)
        drawn = generator.integers(0, records, (rows, records)) + np.arange(rows)[:, None] * records
        yield np.bincount(drawn.ravel(), minlength=rows * records).reshape(rows, records).astype(np.float64)
