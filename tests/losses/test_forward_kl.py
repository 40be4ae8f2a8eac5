from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.losses.cross_entropy import cross_entropy
from pipeline.losses.forward_kl import forward_kl
from pipeline.signals.projection import SparseTarget
from tests.signals.dense import log_softmax

Loss = Callable[[Tensor, SparseTarget], Tensor]


def a_target(seed: int, rows: int, vocabulary: int, columns: int, temperature: float, rest: str = "some") -> SparseTarget:
    """`columns` tokens and, as padding, some of them again with no mass."""
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.permutation(vocabulary)[:columns] for _ in range(rows)])
    mass = generator.dirichlet(np.full(columns + 1, 0.3), rows) + 1e-12
    if rest == "none":
        mass[:, -1] = 0
    if rest == "all but nothing":
        mass[:, :-1] *= 1e-6
    mass /= mass.sum(-1, keepdims=True)
    padded = np.concatenate([ids, ids[:, :1], ids[:, :1]], 1)
    probs = np.concatenate([mass[:, :-1], np.zeros((rows, 2))], 1)
    return SparseTarget(torch.from_numpy(padded), torch.from_numpy(probs.astype(np.float32)), torch.from_numpy(mass[:, -1].astype(np.float32)), temperature)


def reference(logits: Tensor, target: SparseTarget, temperature_squared: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Value and gradient with respect to the logits: over the kept tokens and one outcome for all others, in float64."""
    temperature = target.temperature
    p = np.exp(log_softmax(logits.detach().double().numpy(), temperature))
    values, gradients = [], []
    for row in range(len(p)):
        q = np.zeros(p.shape[1])
        kept = np.zeros(p.shape[1], bool)
        for id, mass in zip(target.ids[row].tolist(), target.probs[row].double().tolist(), strict=True):
            q[id] += mass
            kept[id] = True
        rest_q, rest_p = float(target.rest[row]), p[row][~kept].sum()
        terms = [a * np.log(a / b) for a, b in [*zip(q[kept], p[row][kept], strict=True), (rest_q, rest_p)] if a > 0]
        values.append(sum(terms))
        outside = p[row] * (1 - rest_q / rest_p) if rest_p > 0 else 0 * p[row]
        gradients.append(np.where(kept, p[row] - q, outside))
    factor = temperature**2 if temperature_squared else 1
    return factor * np.array(values), factor / temperature * np.array(gradients)


def check(logits: Tensor, target: SparseTarget, loss: Loss = forward_kl, **options: bool) -> None:
    logits = logits.clone().requires_grad_()
    values = loss(logits, target, **options)
    values.sum().backward()
    wanted, gradient = reference(logits, target, **options)
    np.testing.assert_allclose(values.detach().double().numpy(), wanted, rtol=1e-4, atol=2e-5 * target.temperature**2)
    np.testing.assert_allclose(logits.grad.double().numpy(), gradient, rtol=1e-3, atol=2e-5 * target.temperature)


def some_logits(seed: int, rows: int, vocabulary: int, spread: float = 3.0) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 999),
    columns=st.integers(1, 20),
    vocabulary=st.sampled_from([21, 50, 500]),
    temperature=st.sampled_from([1.0, 2.0, 4.0, 8.0]),
    rest=st.sampled_from(["some", "none", "all but nothing"]),
    spread=st.sampled_from([0.1, 3.0, 8.0]),
    squared=st.booleans(),
)
def test_value_and_gradient_are_those_of_a_dense_reference(seed, columns, vocabulary, temperature, rest, spread, squared):
    check(some_logits(seed, 3, vocabulary, spread), a_target(seed, 3, vocabulary, columns, temperature, rest), temperature_squared=squared)


def test_a_value_worked_out_by_hand():
    """q = (1/2, 1/4; rest 1/4) against p = (1/4, 1/4; rest 1/2): log(2)/2 - log(2)/4."""
    target = SparseTarget(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]), torch.tensor([0.25]), 1.0)
    assert forward_kl(torch.zeros(1, 4), target).item() == pytest.approx(np.log(2) / 4, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 8.0])
def test_a_target_of_full_support_is_the_plain_divergence(temperature: float):
    teacher, student = some_logits(1, 4, 30), some_logits(2, 4, 30)
    q = (teacher.double() / temperature).softmax(-1)
    target = SparseTarget(torch.arange(30).repeat(4, 1), q.float(), torch.zeros(4), temperature)
    plain = (q * (q.log() - (student.double() / temperature).log_softmax(-1))).sum(-1) * temperature**2
    assert torch.allclose(forward_kl(student, target).double(), plain, rtol=1e-4, atol=1e-5)
    check(student, target)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("columns", [1, 10, 40])
def test_a_student_that_says_what_the_teacher_says_loses_nothing_and_stays(temperature: float, columns: int):
    student = some_logits(3, 4, 40).requires_grad_()
    p = (student.detach().double() / temperature).softmax(-1)
    ids = p.topk(columns).indices
    probs = p.gather(-1, ids)
    loss = forward_kl(student, SparseTarget(ids, probs.float(), (1 - probs.sum(-1)).clamp(min=0).float(), temperature))
    loss.sum().backward()
    assert loss.abs().max() < 1e-5 * temperature**2
    assert student.grad.abs().max() < 1e-5 * temperature


def without_the_rest(student: Tensor, teacher: SparseTarget) -> Tensor:
    """What renormalising over the kept tokens makes of it."""
    q = teacher.probs / teacher.probs.sum(-1, keepdim=True)
    log_p = (student / teacher.temperature).gather(-1, teacher.ids).log_softmax(-1)
    return (torch.xlogy(q, q) - q * log_p).sum(-1) * teacher.temperature**2


def test_mass_of_the_student_that_leaves_the_kept_tokens_is_paid_for():
    ids = torch.arange(5)[None]
    probs = torch.tensor([[0.4, 0.2, 0.1, 0.1, 0.1]])
    target = SparseTarget(ids, probs, torch.tensor([0.1]), 1.0)
    right = torch.cat([probs, torch.full((1, 10), 0.01)], 1).log()
    moved = right.clone()
    moved[:, 5:] += 3

    def notices(loss: Loss) -> None:
        assert loss(moved, target) > loss(right, target) + 0.1

    notices(forward_kl)
    with pytest.raises(AssertionError):
        notices(without_the_rest)


def test_control_losses_with_a_usual_fault_are_caught():
    logits, target = some_logits(1, 3, 50), a_target(1, 3, 50, 8, 2.0)

    def reverse(student: Tensor, teacher: SparseTarget) -> Tensor:
        log_p = (student / teacher.temperature).log_softmax(-1).gather(-1, teacher.ids[:, :-2])
        p, q = log_p.exp(), teacher.probs[:, :-2]
        rest = 1 - p.sum(-1)
        return ((p * (log_p - q.log())).sum(-1) + rest * (rest / teacher.rest).log()) * teacher.temperature**2

    def untempered(student: Tensor, teacher: SparseTarget) -> Tensor:
        return forward_kl(student * teacher.temperature, teacher)

    def rest_cut_off(student: Tensor, teacher: SparseTarget) -> Tensor:
        return forward_kl(student, SparseTarget(teacher.ids, teacher.probs, torch.zeros_like(teacher.rest), teacher.temperature))

    check(logits, target)
    for broken in (reverse, untempered, rest_cut_off, without_the_rest):
        with pytest.raises(AssertionError):
            check(logits, target, broken)


def test_the_loss_is_never_below_nothing():
    for seed in range(20):
        target = a_target(seed, 5, 40, 6, 1.0)
        assert (forward_kl(some_logits(seed, 5, 40), target) > -1e-5).all()


def test_a_student_without_anything_outside_the_target_pays_as_for_e_to_the_minus_50():
    logits = torch.full((1, 20), -200.0)
    logits[0, :3] = 0
    target = SparseTarget(torch.tensor([[0, 1, 2]]), torch.full((1, 3), 0.3), torch.tensor([0.1]), 1.0)
    logits.requires_grad_()
    loss = forward_kl(logits, target)
    loss.sum().backward()
    assert loss.item() == pytest.approx(3 * 0.3 * np.log(0.3 * 3) + 0.1 * (np.log(0.1) + 50), abs=1e-4)
    assert torch.isfinite(logits.grad).all()


def test_a_target_over_the_whole_vocabulary_has_no_gradient_from_the_rest():
    logits = some_logits(0, 2, 6).requires_grad_()
    target = SparseTarget(torch.arange(6).repeat(2, 1), torch.full((2, 6), 1 / 6), torch.zeros(2), 2.0)
    forward_kl(logits, target).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert torch.allclose(logits.grad, 2 * ((logits.detach() / 2).softmax(-1) - 1 / 6), atol=1e-6)


def test_logits_of_bfloat16_are_worked_on_in_float32():
    logits, target = some_logits(1, 3, 50).bfloat16(), a_target(1, 3, 50, 8, 2.0)
    assert forward_kl(logits, target).dtype == torch.float32
    assert torch.equal(forward_kl(logits, target), forward_kl(logits.float(), target))


def test_cross_entropy_is_that_of_a_dense_reference():
    logits = some_logits(1, 6, 50, spread=10.0)
    realised = torch.tensor([0, 49, 7, 7, 3, 20])
    wanted = -log_softmax(logits.double().numpy())[np.arange(6), realised]
    np.testing.assert_allclose(cross_entropy(logits, realised).double().numpy(), wanted, rtol=1e-5, atol=1e-5)
    shifted = -log_softmax(logits.double().numpy())[np.arange(6), realised.roll(1)]
    assert not np.allclose(cross_entropy(logits, realised).double().numpy(), shifted, atol=0.1)


def dense_of(target: SparseTarget, logits: Tensor, log_weights: np.ndarray) -> np.ndarray:
    """The target as full distributions, its rest shared out in proportion to exp(log_weights) [N, V] over the other tokens."""
    full = np.zeros(logits.shape)
    for row in range(len(full)):
        kept = np.zeros(full.shape[1], bool)
        for id, mass in zip(target.ids[row].tolist(), target.probs[row].double().tolist(), strict=True):
            full[row, id] += mass
            kept[id] = True
        weights = np.where(kept, 0.0, np.exp(log_weights[row] - log_weights[row].max()))
        full[row] += float(target.rest[row]) * weights / max(weights.sum(), 1e-300)
    return full


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), vocabulary=st.integers(3, 60), temperature=st.sampled_from([1.0, 2.0, 5.5]), scale=st.sampled_from([0.1, 3.0, 5.0]), which=st.sampled_from(["ratio", "tail"]))
def test_with_the_rest_shared_out_it_is_the_divergence_over_all_tokens(seed, vocabulary, temperature, scale, which):
    target = a_target(seed, 5, vocabulary, min(vocabulary - 1, 4), temperature)
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(5, vocabulary, generator=generator) * scale).requires_grad_()
    log_p = log_softmax(logits.detach().double().numpy(), temperature)
    if which == "ratio":
        given_ratio = torch.randn(vocabulary, generator=generator)
        shared, log_weights = replace(target, log_ratio=given_ratio), log_p + given_ratio.double().numpy()
    else:
        given_tail = torch.randn(5, vocabulary, generator=generator) * 3
        shared, log_weights = replace(target, log_tail=given_tail), given_tail.double().numpy()
    full = dense_of(target, logits, log_weights)
    loss = forward_kl(logits, shared)
    loss.sum().backward()
    assert logits.grad is not None
    wanted = temperature**2 * np.where(full > 0, full * (np.log(np.maximum(full, 1e-300)) - log_p), 0).sum(-1)
    np.testing.assert_allclose(loss.detach().double().numpy(), wanted, rtol=2e-4, atol=2e-4)
    # what the student's own shares are multiplied by is not gone back through: the gradient is that of a fixed target
    np.testing.assert_allclose(logits.grad.double().numpy(), temperature * (np.exp(log_p) - full), rtol=2e-3, atol=2e-5)


def test_a_ratio_of_one_changes_nothing():
    target = a_target(3, 6, 40, 5, 2.0)
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(forward_kl(logits, replace(target, log_ratio=torch.zeros(40))), forward_kl(logits, target))
    torch.testing.assert_close(forward_kl(logits, replace(target, log_tail=logits / 2)), forward_kl(logits, target))
