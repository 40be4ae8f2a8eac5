import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipeline.errors import InputError
from pipeline.signals.chunks import Chunks
from pipeline.signals.outcomes import precise

SHIFT = 1e-6
"""Keeps a chunk that is certain away from where the logarithm ends."""
LEAST = 0.1
"""A stretch ends where the teacher expects at least so much that no word goes on."""


def alm(student: Tensor, realised: Tensor, chunks: Chunks, *, temperature: Annotated[float, Field(ge=0.01, le=1e6)] = 100.0, boundary: bool = False) -> Tensor:
    """Approximate likelihood matching: how unlike teacher and student find each smallest stretch of text that both cut out, nats, [N].

    The binary divergence between "this stretch" and "another one", both likelihoods taken to the power 1 / temperature, times
    the temperature (Minixhofer et al. 2025, arXiv 2503.20083, equation 4), less what the teacher has from itself: 0 where both
    are equal. It stands at the row of the stretch's last token. student: [N, V] logits; realised: int64 [N].

    boundary: both also say how likely it is that no word goes on behind the stretch, for a tokenizer's `kid` is not another's
    that has `kidney`; stretches are joined up to where the teacher expects that, as in the authors' tokenkit
    (`merge_by_space_prob+append_space`). Needs a cache with `targets.logits.boundary`.
    """
    logprob = -torch.nn.functional.cross_entropy(precise(student), realised, reduction="none")
    ours = logprob.new_zeros(len(chunks.logprob)).index_add(0, chunks.chunk, logprob[chunks.row])
    theirs, last = chunks.logprob, chunks.last
    if boundary:
        if chunks.boundary is None or chunks.begins_anew is None:
            raise InputError("The loss alm with `boundary: true` needs a cache made with `targets.logits.boundary: true`, and this one was not. Leave `boundary` out, or make such a cache.")
        ends = chunks.boundary >= math.log(LEAST)
        whole = ends | ~chunks.goes_on  # where a stretch is complete
        group = whole.cumsum(0) - whole.long()
        ours, theirs = (values.new_zeros(int(whole.sum())).index_add(0, group, values) for values in (ours, theirs))
        behind = precise(student.index_select(0, last[ends] + 1))
        expected = behind.masked_fill(~chunks.begins_anew, -torch.inf).logsumexp(-1) - behind.logsumexp(-1)
        ours, theirs = ours.index_add(0, group[ends], expected), theirs.index_add(0, group[ends], chunks.boundary[ends])
        last = last[whole]
    theirs, ours = theirs / temperature - SHIFT, ours / temperature - SHIFT
    divergence = temperature * (_binary(theirs, ours) - _binary(theirs, theirs))
    return logprob.new_zeros(len(logprob)).index_add(0, last, divergence)


def _binary(a: Tensor, b: Tensor) -> Tensor:
    """Cross entropy of two events: log-probability a of the first, b of the same in the other's eyes."""
    return -(a.exp() * b - torch.expm1(a) * _log1mexp(b))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 without cancellation (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    near = x > -0.6931471805599453
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x))))
