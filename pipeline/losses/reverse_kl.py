from torch import Tensor

from pipeline.signals.outcomes import LEAST, kl, outcomes, tempered
from pipeline.signals.projection import SparseTarget


def reverse_kl(student: Tensor, teacher: SparseTarget, *, temperature_squared: bool = True) -> Tensor:
    """KL(student || teacher) over the target's tokens and one outcome for all others, nats, [N].

    Seeks a mode of the teacher's (Gu et al. 2024, MiniLLM, arXiv 2306.08543). What the student gives to all others is paid for:
    moving it off the kept tokens wins nothing. student: [N, V] logits. Options as in forward_kl.
    """
    log_p, log_q = outcomes(student, teacher)
    return tempered(kl(log_p, log_q.clamp(min=LEAST)), teacher, temperature_squared)
