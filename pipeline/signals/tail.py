"""The calibrated tail: what the teacher gives each token on the average where it is not kept, against what the student gives it.

At a position only the mass of the unkept tokens is known. Shared out as the student does, it is right about head against rest
and says nothing about the tail's shape. One ratio per token and temperature makes the tail's average over the corpus the teacher's.
"""

import numpy as np
import torch
from torch import Tensor

from pipeline.signals.projection import NO_SHARE, REST, SparseTarget

FARTHEST = 5.0
"""Log ratios are taken no further from 0: a token's average may be estimated from next to nothing."""


def means_at(log_means: np.ndarray, stored: list[float], temperature: float) -> np.ndarray:
    """float64 [V]: a token's log mean at any temperature >= 1: linear in 1/temperature between the stored ones and log(1/V) at infinity.

    log_means: [S, V].
    """
    if temperature in stored:
        return log_means[stored.index(temperature)]
    nodes = [1 / t for t in stored] + [0.0]
    values = np.concatenate([np.maximum(log_means, -1e4), np.full((1, log_means.shape[1]), -np.log(log_means.shape[1]))])
    left = sum(node > 1 / temperature for node in nodes) - 1
    share = (1 / temperature - nodes[left]) / (nodes[left + 1] - nodes[left])
    return values[left] * (1 - share) + values[left + 1] * share


def placed_means(log_means: np.ndarray, student_id: np.ndarray, student_size: int) -> np.ndarray:
    """float64 [S, V_student]: the same in the student's tokens; NaN for those that no teacher token is mapped to.

    student_id: int32 [V_teacher]; REST: none.
    """
    placed = student_id != REST
    there = student_id[placed]
    sums = np.stack([np.bincount(there, np.exp(means[placed]), student_size) for means in log_means])
    with np.errstate(divide="ignore"):
        logs = np.log(sums)
    logs[:, np.bincount(there, minlength=student_size) == 0] = np.nan
    return logs


def student_sums(student: Tensor, target: SparseTarget) -> Tensor:
    """float32 [V]: per token the sum, over the rows whose target does not name it, of the target's rest times the student's share of it.

    student: [N, V] logits.
    """
    log_shares = (student.float() / target.column).scatter(-1, target.ids, NO_SHARE).log_softmax(-1)
    return target.rest @ log_shares.exp()


def log_ratio(teacher: Tensor, student: Tensor) -> Tensor:
    """float32 [V] from the averages of both, 0 where the teacher's is NaN."""
    ratio = (teacher.clamp(min=1e-30) / student.clamp(min=1e-30)).log()
    return torch.nan_to_num(ratio, nan=0.0).clamp(-FARTHEST, FARTHEST).float()


def placed_logits(logits: Tensor, kept: tuple[Tensor, Tensor], temperature: float | Tensor, student_id: Tensor, student_size: int) -> Tensor:
    """float32 [N, V_student]: the log of the share of the teacher's rest that goes to each student token by the map, up to a constant per row.

    logits: [N, V_teacher] of the teacher. kept: int64 [E] and [E], rows and the teacher's tokens that are no part of the rest
    there: where their mass goes is known, and may be elsewhere than the map says. temperature: one, or [N, 1]. student_id: int64 [V_teacher]; REST: none.
    """
    placed = (student_id != REST).nonzero()[:, 0]
    probs = (logits.float() / temperature).index_put(kept, logits.new_tensor(NO_SHARE, dtype=torch.float32)).softmax(-1)
    return torch.zeros((len(logits), student_size), device=logits.device).index_add_(1, student_id[placed], probs[:, placed]).clamp(min=1e-37).log()
