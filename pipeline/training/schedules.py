"""Numbers that change over training, as pure functions of the step: nothing to save, nothing to restore."""

import math


def value_at(step: int, steps: int, start: float, end: float, schedule: str) -> float:
    """The scheduled value at a step from 0 to steps - 1: `start` at the first, `end` at the last.

    constant: start. linear: equal differences. exponential: equal ratios. cosine: half a cosine wave (SGDR, arXiv 1608.03983).
    """
    progress = step / max(steps - 1, 1)
    if schedule == "constant":
        return start
    if schedule == "linear":
        return start + (end - start) * progress
    if schedule == "exponential":
        return float(start * (end / start) ** progress)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate_at(step: int, steps: int, warmup_steps: int, start: float, end: float, schedule: str) -> float:
    """Like value_at, after a linear rise from 0 over the first warmup_steps; the last of them is the first at `start`."""
    if step < warmup_steps:
        return start * (step + 1) / warmup_steps
    return value_at(step - warmup_steps, max(steps - warmup_steps, 1), start, end, schedule)
