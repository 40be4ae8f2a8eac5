"""The teacher's word at a position: the log-probabilities of its strongest tokens and the mass of all others.

From `strongest` on these are natural logarithms of probabilities at temperature 1 over the whole vocabulary.
"""

import math
from dataclasses import dataclass, fields

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

    logits: [N, V], any float type (-inf: no token). realised: int64 [N], the ids that follow.
    NumericsError, naming the row in `.args[1]`, if a logit is NaN or +inf or all are -inf.
    """
    rows = len(logits) if logits.is_cuda else CPU_ROWS
    space = torch.empty((2, rows, logits.shape[-1]), dtype=torch.float32, device=logits.device)
    return concatenated([_strongest(logits[i : i + rows], realised[i : i + rows], keep, temperatures, space, i) for i in range(0, len(logits), rows)])


def concatenated(parts: list[Kept]) -> Kept:
    """Chunk after chunk, as one."""
    return Kept(*(torch.cat([getattr(part, field.name) for part in parts], dim=1 if field.name == "rests" else 0) for field in fields(Kept)))


CPU_ROWS = 2
"""Positions that are worked on at once on a CPU, so that the many passes over them find them in its cache."""


def _strongest(logits: Tensor, realised: Tensor, keep: int, temperatures: list[float], space: Tensor, first: int) -> Kept:
    shifted, power = space[:, : len(logits)]
    highest = logits.amax(-1, keepdim=True).float()  # NaN if there is one
    wrong = ~highest.isfinite()[:, 0]
    if wrong.any():
        raise NumericsError("the logits are not finite", first + int(wrong.nonzero()[0, 0]))
    torch.sub(logits, highest, out=shifted).clamp_(min=-1e30)  # -inf * 0 would be NaN
    ids = _top(shifted, min(keep, shifted.shape[-1]))
    kept = shifted.gather(-1, ids)
    follows = shifted.gather(-1, realised[:, None])[:, 0]

    # from the highest temperature down to 1: squaring is cheaper than another exponential, and loses nothing to underflow
    rests: list[Tensor] = []
    for i, temperature in enumerate(reversed(temperatures)):
        squarings = math.log2(temperatures[-i] / temperature) if i else 0.5
        if squarings.is_integer():
            for _ in range(int(squarings)):
                power.square_()
        else:
            torch.exp(torch.div(shifted, temperature, out=power), out=power).scatter_(-1, ids, 0.0)
        rests.insert(0, power.sum(-1))
    strong = kept.exp()
    total = rests[0] + strong.sum(-1)
    normaliser = total.log()
    expected = (power.mul_(shifted).sum(-1) + (strong * kept).sum(-1)) / total
    logs = torch.stack([rest.log() - normaliser / temperature for rest, temperature in zip(rests, temperatures, strict=True)])
    return Kept(ids, kept - normaliser[:, None], logs, follows - normaliser, normaliser - expected)


BLOCK = 64


def _top(values: Tensor, keep: int) -> Tensor:
    """int64 [N, keep]: the ids of the largest values, (value descending, id ascending): a total order, unlike topk's own.

    Whatever is among the `keep` first lies in one of the `keep` blocks whose maxima come first in that order: every other
    block has that many elements before all of its own.
    """
    odd = -values.shape[-1] % BLOCK
    padded = torch.nn.functional.pad(values, (0, odd), value=-torch.inf) if odd else values
    blocks = padded.unflatten(-1, (-1, BLOCK))
    chosen = blocks.amax(-1).sort(dim=-1, descending=True, stable=True).indices[:, :keep].sort(dim=-1).values
    candidates = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    inside = candidates.sort(dim=-1, descending=True, stable=True).indices[:, :keep]
    return chosen.gather(-1, inside // BLOCK) * BLOCK + inside % BLOCK


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
        # the true values are convex in 1/temperature: where a rest too faint for float32 bends the polynomial, the chord holds
        left = int((nodes > x).sum()) - 1
        result = np.minimum(result, values[left] + (values[left + 1] - values[left]) * (x - nodes[left]) / (nodes[left + 1] - nodes[left]))
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
