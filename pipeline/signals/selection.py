"""From logits to the teacher's word, on the device: which tokens are kept at a position, and the mass of all others.

Natural logarithms of probabilities at temperature 1 over the whole vocabulary, unless a temperature is named.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pipeline.errors import NumericsError

WORKING_BYTES = {"cpu": 8 << 20, "cuda": 128 << 20}
"""Of float32 logits that are worked on at once: on a CPU so that the many passes over them find them in its cache."""
BLOCK = 64
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


def strongest(logits: Tensor, realised: Tensor, threshold: float, least: int, most: int, temperatures: list[float]) -> Kept:
    """Keep every token with a probability of at least `threshold`, but at least `least` and at most `most` of them.

    threshold 0: always `most`. Ties at the cut by the lower id. logits: [N, V], any float type (-inf: no token).
    realised: int64 [N], the ids that follow. temperatures: ascending, the first is 1.
    NumericsError, naming the row in `.args[1]`, if a logit is NaN or +inf or all are -inf.
    """
    sums = _sums(logits, temperatures)
    floor = sums.normaliser.float() + (math.log(threshold) if threshold > 0 else -torch.inf)
    row, ids, values = _candidates(logits, sums.block_maxima, floor, least, most)
    wanted = torch.bincount(row[values >= floor[row]], minlength=len(logits)).clamp(min(least, logits.shape[-1]), min(most, logits.shape[-1]))
    row, ids, values = _first(row, ids, values, wanted)
    return _kept(logits, realised, sums, row, ids, values, None, temperatures)


def drawn(logits: Tensor, realised: Tensor, uniform: Tensor, temperatures: list[float]) -> Kept:
    """Keep the tokens that are drawn from the teacher's distribution, and how often each was (Random Sampling KD, ACL 2025).

    count / draws is an unbiased estimate of the probability, and nothing is left for the others: the rests are -inf.
    uniform: float64 [N, draws] in [0, 1). Otherwise like `strongest`.
    """
    sums = _sums(logits, temperatures)
    rows = []
    for i in range(len(logits)):  # one at a time: float64 over the vocabulary
        cumulated = (logits[i].double() - sums.normaliser[i]).exp().cumsum(-1)
        found = torch.searchsorted(cumulated, uniform[i].to(logits.device) * cumulated[-1], right=True)
        ids, counts = found.clamp(max=logits.shape[-1] - 1).unique(return_counts=True)
        rows.append((torch.full_like(ids, i), ids, counts))
    row, ids, counts = (torch.cat(column) for column in zip(*rows, strict=True))
    return _kept(logits, realised, sums, row, ids, logits[row, ids].float(), counts, temperatures)


@dataclass(frozen=True)
class _Sums:
    normaliser: Tensor  # float64 [N] logsumexp of the logits
    lognorms: Tensor  # float64 [S, N] logsumexp of (logits - normaliser) / temperature
    entropy: Tensor  # float32 [N]
    block_maxima: Tensor  # float32 [N, V // BLOCK]; block j holds the tokens j, j + blocks, j + 2 * blocks, ...


def _sums(logits: Tensor, temperatures: list[float]) -> _Sums:
    """All that takes a pass over the vocabulary, a few rows at a time."""
    rows = _rows(logits)
    space = torch.empty((2, min(rows, len(logits)), logits.shape[-1]), dtype=torch.float32, device=logits.device)
    parts = [_sums_of(logits[i : i + rows], temperatures, space, i) for i in range(0, len(logits), rows)]
    return _Sums(*(torch.cat([getattr(part, field.name) for part in parts], dim=1 if field.name == "lognorms" else 0) for field in fields(_Sums)))


def _rows(logits: Tensor) -> int:
    return max(1, WORKING_BYTES.get(logits.device.type, WORKING_BYTES["cpu"]) // (4 * logits.shape[-1]))


def _sums_of(logits: Tensor, temperatures: list[float], space: Tensor, first: int) -> _Sums:
    values, power = space[:, : len(logits)]
    values.copy_(logits)
    blocks = logits.shape[-1] // BLOCK
    maxima = values[:, : blocks * BLOCK].unflatten(-1, (BLOCK, blocks)).amax(1) if blocks else values[:, :0]
    odd = values[:, blocks * BLOCK :]
    highest = torch.cat([maxima, odd], -1).amax(-1, keepdim=True)  # NaN if there is one
    wrong = ~highest.isfinite()[:, 0]
    if wrong.any():
        raise NumericsError("the logits are not finite", first + int(wrong.nonzero()[0, 0]))

    totals = [power.sum(-1) for _ in _powers(values, highest, temperatures, power)][::-1]
    above = totals[0].double().log()
    normaliser = highest[:, 0] + above
    lognorms = torch.stack([total.double().log() - above / temperature for total, temperature in zip(totals, temperatures, strict=True)])
    expected = power.mul_(values).sum(-1) / totals[0]
    if not expected.isfinite().all():  # 0 * -inf
        expected = power.nan_to_num_(0.0).sum(-1) / totals[0]
    return _Sums(normaliser, lognorms, (normaliser - expected).float(), maxima)


def _powers(values: Tensor, highest: Tensor, temperatures: list[float], out: Tensor) -> Iterator[int]:
    """exp((values - highest) / temperature) in `out`, from the highest temperature down to 1; gives each one's number.

    Squaring is cheaper than another exponential, and loses nothing to underflow.
    """
    for i in reversed(range(len(temperatures))):
        squarings = math.log2(temperatures[i + 1] / temperatures[i]) if i + 1 < len(temperatures) else 0.5
        if squarings.is_integer():
            for _ in range(int(squarings)):
                out.square_()
        else:
            scale = math.log2(math.e) / temperatures[i]  # exp2 is four times as fast as exp on a CPU
            torch.exp2(torch.add(highest * -scale, values, alpha=scale, out=out), out=out)
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
    ids = block[:, None] + blocks * torch.arange(BLOCK, device=logits.device)
    odd = torch.arange(blocks * BLOCK, vocabulary, device=logits.device).expand(len(logits), -1)
    row = torch.cat([in_row[:, None].expand_as(ids).flatten(), torch.arange(len(logits), device=logits.device)[:, None].expand_as(odd).flatten()])
    ids = torch.cat([ids.flatten(), odd.flatten()])
    values = logits[row, ids].float()
    there = (values >= cut[row]).nonzero()[:, 0]
    order = there[(row[there] * vocabulary + ids[there]).argsort()]
    return row[order], ids[order], values[order]


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


def _kept(logits: Tensor, realised: Tensor, sums: _Sums, row: Tensor, ids: Tensor, values: Tensor, counts: Tensor | None, temperatures: list[float]) -> Kept:
    logprobs = values - sums.normaliser[row]
    rests = _rests(logits, sums, row, ids, logprobs, temperatures) if counts is None else torch.full_like(sums.lognorms, -torch.inf)
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


def _rests(logits: Tensor, sums: _Sums, row: Tensor, ids: Tensor, logprobs: Tensor, temperatures: list[float]) -> Tensor:
    """[S, N]. All less the kept; where that leaves next to nothing, the sum over the others itself."""
    divisors = torch.tensor(temperatures, dtype=torch.float64, device=logits.device)[:, None]
    shares = torch.zeros_like(sums.lognorms).index_add_(1, row, (logprobs / divisors - sums.lognorms[:, row]).exp())
    rests = sums.lognorms + torch.log1p(-shares.clamp(max=1 - FAINT))
    faint = ((1 - shares).amin(0) < FAINT).nonzero()[:, 0]
    size = _rows(logits)
    for begin in range(0, len(faint), size):
        here = faint[begin : begin + size]
        values = _without_kept(logits[here].float() - sums.normaliser[here, None].float(), here, row, ids)
        highest = values.amax(-1, keepdim=True).clamp(min=-1e30)  # -inf: nothing is left
        power = torch.empty_like(values)
        for t in _powers(values, highest, temperatures, power):
            rests[t, here] = (power.sum(-1).log() + highest[:, 0] / temperatures[t]).double()
    return rests


def _without_kept(values: Tensor, rows: Tensor, row: Tensor, ids: Tensor) -> Tensor:
    """`values` of some rows, ascending, with -inf for the tokens that are kept there."""
    place = torch.searchsorted(rows, row).clamp(max=len(rows) - 1)
    inside = rows[place] == row
    values[place[inside], ids[inside]] = -torch.inf
    return values


def tail_sums(logits: Tensor, kept: Kept, temperatures: list[float], into: Tensor, chosen: Tensor | None = None) -> None:
    """Add to each token's sum of probability, at each temperature, over the positions that do not keep it.

    into: float32 [S, V]. chosen: int64, ascending, the rows that are looked at; None: all.
    """
    row = torch.repeat_interleave(kept.kept)
    chosen = torch.arange(len(logits), device=logits.device) if chosen is None else chosen
    rows = _rows(logits)
    space = torch.empty((2, min(rows, len(chosen)), logits.shape[-1]), dtype=torch.float32, device=logits.device)
    for begin in range(0, len(chosen), rows):
        here = chosen[begin : begin + rows]
        values, power = space[:, : len(here)]
        values.copy_(logits[here])
        highest = values.amax(-1, keepdim=True)
        _without_kept(values, here, row, kept.ids)
        for t in _powers(values, highest, temperatures, power):
            weights = (highest[:, 0] - kept.logsumexp[here]) / temperatures[t] - kept.lognorms[t, here]
            into[t : t + 1].addmm_(weights.exp()[None].float(), power)


def class_masses(logits: Tensor, logsumexp: Tensor, class_of: Tensor, classes: int) -> Tensor:
    """float32 [N, classes]: the log of the probability that the next token is of each class. class_of: int64 [V]."""
    result = torch.zeros((len(logits), classes), device=logits.device)
    rows = _rows(logits)
    for begin in range(0, len(logits), rows):
        values = (logits[begin : begin + rows].float() - logsumexp[begin : begin + rows, None]).exp_()
        result[begin : begin + rows].index_add_(1, class_of, values)
    return result.log_()
