from typing import Annotated

from pydantic import Field
from torch import Tensor

from pipeline.signals.outcomes import kl, mixed, outcomes, tempered
from pipeline.signals.projection import SparseTarget


def jensen_shannon(student: Tensor, teacher: SparseTarget, *, beta: Annotated[float, Field(gt=0, lt=1)] = 0.5, temperature_squared: bool = True) -> Tensor:
    """The generalised Jensen-Shannon divergence over the target's tokens and one outcome for all others, nats, [N].

    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student (Agarwal et al. 2024, GKD,
    arXiv 2306.13649): near beta = 0 it goes like the forward divergence, near 1 like the reverse. student: [N, V] logits.
    """
    log_p, log_q = outcomes(student, teacher)
    log_m = mixed(log_q, log_p, beta)
    return tempered(beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m), teacher, temperature_squared)
