"""A temperature of its own for each token: lower where the student is far from the teacher (AdaKD, Xie et al. 2025, arXiv 2510.11615, IDTS)."""

import torch
from accelerate import Accelerator
from torch import Tensor

from pipeline.signals.outcomes import outcomes
from pipeline.signals.projection import SparseTarget

CELLS = 256
"""Into which distances are counted for their median."""


class TokenTemperature:
    """base * exp(-strength * tanh(log(distance / median))) of a token, within 1 and the hottest that the cache has.

    The distance is Hellinger's, from 0 to 1, between teacher and student at temperature 1, over the target's tokens and one
    outcome for all others. The median is that of the step before, so that it does not depend on how the step is split;
    the first step has the base for all.
    """

    def __init__(self, strength: float, hottest: float, device: torch.device) -> None:
        self._strength, self._hottest = strength, hottest
        self.state = {"distances": torch.zeros(CELLS, device=device)}
        """How many rows of the last step lay in each cell: what training goes on from."""
        self._counts = torch.zeros(CELLS, device=device)

    def of_rows(self, student: Tensor, teacher: SparseTarget, base: float) -> Tensor:
        """float32 [N]. student: [N, V] logits; teacher: at temperature 1."""
        with torch.no_grad():
            log_p, log_q = outcomes(student, teacher)
            distance = (1 - ((log_p + log_q) / 2).exp().sum(-1)).clamp(min=0).sqrt().float()
        self._counts += torch.histc(distance, CELLS, 0, 1)
        counts = self.state["distances"]
        if counts.sum() == 0:
            return torch.full_like(distance, base)
        median = (torch.searchsorted(counts.cumsum(0), counts.sum() / 2).clamp(max=CELLS - 1) + 0.5) / CELLS
        relative = (distance / median).clamp(min=1e-8)
        return (base * torch.exp(-self._strength * torch.tanh(relative.log()))).clamp(1.0, self._hottest)

    def step(self, accelerator: Accelerator) -> None:
        """The step is over."""
        self.state["distances"].copy_(accelerator.reduce(self._counts, "sum"))
        self._counts.zero_()
