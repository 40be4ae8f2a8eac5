"""Rows of unlike length that lie flat, one behind the other."""

import numpy as np


def runs(begin: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The elements begin[i] .. begin[i] + length[i] - 1 of each run: int64 [sum of length] which run, and its index."""
    length = length.astype(np.int64)
    owner = np.repeat(np.arange(len(length)), length)
    return owner, np.arange(len(owner)) + (begin - np.cumsum(length) + length)[owner]
