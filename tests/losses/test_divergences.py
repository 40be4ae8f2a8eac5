"""Every divergence on kept tokens and rest against dense float64, value and gradient."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.lookup import find
from pipeline.losses.forward_kl import forward_kl
from pipeline.signals.outcomes import LEAST
from pipeline.signals.projection import SparseTarget
from tests.losses.test_forward_kl import a_target, dense_of, log_softmax, some_logits

Loss = Callable[..., Tensor]


def xlogy(a: Tensor, log_ratio: Tensor) -> Tensor:
    return torch.where(a > 0, a * log_ratio, 0.0)


def floored(q: Tensor) -> Tensor:
    return q.clamp(min=1e-300).log().clamp(min=LEAST)


def adaptive(p: Tensor, q: Tensor, head: float, coarse: bool) -> Tensor:
    values = []
    for a, b in zip(p, q, strict=True):
        gap = (a - b).abs().detach()
        of_head, mass = torch.zeros(len(b), dtype=bool), 0.0
        for i in torch.argsort(b, descending=True, stable=True).tolist():
            if mass < head and not (coarse and i == len(b) - 1):
                of_head[i] = True
            mass += float(b[i])
        share = gap[of_head].sum() / gap.sum().clamp(min=1e-9)
        values.append(share * xlogy(b, b.clamp(min=1e-300).log() - a.clamp(min=1e-300).log()).sum() + (1 - share) * xlogy(a, a.log() - floored(b)).sum())
    return torch.stack(values)


def mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    return (share * a + (1 - share) * b).clamp(min=1e-300).log()


DENSE: dict[str, Callable[..., Tensor]] = {
    "forward_kl": lambda p, q, **_: xlogy(q, q.clamp(min=1e-300).log() - p.log()).sum(-1),
    "reverse_kl": lambda p, q, **_: xlogy(p, p.log() - floored(q)).sum(-1),
    "jensen_shannon": lambda p, q, beta=0.5, **_: beta * xlogy(q, q.clamp(min=1e-300).log() - mixture(q, p, beta)).sum(-1) + (1 - beta) * xlogy(p, p.log() - mixture(q, p, beta)).sum(-1),
    "skew_kl": lambda p, q, alpha=0.1, **_: xlogy(q, q.clamp(min=1e-300).log() - mixture(q, p, alpha)).sum(-1),
    "skew_reverse_kl": lambda p, q, alpha=0.1, **_: xlogy(p, p.log() - mixture(p, q, alpha)).sum(-1),
    "total_variation": lambda p, q, **_: (p - q).abs().sum(-1) / 2,
    "adaptive_kl": lambda p, q, head=0.5, coarse=True, **_: adaptive(p, q, head, coarse),
}
OPTIONS = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    *(("jensen_shannon", {"beta": beta}) for beta in (0.1, 0.5, 0.9)),
    *product(["skew_kl", "skew_reverse_kl"], [{"alpha": 0.1}, {"alpha": 0.7}]),
    ("total_variation", {}),
    *(("adaptive_kl", {"head": head}) for head in (0.0, 0.5, 0.9)),
]


def reference(name: str, logits: Tensor, target: SparseTarget, **options) -> tuple[Tensor, Tensor]:
    """Over the target's tokens and one outcome for all others, in float64, gone back through."""
    logits = logits.detach().double().requires_grad_()
    p = (logits / target.temperature).softmax(-1)
    rows = []
    for row in range(len(p)):
        masses = {}
        for id, mass in zip(target.ids[row].tolist(), target.probs[row].double().tolist(), strict=True):
            if mass > 0:
                masses[id] = masses.get(id, 0.0) + mass
        ids = list(masses)
        outside = torch.ones(p.shape[1], dtype=bool)
        outside[ids] = False
        p_row = torch.cat([p[row][ids], p[row][outside].sum()[None]])
        q_row = torch.tensor([*masses.values(), float(target.rest[row])], dtype=torch.float64)
        rows.append(DENSE[name](p_row[None], q_row[None], **options))
    values = torch.cat(rows) * target.temperature**2
    values.sum().backward()
    return values.detach(), logits.grad


def check(name: str, logits: Tensor, target: SparseTarget, loss: Loss | None = None, **options) -> None:
    logits = logits.clone().requires_grad_()
    found = (loss or find("losses", name))(logits, target, **options)
    found.sum().backward()
    values, gradient = reference(name, logits, target, **options)
    np.testing.assert_allclose(found.detach().double().numpy(), values.numpy(), rtol=3e-4, atol=5e-5 * target.temperature**2)
    np.testing.assert_allclose(logits.grad.double().numpy(), gradient.numpy(), rtol=3e-3, atol=5e-5 * target.temperature)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 999),
    columns=st.integers(1, 20),
    vocabulary=st.sampled_from([21, 200]),
    temperature=st.sampled_from([1.0, 2.0, 4.0, 8.0]),
    rest=st.sampled_from(["some", "none", "all but nothing"]),
    spread=st.sampled_from([0.1, 3.0]),
)
def test_value_and_gradient_are_those_of_a_dense_reference(name, options, seed, columns, vocabulary, temperature, rest, spread):
    check(name, some_logits(seed, 3, vocabulary, spread), a_target(seed, 3, vocabulary, columns, temperature, rest), **options)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("columns", [1, 4])
def test_ties_and_one_kept_token(name: str, options: dict, columns: int):
    target = SparseTarget(torch.arange(columns).repeat(2, 1), torch.full((2, columns), 0.8 / columns), torch.full((2,), 0.2), 1.0)
    if name != "adaptive_kl" or options["head"] == 0.0:  # which of equal ones is of the head is nobody's affair
        check(name, some_logits(0, 2, 9), target, **options)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_student_that_says_what_the_teacher_says_loses_nothing_and_stays(name: str, options: dict):
    student = some_logits(3, 4, 40).requires_grad_()
    p = student.detach().double().softmax(-1)
    ids = p.topk(9).indices
    probs = p.gather(-1, ids)
    loss = find("losses", name)(student, SparseTarget(ids, probs.float(), (1 - probs.sum(-1)).float(), 1.0), **options)
    assert loss.abs().max() < 2e-5
    loss.sum().backward()
    if name != "total_variation":  # whose gradient has a step there
        assert student.grad.abs().max() < 2e-5


def kept_only(student: Tensor, teacher: SparseTarget) -> Tensor:
    """The reverse divergence as it is often written: over the kept tokens, as they are."""
    log_p = student.log_softmax(-1).gather(-1, teacher.ids)
    return (log_p.exp() * (log_p - teacher.probs.log())).sum(-1)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_moving_mass_off_the_kept_tokens_wins_nothing(name: str, options: dict):
    target = SparseTarget(torch.arange(5)[None], torch.tensor([[0.4, 0.2, 0.1, 0.1, 0.1]]), torch.tensor([0.1]), 1.0)
    right = torch.cat([target.probs, torch.full((1, 10), 0.01)], 1).log()
    moved = right.clone()
    moved[:, 5:] += 3
    loss = find("losses", name)
    assert loss(moved, target, **options) > loss(right, target, **options) + 0.02
    assert kept_only(moved, target) < kept_only(right, target) - 0.02  # control


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("which", ["ratio", "tail"])
def test_with_the_rest_shared_out_it_is_over_all_tokens(name: str, options: dict, which: str):
    target = a_target(5, 4, 30, 6, 2.0)
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(4, 30, generator=generator) * 2).requires_grad_()
    log_p = log_softmax(logits.detach().double().numpy(), 2.0)
    if which == "ratio":
        ratio = torch.randn(30, generator=generator)
        shared, weights = replace(target, log_ratio=ratio), log_p + ratio.double().numpy()
    else:
        tail = torch.randn(4, 30, generator=generator) * 3
        shared, weights = replace(target, log_tail=tail), tail.double().numpy()
    full = torch.from_numpy(dense_of(target, logits, weights))
    found = find("losses", name)(logits, shared, **options)
    found.sum().backward()
    dense = logits.detach().double().requires_grad_()
    wanted = DENSE[name]((dense / 2).softmax(-1), full, **options, coarse=False) * 4
    wanted.sum().backward()
    np.testing.assert_allclose(found.detach().double().numpy(), wanted.detach().numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(logits.grad.double().numpy(), dense.grad.numpy(), rtol=5e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_certain_student_and_a_certain_teacher_give_finite_gradients(name: str, options: dict):
    logits = torch.full((2, 20), -200.0)
    logits[:, :3] = 0
    target = SparseTarget(torch.tensor([[0, 1, 2], [7, 7, 7]]), torch.tensor([[0.3, 0.3, 0.3], [1.0, 0.0, 0.0]]), torch.tensor([0.1, 0.0]), 1.0)
    logits.requires_grad_()
    loss = find("losses", name)(logits, target, **options)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


def test_control_the_two_directions_and_a_forgotten_temperature_are_caught():
    logits, target = some_logits(1, 3, 50), a_target(1, 3, 50, 8, 2.0)
    reverse = find("losses", "reverse_kl")
    check("reverse_kl", logits, target)
    for broken in (forward_kl, lambda student, teacher: reverse(student * 2, teacher), lambda student, teacher: reverse(student, teacher, temperature_squared=False)):
        with pytest.raises(AssertionError):
            check("reverse_kl", logits, target, broken)


@pytest.mark.parametrize(("beta", "name"), [(1e-3, "forward_kl"), (1 - 1e-3, "reverse_kl")])
def test_near_its_ends_jensen_shannon_is_the_one_and_the_other_divergence(beta: float, name: str):
    logits = some_logits(1, 3, 20, 1.0)
    probs = (logits + some_logits(2, 3, 20, 0.5)).softmax(-1)
    target = SparseTarget(torch.arange(20).repeat(3, 1), probs, torch.zeros(3), 1.0)
    found = find("losses", "jensen_shannon")(logits, target, beta=beta) / min(beta, 1 - beta)
    torch.testing.assert_close(found, find("losses", name)(logits, target), rtol=0.02, atol=1e-3)
