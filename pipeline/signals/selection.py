"""From logits to the teacher's word, on the device: which tokens are kept at a position, and the mass of all others.

Natural logarithms of probabilities at temperature 1 over the whole vocabulary, unless a temperature is named.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pipeline.errors import NumericsError

WORKING_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}
"""Of float32 logits that are worked on at once: on a CPU so that the many passes over them find them in its cache."""
BLOCK = 128
FAINT = 2e-3
"""Below this share of the whole, a difference of two float32 sums is no longer good to 0.01 nats."""


@dataclass(frozen=True)
class Kept:
    """What is kept of N positions. The tokens lie flat, position after position, ids ascending inside a position."""

    kept: Tensor  # int64 [N]
    ids: Tensor  # int64 [sum of kept]
    logprobs: Tensor  # float32 [sum of kept]
    counts: Tensor | None  # int64 [sum of kept] how often each was drawn; None where tokens are not drawn
    rests: Tensor  # float32 [S, N] log of the sum of exp(logprob / temperature) over the tokens not kept
    lognorms: Tensor  # float64 [S, N] the same over all tokens
    realised_logprob: Tensor  # float32 [N]
    entropy: Tensor  # float32 [N]
    logsumexp: Tensor  # float32 [N] of the logits as they are


def concatenated(parts: list[Kept]) -> Kept:
    """Chunk after chunk, as one."""

    def joined(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values, dim=1 if name in ("rests", "lognorms") else 0)

    return Kept(*(joined(field.name) for field in fields(Kept)))  # type: ignore[arg-type]


def workspace(vocabulary_size: int, device: torch.device) -> Tensor:
    """float32 [2, rows, V]: what the functions below work in, to be used again: fresh memory costs a CPU as much as a pass over it."""
    rows = max(1, WORKING_BYTES.get(device.type, WORKING_BYTES["cpu"]) // (4 * vocabulary_size))
    return torch.empty((2, rows, vocabulary_size), device=device)


def strongest(logits: Tensor, realised: Tensor, threshold: float, least: int, most: int, temperatures: list[float], space: Tensor | None = None) -> Kept:
    """Keep every token with a probability of at least `threshold`, but at least `least` and at most `most` of them.

    threshold 0: always `most`. Ties at the cut by the lower id. logits: [N, V], any float type (-inf: no token).
    realised: int64 [N], the ids that follow. temperatures: ascending, the first is 1. space: a `workspace`.
    NumericsError, naming the row in `.args[1]`, if a logit is NaN or +inf or all are -inf.
    """
    space = workspace(logits.shape[-1], logits.device) if space is None else space
    sums = _sums(logits, temperatures, space)
    floor = sums.normaliser.float() + (math.log(threshold) if threshold > 0 else -torch.inf)
    row, ids, values = _candidates(logits, sums.block_maxima, floor, least, most)
    wanted = torch.bincount(row[values >= floor[row]], minlength=len(logits)).clamp(min(least, logits.shape[-1]), min(most, logits.shape[-1]))
    row, ids, values = _first(row, ids, values, wanted)
    logprobs = values - sums.normaliser[row]
    return _kept(logits, realised, sums, row, ids, logprobs, None, _rests(logits, sums, row, ids, logprobs, temperatures, space))


def drawn(logits: Tensor, realised: Tensor, uniform: Tensor, temperatures: list[float], space: Tensor | None = None) -> Kept:
    """Keep the tokens that are drawn from the teacher's distribution, and how often each was (Random Sampling KD, ACL 2025).

    count / draws is an unbiased estimate of the probability, and nothing is left for the others: the rests are -inf.
    uniform: float64 [N, draws] in [0, 1). Otherwise like `strongest`.
    """
    sums = _sums(logits, temperatures, workspace(logits.shape[-1], logits.device) if space is None else space)
    rows = []
    for i in range(len(logits)):  # one at a time: float64 over the vocabulary
        cumulated = (logits[i].double() - sums.normaliser[i]).exp().cumsum(-1)
        found = torch.searchsorted(cumulated, uniform[i].to(logits.device) * cumulated[-1], right=True)
        ids, counts = found.clamp(max=logits.shape[-1] - 1).unique(return_counts=True)
        rows.append((torch.full_like(ids, i), ids, counts))
    row, ids, counts = (torch.cat(column) for column in zip(*rows, strict=True))
    logprobs = logits[row, ids].float() - sums.normaliser[row]
    return _kept(logits, realised, sums, row, ids, logprobs, counts, torch.full_like(sums.lognorms, -torch.inf))


@dataclass(frozen=True)
class _Sums:
    normaliser: Tensor  # float64 [N] logsumexp of the logits
    lognorms: Tensor  # float64 [S, N] logsumexp of (logits - normaliser) / temperature
    entropy: Tensor  # float32 [N]
    block_maxima: Tensor  # float32 [N, V // BLOCK]; block j holds the BLOCK tokens from j * BLOCK on


def _sums(logits: Tensor, temperatures: list[float], space: Tensor) -> _Sums:
    """All that takes a pass over the vocabulary, a few rows at a time."""
    rows, blocks = space.shape[1], logits.shape[-1] // BLOCK
    maxima = space.new_empty((len(logits), blocks))
    highest, expected, *totals = space.new_empty((2 + len(temperatures), len(logits)))
    for begin in range(0, len(logits), rows):
        here = slice(begin, begin + rows)
        values, power = space[:, : len(logits[here])]
        values.copy_(logits[here])
        odd = values[:, blocks * BLOCK :]
        if blocks:
            torch.amax(values[:, : blocks * BLOCK].unflatten(-1, (blocks, BLOCK)), -1, out=maxima[here])
        torch.amax(torch.cat([maxima[here], odd], -1), -1, out=highest[here])  # NaN if there is one
        for t in _powers(values, highest[here], temperatures, power):
            torch.sum(power, -1, out=totals[t][here])
        torch.sum(power.mul_(values), -1, out=expected[here])
        if not expected[here].isfinite().all():  # 0 * -inf
            torch.sum(power.nan_to_num_(0.0), -1, out=expected[here])
    wrong = ~highest.isfinite()
    if wrong.any():
        raise NumericsError("the logits are not finite", int(wrong.nonzero()[0, 0]))

    above = totals[0].double().log()
    lognorms = torch.stack([total.double().log() - above / temperature for total, temperature in zip(totals, temperatures, strict=True)])
    entropy = above - expected / totals[0] * (temperatures[-1] * math.log(2))
    return _Sums(highest + above, lognorms, entropy.float(), maxima)


def _powers(values: Tensor, top: Tensor, temperatures: list[float], out: Tensor) -> Iterator[int]:
    """exp((values - top) / temperature) in `out`, from the highest temperature down to 1; gives each one's number.

    Squaring is cheaper than another exponential, and loses nothing to underflow. `values` become log2 of the first power.
    """
    scale = math.log2(math.e) / temperatures[-1]  # exp2 is four times as fast as exp on a CPU
    torch.add(top[:, None] * -scale, values, alpha=scale, out=values)
    torch.exp2(values, out=out)
    yield len(temperatures) - 1
    for i in reversed(range(len(temperatures) - 1)):
        squarings = math.log2(temperatures[i + 1] / temperatures[i])
        if squarings.is_integer():
            for _ in range(int(squarings)):
                out.square_()
        else:
            torch.mul(values, temperatures[-1] / temperatures[i], out=out).exp2_()
        yield i


def _candidates(logits: Tensor, maxima: Tensor, floor: Tensor, least: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, id and value of tokens among which all wanted ones are; ordered by row, then by id.

    The `least` blocks with the highest maxima hold at least that many tokens not below the lowest of these maxima, so none
    of the `least` first tokens is below it. In the same way none of the `most` first ones is below the `most`-th maximum.
    """
    vocabulary, blocks = logits.shape[-1], maxima.shape[-1]
    cut = floor if blocks else torch.full_like(floor, -torch.inf)
    if blocks:
        crowded = ((maxima >= floor[:, None]).sum(-1) > most).nonzero()[:, 0]
        if len(crowded):
            cut = cut.index_copy(0, crowded, torch.maximum(floor[crowded], maxima[crowded].topk(min(most, blocks)).values[:, -1]))
        enough = maxima.topk(least).values[:, -1] if least <= blocks else torch.full_like(floor, -torch.inf)
        cut = torch.minimum(cut, enough)
    in_row, block = (maxima >= cut[:, None]).nonzero(as_tuple=True)
    within = logits[:, : blocks * BLOCK].unflatten(-1, (blocks, BLOCK))[in_row, block]
    at, place = (within >= cut[in_row, None]).nonzero(as_tuple=True)
    row, ids, values = in_row[at], block[at] * BLOCK + place, within[at, place]
    if vocabulary % BLOCK:
        odd_row, place = (logits[:, blocks * BLOCK :] >= cut[:, None]).nonzero(as_tuple=True)
        row, ids = torch.cat([row, odd_row]), torch.cat([ids, blocks * BLOCK + place])
        order = (row * vocabulary + ids).argsort()
        row, ids = row[order], ids[order]
        values = logits[row, ids]
    return row, ids, values.float()


def _first(row: Tensor, ids: Tensor, values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the candidates (ordered by row, then id) the `wanted` first of each row: (value descending, id ascending)."""
    there = torch.bincount(row, minlength=len(wanted))
    if torch.equal(there, wanted):
        return row, ids, values
    order = values.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    place = torch.arange(len(row), device=row.device) - (there.cumsum(0) - there)[row]
    chosen = order[place < wanted[row]].sort().values
    return row[chosen], ids[chosen], values[chosen]


def _kept(logits: Tensor, realised: Tensor, sums: _Sums, row: Tensor, ids: Tensor, logprobs: Tensor, counts: Tensor | None, rests: Tensor) -> Kept:
    return Kept(
        kept=torch.bincount(row, minlength=len(logits)),
        ids=ids,
        logprobs=logprobs.float(),
        counts=counts,
        rests=rests.float(),
        lognorms=sums.lognorms,
        realised_logprob=(logits.gather(-1, realised[:, None])[:, 0] - sums.normaliser).float(),
        entropy=sums.entropy,
        logsumexp=sums.normaliser.float(),
    )


def _rests(logits: Tensor, sums: _Sums, row: Tensor, ids: Tensor, logprobs: Tensor, temperatures: list[float], space: Tensor) -> Tensor:
    """[S, N]. All less the kept; where that leaves next to nothing, the sum over the others itself."""
    divisors = torch.tensor(temperatures, dtype=torch.float64, device=logits.device)[:, None]
    shares = torch.zeros_like(sums.lognorms).index_add_(1, row, (logprobs / divisors - sums.lognorms[:, row]).exp())
    rests = sums.lognorms + torch.log1p(-shares.clamp(max=1 - FAINT))
    faint = ((1 - shares).amin(0) < FAINT).nonzero()[:, 0]
    for rows, values, power in _others(logits, faint, row, ids, space):
        highest = values.amax(-1).clamp(min=-1e30)  # -inf: nothing is left
        for t in _powers(values, highest, temperatures, power):
            rests[t, rows] = power.sum(-1).double().log() + (highest - sums.normaliser[rows]) / temperatures[t]
    return rests


def _others(logits: Tensor, chosen: Tensor, row: Tensor, ids: Tensor, space: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The chosen rows a few at a time: which they are, their logits with -inf for the tokens that are kept there, and as much space."""
    place = torch.full((len(logits),), -1, device=logits.device).index_copy_(0, chosen, torch.arange(len(chosen), device=logits.device))[row]
    ids, place = ids[place >= 0], place[place >= 0]
    ends = [0, *torch.bincount(place, minlength=len(chosen)).cumsum(0).tolist()]
    for begin in range(0, len(chosen), space.shape[1]):
        rows = chosen[begin : begin + space.shape[1]]
        values, power = space[:, : len(rows)]
        for i, number in enumerate(rows.tolist()):
            values[i].copy_(logits[number])
        here = slice(ends[begin], ends[begin + len(rows)])
        values[place[here] - begin, ids[here]] = -torch.inf
        yield rows, values, power


def tail_sums(logits: Tensor, kept: Kept, temperatures: list[float], into: Tensor, chosen: Tensor | None = None, space: Tensor | None = None) -> None:
    """Add to each token's sum of probability, at each temperature, over the positions that do not keep it.

    into: float32 [S, V]. chosen: int64, ascending, the rows that are looked at; None: all. space: a `workspace`.
    """
    space = workspace(logits.shape[-1], logits.device) if space is None else space
    chosen = torch.arange(len(logits), device=logits.device) if chosen is None else chosen
    weights = (-kept.lognorms).exp().float()
    for rows, values, power in _others(logits, chosen, torch.repeat_interleave(kept.kept), kept.ids, space):
        for t in _powers(values, kept.logsumexp[rows], temperatures, power):
            into[t : t + 1].addmm_(weights[t : t + 1, rows], power)


def class_masses(logits: Tensor, logsumexp: Tensor, class_of: Tensor, classes: int, space: Tensor | None = None) -> Tensor:
    """float32 [N, classes]: the log of the probability that the next token is of each class. class_of: int64 [V]. space: a `workspace`."""
    space = workspace(logits.shape[-1], logits.device) if space is None else space
    result = torch.zeros((len(logits), classes), device=logits.device)
    for begin in range(0, len(logits), space.shape[1]):
        here = slice(begin, begin + space.shape[1])
        values = space[0, : len(logits[here])]
        result[here].index_add_(1, class_of, values.copy_(logits[here]).sub_(logsumexp[here, None]).exp_())
    return result.log_()
