import numpy as np
import pytest
import torch

from pipeline.losses.uld import uld
from pipeline.signals.projection import SparseTarget


def target(probs: list[list[float]], temperature: float = 1.0) -> SparseTarget:
    values = torch.tensor(probs)
    return SparseTarget(torch.arange(values.shape[1]).expand(len(values), -1), values, 1 - values.sum(-1), temperature)


def test_it_is_the_distance_of_the_sorted_probabilities_with_all_others_as_one():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    teacher = target([[0.5, 0.1, 0.2], [0.2, 0.0, 0.6], [1.0, 0.0, 0.0], [0.3, 0.3, 0.3], [0.05, 0.04, 0.9]])
    found = uld(logits, teacher)
    for row in range(5):
        ours = np.sort(logits[row].double().softmax(-1).numpy())[::-1]
        theirs = np.sort(teacher.probs[row].double().numpy()[teacher.probs[row].numpy() > 0])[::-1]
        n = len(theirs)
        assert found[row].item() == pytest.approx(np.abs(ours[:n] - theirs).sum() + abs(ours[n:].sum() - teacher.rest[row].item()), abs=1e-5)


def test_it_is_nothing_for_the_same_probabilities_on_any_tokens():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    teacher = target([[0.3, 0.5, 0.15]])
    for order in ([0, 1, 2, 3], [3, 0, 2, 1]):
        assert uld(probs[order].log()[None], teacher).item() == pytest.approx(0, abs=1e-6)
    assert uld(probs.flip(0).log()[None] * 0.5, teacher).item() > 0.1


def test_a_teacher_that_keeps_more_tokens_than_the_student_has():
    """What it gives its weakest ones is with the rest."""
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    p = logits.double().softmax(-1).flip(-1)[0]
    teacher = target([[0.05, 0.3, 0.4, 0.1, 0.1]])
    wanted = abs(p[0] - 0.4) + abs(p[1] - 0.3) + abs(p[2] - 0.1) + abs(0 - 0.2)
    assert uld(logits, teacher).item() == pytest.approx(float(wanted), abs=1e-6)
