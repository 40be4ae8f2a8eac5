from typing import Literal

import torch
from torch import Tensor

from pipeline.options import Pair
from pipeline.signals.attention import Attended

FLOOR = 1e-6
"""Added to the student's weight before its logarithm is taken."""


def attention_match(attention: Attended, *, form: Literal["frobenius", "kl"] = "frobenius", layers: list[Pair] | None = None, heads: Literal["mean", "same", "grouped"] = "mean") -> Tensor:
    """How unlike teacher and student look back, [N]: the mean over layers and groups of heads; 0 at rows without a teacher's.

    Over the keys that are kept of the teacher's row and one cell for all others. frobenius: the sum of squared differences
    (summed over rows, the squared Frobenius norm of DistilLLM-Med's attention loss, exact on what is kept); kl: the
    Kullback-Leibler divergence from the teacher's row to the student's. layers: pairs of a teacher's and a student's layer
    (0 is the first); if not given, each of the cache's goes to the student's at the same depth. heads: compared as their mean,
    head by head where there are as many, or those of the side with more averaged in groups.
    """
    total = torch.zeros(attention.rows, device=attention.layers[0][1].device)
    for target, mass in attention.layers:
        rows = len(target.rest)
        rest = 1 - mass.new_zeros(rows).index_add(0, target.cell_row, mass)
        if form == "kl":
            norm = (mass.new_zeros(rows).index_add(0, target.cell_row, target.weight) + target.rest).clamp(min=FLOOR)
            p, p_rest = target.weight / norm[target.cell_row], target.rest / norm
            values = _kl(p_rest, rest).index_add(0, target.cell_row, _kl(p, mass))
        else:
            values = (rest - target.rest).square().index_add(0, target.cell_row, (mass - target.weight).square())
        total = total.index_add(0, target.row, values.view(-1, target.groups).mean(-1))
    return total / len(attention.layers)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return torch.special.xlogy(p, p) - p * (q.clamp(min=0) + FLOOR).log()
