"""The loss some rows at a time, against all rows at once through plain autograd, in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.lookup import find
from pipeline.models.in_parts import in_parts
from pipeline.signals.projection import SparseTarget
from tests.losses.test_forward_kl import a_target

N, H, V, PADDED = 11, 5, 23, 27
LOSSES = ["forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation", "cross_entropy"]


class Tiny(nn.Module):
    """An embedding, a layer and a head, which may be the embedding."""

    def __init__(self, tied: bool, bias: bool = False, adapter: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer, self.head = nn.Embedding(PADDED, H), nn.Linear(H, H), nn.Linear(H, PADDED, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight
        if adapter:
            self.head.requires_grad_(False)
            self.head = Adapted(self.head)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(ids)))


class Adapted(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.down, self.up = inner, nn.Linear(H, 2, bias=False), nn.Linear(2, PADDED, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.inner(states) + self.up(self.down(states))


def losses_of(name: str, logits: Tensor, target: SparseTarget, realised: Tensor) -> Tensor:
    """[n]."""
    return find("losses", name)(logits, realised) if name == "cross_entropy" else find("losses", name)(logits, target)


def target_of(seed: int = 0) -> SparseTarget:
    return a_target(seed, N, V, 4, 2.0, "some")


def gradients(model: Tiny, ends: list[int] | None, name: str = "forward_kl", softcap: float | None = None, factor: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and every gradient: in parts that end there, or None: at once."""
    target, realised, weights = target_of(), torch.arange(N) % V, torch.linspace(0.1, 2, N, dtype=torch.float64)
    states = model(torch.arange(N) % PADDED)

    def of_rows(logits: Tensor, rows: slice) -> Tensor:
        logits = torch.tanh(logits / softcap) * softcap if softcap else logits
        return (losses_of(name, logits, target.rows(rows), realised[rows]) * weights[rows]).sum()

    if ends is None:
        loss = of_rows(model.head(states)[:, :V], slice(0, N))
    else:
        parts = list(pairwise([0, *ends]))
        loss = in_parts(states, model.head, V, torch.float64, parts, lambda i, logits: of_rows(logits, slice(*parts[i])))
    (loss * factor).backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def check(ends: list[int], **how) -> None:
    build = {key: how.pop(key) for key in ("tied", "bias", "adapter") if key in how}
    loss, expected = gradients(Tiny(**build), None, **how)
    found_loss, found = gradients(Tiny(**build), ends, **how)
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found_loss, loss, rtol=1e-10, atol=1e-10)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("tied", [True, False])
@settings(deadline=None, max_examples=8)
@given(cuts=st.sets(st.integers(1, N - 1)))
def test_equal_in_parts_and_at_once_with_tied_and_untied_heads(name: str, tied: bool, cuts: set[int]):
    check([*sorted(cuts), N], name=name, tied=tied)


@pytest.mark.parametrize("how", [{"bias": True}, {"softcap": 2.0}, {"adapter": True}, {"factor": 0.3}], ids=str)
def test_equal_with(how: dict):
    check([4, 8, N], tied=False, **how)


def test_only_a_parts_logits_exist_at_a_time():
    seen = []
    model = Tiny(tied=True)
    in_parts(model(torch.arange(N)), model.head, V, torch.float64, [(0, 4), (4, 8), (8, N)], lambda i, logits: seen.append((i, tuple(logits.shape))) or logits.sum()).backward()
    assert seen == [(0, (4, V)), (1, (4, V)), (2, (3, V))]


def test_a_frozen_head_gets_no_gradient_and_the_body_its_own():
    model, other = Tiny(tied=False), Tiny(tied=False)
    model.head.requires_grad_(False)
    _, found = gradients(model, [5, N])
    _, expected = gradients(other, None)
    assert "head.weight" not in found
    torch.testing.assert_close(found["layer.weight"], expected["layer.weight"], rtol=1e-10, atol=1e-10)


def test_without_gradients_only_the_loss():
    with torch.no_grad():
        states = (model := Tiny(tied=False))(torch.arange(N))
        found = in_parts(states, model.head, V, torch.float64, [(0, 6), (6, N)], lambda i, logits: logits.square().sum())
    torch.testing.assert_close(found, model.head(states)[:, :V].square().sum().detach())


def test_products_in_bfloat16_are_summed_in_float32():
    """Many parts' gradients of the head: nearer to the exact sum than what is summed in bfloat16."""
    torch.manual_seed(0)
    head, states = nn.Linear(8, 16, bias=False), torch.randn(4096, 8) + 1
    parts = list(pairwise(range(0, 4097, 8)))
    in_parts(states.requires_grad_(), head, 16, torch.bfloat16, parts, lambda i, logits: logits.float().sum()).backward()
    exact = torch.ones(16, 4096, dtype=torch.float64) @ states.detach().double()
    error = (head.weight.grad.double() - exact).abs().max()
    low = torch.zeros(16, 8, dtype=torch.bfloat16)
    for begin, end in parts:
        low += torch.ones(16, end - begin, dtype=torch.bfloat16) @ states[begin:end].detach().bfloat16()
    assert head.weight.grad.dtype is torch.float32
    assert error < 2e-3 * exact.abs().max() < (low.double() - exact).abs().max()


def test_control_a_head_whose_gradient_is_only_the_last_parts_is_caught(monkeypatch: pytest.MonkeyPatch):
    addmm = Tensor.addmm_
    monkeypatch.setattr(Tensor, "addmm_", lambda self, a, b: addmm(self.zero_(), a, b))
    with pytest.raises(AssertionError):
        check([4, N], tied=True)


def test_what_is_not_gone_back_through_makes_no_gradient(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.autograd, "grad", lambda *_: pytest.fail("a gradient is made"))
    model = Tiny(tied=False)
    states = model(torch.arange(N))
    with torch.no_grad():
        in_parts(states, model.head, V, torch.float64, [(0, N)], lambda i, logits: logits.sum())
