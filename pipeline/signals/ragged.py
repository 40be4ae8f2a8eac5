"""Rows of unlike length that lie flat, one behind the other."""

import numpy as np


def runs(begin: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The elements begin[i] .. begin[i] + length[i] - 1 of each run: int64 [sum of length] which run, and its index."""
    length = length.astype(np.int64)
    owner = np.repeat(np.arange(len(length)), length)
    return owner, np.arange(len(owner)) + (begin - np.cumsum(length) + length)[owner]


def begins(length: np.ndarray) -> np.ndarray:
    """int64: where each row that has any elements begins."""
    length = length.astype(np.int64)
    return (np.cumsum(length) - length)[length > 0]


def gaps(values: np.ndarray, length: np.ndarray) -> np.ndarray:
    """int32: the first value of each row, then from each to the next."""
    found = np.diff(values, prepend=0)
    first = begins(length)
    found[first] = values[first]
    return found.astype(np.int32)
