from typing import Annotated

from pydantic import Field
from torch import Tensor

from pipeline.signals.outcomes import kl, mixed, outcomes, tempered
from pipeline.signals.projection import SparseTarget


def skew_kl(student: Tensor, teacher: SparseTarget, *, alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1, temperature_squared: bool = True) -> Tensor:
    """KL(teacher || alpha teacher + (1 - alpha) student) over the target's tokens and one outcome for all others, nats, [N].

    Ko et al. 2024, DistiLLM, arXiv 2402.03898: bounded, whatever the student says. student: [N, V] logits.
    """
    log_p, log_q = outcomes(student, teacher)
    return tempered(kl(log_q, mixed(log_q, log_p, alpha)), teacher, temperature_squared)
