"""The outcomes that a divergence is over: the target's tokens and one for all others, or every token where it is known how the rest is shared out."""

import math

import torch
from torch import Tensor

from pipeline.signals.projection import NO_SHARE, SparseTarget

LEAST = -16.0
"""Log-probability below which a teacher's is taken to be that: a target without a rest says that nobody knows, not that it cannot be."""


def outcomes(student: Tensor, teacher: SparseTarget) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the student's and the teacher's, float32 [N, C + 1], or [N, V]. Columns that are none have NO_SHARE in both.

    student: [N, V] logits. Both at the target's temperature; each row's probabilities sum to 1.
    """
    scaled = student.float() / teacher.temperature
    normaliser = scaled.logsumexp(-1, keepdim=True)
    there = teacher.probs > 0
    # what has no mass is of the rest, and what only fills a row up is some other column's token
    ids = torch.where(there, teacher.ids, teacher.top()[:, None])
    others = scaled.scatter(-1, ids, NO_SHARE)
    log_q = torch.where(there, teacher.probs.clamp(min=1e-38).log(), NO_SHARE)
    log_rest = torch.where(teacher.rest > 0, teacher.rest.clamp(min=1e-38).log(), NO_SHARE)
    log_others = others.logsumexp(-1, keepdim=True)
    log_shares = teacher.log_shares((others - log_others).detach())
    if log_shares is None:
        log_p = torch.where(there, scaled.gather(-1, ids) - normaliser, NO_SHARE)
        return torch.cat([log_p, log_others - normaliser], -1), torch.cat([log_q, log_rest[:, None]], -1)
    strongest = log_q.gather(-1, teacher.probs.argmax(-1, keepdim=True))
    return scaled - normaliser, (log_shares + log_rest[:, None]).clamp(min=NO_SHARE).scatter(-1, ids, torch.where(there, log_q, strongest))


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b), nats, [N]."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def mixed(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share * a + (1 - share) * b), 0 < share < 1."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def tempered(loss: Tensor, teacher: SparseTarget, squared: bool) -> Tensor:
    """Times the temperature's square, which keeps the gradient's size (Hinton et al. 2015, arXiv 1503.02531, section 2)."""
    return loss * teacher.temperature**2 if squared else loss
