from torch import Tensor

from pipeline.signals.outcomes import outcomes, tempered
from pipeline.signals.projection import SparseTarget


def total_variation(student: Tensor, teacher: SparseTarget, *, temperature_squared: bool = True) -> Tensor:
    """Half the sum of |student - teacher| over the target's tokens and one outcome for all others, 0 to 1, [N].

    Wen et al. 2023, f-DISTILL, arXiv 2307.15190. student: [N, V] logits.
    """
    log_p, log_q = outcomes(student, teacher)
    return tempered((log_p.exp() - log_q.exp()).abs().sum(-1) / 2, teacher, temperature_squared)
