"""The outcomes that a divergence is over: the target's tokens and one for all others, or every token where it is known how the rest is shared out."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.signals.projection import NO_SHARE, SparseTarget

LEAST = -16.0
"""Log-probability below which a teacher's is taken to be that: a target without a rest says that nobody knows, not that it cannot be."""


def outcomes(student: Tensor, teacher: SparseTarget) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the student's and the teacher's, [N, C + 1], or [N, V]. Columns that are none have NO_SHARE in both.

    student: [N, V] logits. Both at the target's temperature; each row's probabilities sum to 1.
    """
    there = teacher.probs > 0
    # what has no mass is of the rest, and what only fills a row up is some other column's token
    ids = torch.where(there, teacher.ids, teacher.top()[:, None])
    log_q = torch.where(there, teacher.probs.clamp(min=1e-38).log(), NO_SHARE)
    log_rest = torch.where(teacher.rest > 0, teacher.rest.clamp(min=1e-38).log(), NO_SHARE)
    if not teacher.shapes_rest:
        log_p = log_outcomes(student, ids, teacher.column)
        return torch.cat([log_p[:, :-1].masked_fill(~there, NO_SHARE), log_p[:, -1:]], -1), torch.cat([log_q, log_rest[:, None]], -1)
    scaled = precise(student) / teacher.column
    others = scaled.detach().scatter(-1, ids, NO_SHARE)
    log_shares = teacher.log_shares(others.log_softmax(-1))
    strongest = log_q.gather(-1, teacher.probs.argmax(-1, keepdim=True))
    return scaled.log_softmax(-1), (log_shares + log_rest[:, None]).clamp(min=NO_SHARE).scatter(-1, ids, torch.where(there, log_q, strongest))


def log_outcomes(student: Tensor, ids: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """[N, C + 1]: the student's log-probabilities of these tokens, and that of all others together.

    student: [N, V] logits; ids: int64 [N, C], where a token may be repeated; temperature: one, or [N, 1]. The others' is the log of their sum, not of 1 less the
    tokens': that cancels.
    """
    result: Tensor = _LogOutcomes.apply(student, ids, temperature)
    return result


class _LogOutcomes(torch.autograd.Function):
    """Only one [N, V] is made: the others' shares of their sum. All of the gradient is these, times one number a row, but for the tokens'."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, ids: Tensor, temperature: float | Tensor) -> Tensor:
        scaled = precise(student) / temperature
        tokens = scaled.gather(-1, ids)
        scaled.scatter_(-1, ids, NO_SHARE)
        top, at = scaled.max(-1, keepdim=True)
        shares = scaled.softmax(-1)
        log_others = top - shares.gather(-1, at).log()
        # each token once, however often it is repeated
        ascending, order = ids.sort(stable=True, dim=-1)
        new = torch.cat([torch.ones_like(ascending[:, :1], dtype=torch.bool), ascending[:, 1:] != ascending[:, :-1]], -1)
        first = torch.zeros_like(new).scatter(-1, order, new)
        normaliser = torch.logaddexp(log_others, tokens.masked_fill(~first, NO_SHARE).logsumexp(-1, keepdim=True))
        log_p = torch.cat([tokens, log_others], -1) - normaliser
        ctx.kept, ctx.dtype = (shares, ids, temperature, log_p), student.dtype
        return log_p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        shares, ids, temperature, log_p = ctx.kept
        del ctx.kept
        of_all = slope.sum(-1, keepdim=True)
        p = log_p.exp()
        gradient = shares.mul_((slope[:, -1:] - of_all * p[:, -1:]) / temperature)
        gradient.scatter_(-1, ids, (-of_all * p[:, :-1] / temperature))
        gradient.scatter_add_(-1, ids, slope[:, :-1] / temperature)
        return gradient.to(ctx.dtype), None, None


def precise(logits: Tensor) -> Tensor:
    """In float32, or in float64 if they are."""
    return logits if logits.dtype is torch.float64 else logits.float()


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b), nats, [N]."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def mixed(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """log(share * a + (1 - share) * b), 0 < share < 1."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def tempered(loss: Tensor, teacher: SparseTarget, squared: bool) -> Tensor:
    """Times the temperature's square, which keeps the gradient's size (Hinton et al. 2015, arXiv 1503.02531, section 2)."""
    return loss * teacher.temperature**2 if squared else loss
