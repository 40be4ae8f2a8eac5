"""A loss over the rows of a head's logits, some rows at a time: never [batch, length, vocabulary], not even for the gradient.

A part's gradient is known as soon as its loss is, so it is taken at once, and of it only what belongs to the hidden states and
to the head is kept. The head is multiplied as often as for all rows together: nothing is computed twice.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LossOf = Callable[[int, Tensor], Tensor]
"""From a part's number and its logits [n, V] to its share of the loss."""


class Head(Protocol):
    """What stands between hidden states and logits, with the gradients of its parameters summed over parts."""

    gradients: dict[Tensor, Tensor]

    def logits(self, states: Tensor) -> Tensor:
        """[n, V] of [n, H]; not gone back through."""

    def loss(self, states: Tensor, loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient [n, H]."""


class PlainHead:
    """One matrix, perhaps with a bias: products in `dtype`, sums over parts in the parameters' own type."""

    def __init__(self, head: nn.Linear, vocabulary_size: int, dtype: torch.dtype) -> None:
        self._head, self._size, self._dtype = head, vocabulary_size, dtype
        self._weight, self._bias = (None if part is None else part.detach()[:vocabulary_size].to(dtype) for part in (head.weight, head.bias))
        self.gradients = _zeros(head)

    def logits(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states.to(self._dtype), self._weight, self._bias)

    def loss(self, states: Tensor, loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        states = states.to(self._dtype)
        logits = self.logits(states).requires_grad_()
        with torch.enable_grad():
            loss = loss_of(logits)
        (slope,) = torch.autograd.grad(loss, logits)
        if (of_weight := self.gradients.get(self._head.weight)) is not None:
            rows = of_weight[: self._size]
            if rows.dtype == slope.dtype:
                rows.addmm_(slope.t(), states)
            else:
                rows += slope.t() @ states
        if self._head.bias is not None and (of_bias := self.gradients.get(self._head.bias)) is not None:
            of_bias[: self._size] += slope.sum(0, dtype=of_bias.dtype)
        return loss.detach(), slope @ self._weight


class AnyHead:
    """Whatever module it is, such as a matrix with an adapter."""

    def __init__(self, head: nn.Module, vocabulary_size: int, dtype: torch.dtype) -> None:
        self._head, self._size, self._dtype = head, vocabulary_size, dtype
        self.gradients = _zeros(head)

    def logits(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, self._dtype, enabled=self._dtype != states.dtype):
            logits: Tensor = self._head(states)
        return logits[:, : self._size]

    def loss(self, states: Tensor, loss_of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        states = states.detach().requires_grad_()
        with torch.enable_grad():
            loss = loss_of(self.logits(states))
        of_states, *of_head = torch.autograd.grad(loss, [states, *self.gradients], allow_unused=True)
        for total, gradient in zip(self.gradients.values(), of_head, strict=True):
            if gradient is not None:
                total += gradient
        return loss.detach(), torch.zeros_like(states) if of_states is None else of_states


def in_parts(hidden: Tensor, head: nn.Module, vocabulary_size: int, dtype: torch.dtype, parts: Sequence[tuple[int, int]], loss_of: LossOf) -> Tensor:
    """The sum over i of loss_of(i, logits of the rows parts[i]); its gradient reaches `hidden` and the head's parameters.

    hidden: [N, H]; parts: begin and end of each, one behind the other over all N rows; dtype: that products are in. The
    logits are those of the head's first `vocabulary_size` rows.
    """
    form = (PlainHead if type(head) is nn.Linear else AnyHead)(head, vocabulary_size, dtype)  # type: ignore[arg-type]
    total: Tensor = _InParts.apply(hidden, form, parts, loss_of, torch.is_grad_enabled(), *form.gradients)
    return total


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, parts: Sequence[tuple[int, int]], loss_of: LossOf, learns: bool, *parameters: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
        learns = learns and any(ctx.needs_input_grad)
        of_hidden = torch.zeros_like(hidden) if learns else hidden[:0]
        for i, (begin, end) in enumerate(parts):
            rows = hidden[begin:end].detach()
            if learns:
                loss, of_hidden[begin:end] = head.loss(rows, partial(loss_of, i))
            else:
                loss = loss_of(i, head.logits(rows))
            total += loss
        ctx.gradients = [of_hidden, *head.gradients.values()]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *of_head = ctx.gradients if slope == 1 else [gradient * slope for gradient in ctx.gradients]
        del ctx.gradients
        return of_hidden, None, None, None, None, *of_head


def _zeros(head: nn.Module) -> dict[Tensor, Tensor]:
    return {parameter: torch.zeros_like(parameter) for parameter in head.parameters() if parameter.requires_grad and torch.is_grad_enabled()}
