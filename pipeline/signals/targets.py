"""The teacher's word at a position: the log-probabilities of its strongest tokens and the mass of all others.

From `strongest` on these are natural logarithms of probabilities at temperature 1 over the whole vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import NumericsError


@dataclass(frozen=True)
class Targets:
    """A record's targets. The kept tokens lie flat, position after position, each position's strongest first."""

    position: np.ndarray  # int32 [P]; position t describes token t+1
    kept: np.ndarray  # uint16 [P] how many tokens are kept
    ids: np.ndarray  # int32 [sum of kept]
    logprobs: np.ndarray  # float32 [sum of kept]
    rests: np.ndarray  # float32 [S, P] log of the sum of exp(logprob / temperature) over the tokens not kept
    realised_logprob: np.ndarray  # float32 [P] of the token that follows in the record
    entropy: np.ndarray  # float32 [P] nats, of the full distribution


@dataclass(frozen=True)
class Kept:
    """What `strongest` keeps of a chunk of positions, on the device."""

    ids: Tensor  # int64 [N, K]
    logprobs: Tensor  # float32 [N, K]
    rests: Tensor  # float32 [S, N]
    realised_logprob: Tensor  # float32 [N]
    entropy: Tensor  # float32 [N]


def strongest(logits: Tensor, realised: Tensor, keep: int, temperatures: list[float]) -> Kept:
    """Keep the `keep` strongest tokens per position; ties at the cut by the lower id.

    logits: [N, V], any float type (-inf: a row of the head that is no token); overwritten where it is float32.
    realised: int64 [N], the ids that follow. NumericsError, naming the row in `.args[1]`, if a logit is NaN or +inf or all are -inf.
    """
    logits = logits.float()
    normaliser = logits.logsumexp(-1)  # [N]
    # a NaN or +inf anywhere, or nothing finite, shows in the normaliser
    wrong = ~normaliser.isfinite()
    if wrong.any():
        raise NumericsError("the logits are not finite", int(wrong.nonzero()[0, 0]))
    keep = min(keep, logits.shape[-1])
    logprobs = logits.sub_(normaliser[:, None])
    realised_logprob = logprobs.gather(-1, realised[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
    ids = _top(logprobs, keep)
    kept = logprobs.gather(-1, ids)
    logprobs.scatter_(-1, ids, -torch.inf)
    rests = torch.stack([(logprobs / temperature).logsumexp(-1) for temperature in temperatures])
    return Kept(ids, kept, rests, realised_logprob, entropy)


def _top(values: Tensor, keep: int) -> Tensor:
    """int64 [N, keep]: the ids of the largest values, (value descending, id ascending): a total order, unlike topk's own."""
    found, ids = values.topk(keep, sorted=True)
    last = found[:, -1:]
    tied = (values >= last).sum(-1) > keep
    # inside the kept ones, equal values are put in the order of their ids
    order = ids.argsort(-1)
    order = order.gather(-1, found.gather(-1, order).argsort(-1, descending=True, stable=True))
    ids = ids.gather(-1, order)
    for row in tied.nonzero()[:, 0].tolist():
        candidates = (values[row] >= last[row]).nonzero()[:, 0]
        ids[row] = candidates[values[row][candidates].argsort(descending=True, stable=True)][:keep]
    return ids


def rest_at(rests: np.ndarray, stored: list[float], unkept: np.ndarray, temperature: float) -> np.ndarray:
    """float64 [P]: the log of the sum over the tokens not kept of exp(logprob / temperature), at any temperature >= 1.

    Through the stored values and the one that is known for an infinite temperature, log(unkept), a polynomial in
    1/temperature (Lagrange's form; exact at the stored temperatures). rests: [S, P]; unkept: [P], how many are not kept.
    """
    if temperature in stored:
        return rests[stored.index(temperature)].astype(np.float64)
    nodes = np.array([1 / t for t in stored] + [0.0])
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.concatenate([np.maximum(rests, -1e4).astype(np.float64), np.log(unkept.astype(np.float64))[None]])
        x = 1 / temperature
        result = np.zeros(rests.shape[1])
        for i, node in enumerate(nodes):
            others = np.delete(nodes, i)
            result = result + values[i] * np.prod((x - others) / (node - others))
    # nothing unkept: no mass at any temperature
    return np.where(unkept > 0, result, -np.inf)


def with_realised(targets: Targets, realised: np.ndarray, temperatures: list[float]) -> Targets:
    """The same targets with the realised token among the kept ones everywhere, its mass taken out of the rests.

    realised: int32 [P], the token that follows each position.
    """
    owner = np.repeat(np.arange(len(targets.kept)), targets.kept)
    has = np.zeros(len(targets.kept), dtype=bool)
    has[owner[targets.ids == realised[owner]]] = True
    missing = np.flatnonzero(~has & np.isfinite(targets.realised_logprob))
    if not len(missing):
        return targets
    after = np.cumsum(targets.kept.astype(np.int64))[missing]
    rests = targets.rests.copy()
    for i, temperature in enumerate(temperatures):
        taken = targets.realised_logprob[missing].astype(np.float64) / temperature - rests[i, missing]
        rests[i, missing] += _log1mexp(np.minimum(taken, -1e-7))
    kept = targets.kept.copy()
    kept[missing] += 1
    return Targets(
        position=targets.position,
        kept=kept,
        ids=np.insert(targets.ids, after, realised[missing]),
        logprobs=np.insert(targets.logprobs, after, targets.realised_logprob[missing]),
        rests=rests,
        realised_logprob=targets.realised_logprob,
        entropy=targets.entropy,
    )


def _log1mexp(x: np.ndarray) -> np.ndarray:
    """log(1 - exp(x)) for x < 0 without cancellation (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    return np.where(x > -np.log(2), np.log(-np.expm1(x)), np.log1p(-np.exp(x)))
