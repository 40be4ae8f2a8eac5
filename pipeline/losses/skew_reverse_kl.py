from typing import Annotated

from pydantic import Field
from torch import Tensor

from pipeline.signals.outcomes import kl, mixed, outcomes, tempered
from pipeline.signals.projection import SparseTarget


def skew_reverse_kl(student: Tensor, teacher: SparseTarget, *, alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1, temperature_squared: bool = True) -> Tensor:
    """KL(student || alpha student + (1 - alpha) teacher) over the target's tokens and one outcome for all others, nats, [N].

    Ko et al. 2024, DistiLLM, arXiv 2402.03898: bounded, also where the teacher gives nothing. student: [N, V] logits.
    """
    log_p, log_q = outcomes(student, teacher)
    return tempered(kl(log_p, mixed(log_p, log_q, alpha)), teacher, temperature_squared)
