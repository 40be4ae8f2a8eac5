"""How numbers are stored, with the largest error that this makes."""

import numpy as np

LOGPROB_ERROR = 2.0**-11
"""A stored log-probability differs from the true one by at most this share of it, or by 2^-25 (float16; 0.008 nats at exp(-16))."""
SMALLEST = -65504.0
"""What is below, -inf included, is stored as this: exp of it is 0."""


def encode_logprobs(logprobs: np.ndarray) -> np.ndarray:
    """float16 of float32 log-probabilities."""
    return np.maximum(logprobs, SMALLEST).astype(np.float16)


def decode_logprobs(stored: np.ndarray) -> np.ndarray:
    """float32 of what encode_logprobs gave."""
    return np.asarray(stored).astype(np.float32)
