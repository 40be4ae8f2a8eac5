from torch import Tensor

from pipeline.signals.outcomes import precise
from pipeline.signals.projection import SparseTarget


def uld(student: Tensor, values: SparseTarget) -> Tensor:
    """The distance of the sorted probabilities, whatever the tokens are: Universal Logit Distillation, [N].

    Sum over ranks |p_student - p_teacher| (Boizard et al. 2024, arXiv 2402.12030, equation 3: Wasserstein-1 with one cost for all
    pairs); all ranks beyond the teacher's kept tokens count as one. It knows no identities: a student that gives the right
    probabilities to the wrong tokens loses nothing. student: [N, V] logits.
    """
    probs = (precise(student) / values.column).softmax(-1)
    theirs = values.probs.sort(-1, descending=True).values[:, : probs.shape[-1]]  # the others are of the rest
    ours = probs.topk(theirs.shape[-1], -1).values * (theirs > 0)  # columns that only fill up have no mass
    return (ours - theirs).abs().sum(-1) + (ours.sum(-1) - theirs.sum(-1)).abs()
