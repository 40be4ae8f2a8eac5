import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.signals.outcomes import log_outcomes


def plainly(student: Tensor, ids: Tensor, temperature: float | Tensor) -> Tensor:
    """By masks, gone back through by autograd."""
    log_p = (student / temperature).log_softmax(-1)
    named = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, ids, True)
    others = log_p.masked_fill(named, -1e9).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, ids), others], -1)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 999), rows=st.integers(1, 4), columns=st.integers(1, 6), spread=st.sampled_from([0.0, 1.0, 30.0]), a_row=st.booleans())
def test_value_and_gradient_with_tokens_named_twice(seed, rows, columns, spread, a_row):
    draw = torch.Generator().manual_seed(seed)
    student = (torch.randn(rows, 9, generator=draw, dtype=torch.float64) * spread).requires_grad_()
    ids = torch.randint(0, 9, (rows, columns), generator=draw)
    temperature = torch.rand(rows, 1, generator=draw, dtype=torch.float64) * 7 + 1 if a_row else 2.0
    slope = torch.randn(rows, columns + 1, generator=draw, dtype=torch.float64)
    found, expected = (function(student, ids, temperature) for function in (log_outcomes, plainly))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    of_found, of_expected = (torch.autograd.grad(values, student, slope)[0] for values in (found, expected))
    torch.testing.assert_close(of_found, of_expected, rtol=1e-10, atol=1e-10)


def test_all_tokens_named_leaves_nothing_for_the_others():
    student = torch.randn(2, 3, requires_grad=True)
    found = log_outcomes(student, torch.arange(3).repeat(2, 1))
    torch.testing.assert_close(found[:, :3], student.log_softmax(-1))
    assert (found[:, 3] < -1e8).all()
    found[:, :3].sum().backward()
    torch.testing.assert_close(student.grad, 1 - 3 * student.detach().softmax(-1))


def test_a_rest_of_next_to_nothing_is_not_cancelled_away():
    student = torch.tensor([[0.0, -60.0, -61.0]])
    found = log_outcomes(student, torch.tensor([[0]]))[0, 1]
    assert found.item() == pytest.approx(-60 + torch.log1p(torch.tensor(-1.0).exp()).item(), rel=1e-6)


def test_bfloat16_logits_are_read_in_float32_and_get_a_gradient_of_their_own_type():
    student = torch.randn(2, 50, dtype=torch.bfloat16, requires_grad=True)
    found = log_outcomes(student, torch.tensor([[1], [2]]))
    assert found.dtype is torch.float32
    found.sum().backward()
    assert student.grad.dtype is torch.bfloat16
