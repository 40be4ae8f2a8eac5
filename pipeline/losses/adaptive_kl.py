from torch import Tensor

from pipeline.options import Share
from pipeline.signals.outcomes import LEAST, kl, outcomes, tempered
from pipeline.signals.projection import SparseTarget


def adaptive_kl(student: Tensor, teacher: SparseTarget, *, head: Share = 0.5, temperature_squared: bool = True) -> Tensor:
    """Forward and reverse divergence, weighted by where the two differ: in the teacher's head or in its tail, nats, [N].

    The head is the teacher's strongest outcomes up to a mass of `head`; the forward divergence has the share of |student -
    teacher| that lies there, the reverse one the others' (Wu et al. 2024, AKL, arXiv 2404.02657). The shares are
    not gone back through. The outcome for all others is of the tail. student: [N, V] logits.
    """
    log_p, log_q = outcomes(student, teacher)
    q = log_q.exp().detach()
    gap = (log_p.exp().detach() - q).abs()
    falling, order = q.sort(-1, descending=True)
    begins_below = falling.cumsum(-1) - falling < head
    in_head = begins_below.scatter(-1, order, begins_below)
    if not teacher.shapes_rest:
        in_head[:, -1] = False
    gap_head, gap_tail = (gap * in_head).sum(-1), (gap * ~in_head).sum(-1)
    share = gap_head / (gap_head + gap_tail).clamp(min=1e-9)
    return tempered(share * kl(log_q, log_p.clamp(min=-50.0)) + (1 - share) * kl(log_p, log_q.clamp(min=LEAST)), teacher, temperature_squared)
