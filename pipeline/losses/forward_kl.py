import torch
from torch import Tensor

from pipeline.signals.projection import NO_SHARE, SparseTarget


def forward_kl(student: Tensor, teacher: SparseTarget, *, temperature_squared: bool = True) -> Tensor:
    """KL(teacher || student) over the target's tokens and one outcome for all others (the rest bucket), nats, [N].

    Where the target says how its rest is shared out, the divergence within the rest comes on top: then it is over all tokens.
    student: [N, V] logits. Both sides are taken at the target's temperature; temperature_squared multiplies by its square,
    which keeps the gradient's size over temperatures (Hinton et al. 2015, arXiv 1503.02531, section 2).
    """
    scaled = student.float() / teacher.temperature
    normaliser = scaled.logsumexp(-1)
    log_p = scaled.gather(-1, teacher.ids) - normaliser[:, None]
    others = scaled.scatter(-1, teacher.ids, NO_SHARE)
    # the sum over the others, not 1 - sum(p): that cancels
    log_p_others = others.logsumexp(-1)
    kept = torch.xlogy(teacher.probs, teacher.probs) - teacher.probs * log_p
    # a student with no token outside the target has no rest; it then pays as for e^-50, not infinitely
    rest = torch.xlogy(teacher.rest, teacher.rest) - teacher.rest * (log_p_others - normaliser).clamp(min=-50.0)
    loss = kept.sum(-1) + rest
    log_q = others - log_p_others[:, None]  # the student's shares of its rest
    log_shares = teacher.log_shares(log_q.detach())
    if log_shares is not None:  # chain rule: and the divergence within the rest
        loss = loss + teacher.rest * (log_shares.exp() * (log_shares - log_q)).sum(-1)
    return loss * teacher.temperature**2 if temperature_squared else loss
