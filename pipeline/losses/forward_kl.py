import torch
from torch import Tensor

from pipeline.signals.outcomes import log_outcomes, precise, tempered
from pipeline.signals.projection import NO_SHARE, SparseTarget


def forward_kl(student: Tensor, teacher: SparseTarget, *, temperature_squared: bool = True) -> Tensor:
    """KL(teacher || student) over the target's tokens and one outcome for all others (the rest bucket), nats, [N].

    Where the target says how its rest is shared out, the divergence within the rest comes on top: then it is over all tokens.
    student: [N, V] logits. Both sides are taken at the target's temperature; temperature_squared multiplies by its square,
    which keeps the gradient's size over temperatures (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """
    log_p = log_outcomes(student, teacher.ids, teacher.column)
    kept = torch.xlogy(teacher.probs, teacher.probs) - teacher.probs * log_p[:, :-1]
    # a student with no token outside the target has no rest; it then pays as for e^-50, not infinitely
    loss = kept.sum(-1) + torch.xlogy(teacher.rest, teacher.rest) - teacher.rest * log_p[:, -1].clamp(min=-50.0)
    if teacher.shapes_rest:  # chain rule: and the divergence within the rest
        log_q = (precise(student) / teacher.column).scatter(-1, teacher.ids, NO_SHARE).log_softmax(-1)  # the student's shares of its rest
        log_shares = teacher.log_shares(log_q.detach())
        loss = loss + teacher.rest * (log_shares.exp() * (log_shares - log_q)).sum(-1)
    return tempered(loss, teacher, temperature_squared)
