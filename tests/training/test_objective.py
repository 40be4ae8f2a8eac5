from collections.abc import Callable
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.losses.cross_entropy import cross_entropy
from pipeline.losses.forward_kl import forward_kl
from pipeline.training.batches import Batch, make_batch
from pipeline.training.objective import Part, loss_of, mass, parts
from tests.signals.dense import student
from tests.training.test_batches import STORED, examples

WEIGHTS = [1.0, 0.5, 2.0, 1.0, 3.0]
BOTH = [("cross_entropy", 0.3, {}, "rest"), ("forward_kl", 0.7, {}, "rest")]
KNOWN = (True, False, True, True, True)


@cache
def made() -> tuple:
    return examples()


def batch_of(which: list[int], weights: list[float] = WEIGHTS) -> Batch:
    records, words = made()
    return make_batch([records[i] for i in which], [words[i] if KNOWN[i] else None for i in which], [weights[i] for i in which], STORED, 2.0)


def table(seed: int = 0) -> Tensor:
    """A model of one token's context: its logits are a row of this."""
    size = len(student().vocabulary)
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def step(batches: list[Batch], objective: list[Part], give: Callable = loss_of) -> tuple[Tensor, Tensor, dict[str, float]]:
    """A training step's loss, gradient and parts over micro-batches."""
    model = table().requires_grad_()
    total = torch.stack([mass(batch) for batch in batches]).sum(0)
    whole, shares = torch.zeros(()), dict.fromkeys((part.name for part in objective), 0.0)
    for batch in batches:
        loss, of_parts = give(objective, batch, model[batch.ids.flatten()[batch.rows]], total)
        loss.backward()
        whole = whole + loss.detach()
        for name, share in of_parts.items():
            shares[name] += float(share)
    return whole, model.grad, shares


def check(split: list[list[int]], give: Callable = loss_of) -> None:
    loss, gradient, shares = step([batch_of([0, 1, 2, 3, 4])], parts(BOTH))
    found, found_gradient, found_shares = step([batch_of(part) for part in split], parts(BOTH), give)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-4, atol=1e-7)
    assert found_shares == pytest.approx(shares, rel=1e-5)


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(5)), cuts=st.sets(st.integers(1, 4)))
def test_micro_batches_sum_to_the_whole_however_it_is_split(order, cuts):
    bounds = [0, *sorted(cuts), 5]
    check([list(order[a:b]) for a, b in pairwise(bounds)])


def test_control_a_mean_of_each_micro_batchs_mean_is_caught():
    def mean_of_means(objective, batch, logits, total):
        loss, shares = loss_of(objective, batch, logits, mass(batch))
        return loss / 2, {name: share / 2 for name, share in shares.items()}

    check([[0, 1], [2, 3, 4]])
    with pytest.raises(AssertionError):
        check([[0, 1], [2, 3, 4]], mean_of_means)


def by_hand(weights: list[float], which: list[int]) -> dict[str, float]:
    """Weighted means, row after row."""
    sums = {"cross_entropy": [0.0, 0.0], "forward_kl": [0.0, 0.0]}
    for i in which:
        batch = batch_of([i], weights)
        logits = table()[batch.ids.flatten()[batch.rows]]
        sums["cross_entropy"][0] += weights[i] * float(cross_entropy(logits, batch.realised).double().sum())
        sums["cross_entropy"][1] += weights[i] * len(batch.rows)
        if KNOWN[i]:
            reliability = torch.from_numpy(made()[1][i].reliability).double()
            sums["forward_kl"][0] += weights[i] * float((forward_kl(logits[batch.known], batch.teacher).double() * reliability).sum())
            sums["forward_kl"][1] += weights[i] * float(reliability.sum())
    return {name: value / number for name, (value, number) in sums.items()}


def test_the_loss_is_the_weighted_sum_of_weighted_means_over_rows():
    loss, _, shares = step([batch_of([0, 1, 2, 3, 4])], parts(BOTH))
    wanted = by_hand(WEIGHTS, [0, 1, 2, 3, 4])
    assert shares == pytest.approx(wanted, rel=1e-5)
    assert float(loss) == pytest.approx(0.3 * wanted["cross_entropy"] + 0.7 * wanted["forward_kl"], rel=1e-5)
    assert by_hand([1.0] * 5, [0, 1, 2, 3, 4]) != pytest.approx(wanted, rel=1e-3)


def test_a_record_of_no_weight_counts_for_nothing():
    weights = [1.0, 0.5, 2.0, 1.0, 0.0]
    loss, gradient, _ = step([batch_of([0, 1, 2, 3, 4], weights)], parts(BOTH))
    without, gradient_without, _ = step([batch_of([0, 1, 2, 3], weights)], parts(BOTH))
    torch.testing.assert_close(loss, without)
    torch.testing.assert_close(gradient, gradient_without)


def test_a_loss_that_needs_the_teacher_sees_known_rows_only_and_another_all():
    seen = {}

    def spy(name: str) -> Callable:
        def loss(*given: Tensor) -> Tensor:
            seen[name] = given
            return given[0].sum(-1) * 0

        return loss

    batch = batch_of([1, 0, 4])
    logits = table()[batch.ids.flatten()[batch.rows]]
    objective = [Part("plain", 1.0, spy("plain"), ("student", "realised"), {}), Part("taught", 1.0, spy("taught"), ("student", "teacher", "realised"), {})]
    loss_of(objective, batch, logits, mass(batch))
    assert torch.equal(seen["plain"][0], logits)
    assert torch.equal(seen["plain"][1], batch.realised)
    assert torch.equal(seen["taught"][0], logits[batch.known])
    assert seen["taught"][1] is batch.teacher
    assert torch.equal(seen["taught"][2], batch.realised[batch.known])
    assert len(batch.known) < len(batch.rows)


def test_a_batch_without_any_word_of_the_teacher_has_its_other_losses():
    batch = batch_of([1])
    loss, _, shares = step([batch], parts(BOTH))
    assert shares["forward_kl"] == 0
    assert float(loss) == pytest.approx(0.3 * shares["cross_entropy"], rel=1e-5)
    assert float(loss) > 0
    alone, _, _ = step([batch], parts([("forward_kl", 1.0, {}, "rest")]))
    assert float(alone) == 0


def test_what_weighs_nothing_is_left_out_and_options_reach_their_loss():
    assert [part.name for part in parts([("cross_entropy", 0.0, {}, "rest"), ("forward_kl", 1.0, {}, "rest")])] == ["forward_kl"]
    squared, plain = (step([batch_of([0, 2])], parts([("forward_kl", 1.0, {"temperature_squared": option}, "rest")]))[0] for option in (True, False))
    assert float(squared) == pytest.approx(4 * float(plain), rel=1e-5)


def test_a_part_asks_for_what_its_parameters_are_called():
    entropy, kl = parts(BOTH)
    assert not entropy.needs_teacher
    assert kl.needs_teacher
    assert entropy.asks_for == ("student", "realised")
    assert kl.asks_for == ("student", "teacher")


def test_mass_counts_weights_of_all_rows_and_of_known_ones():
    batch = batch_of([0, 1, 2, 3, 4])
    weights = np.array(WEIGHTS)[batch.record.numpy()]
    reliability = np.concatenate([word.reliability for word, known in zip(made()[1], KNOWN, strict=True) if known])
    assert (reliability < 1).any()
    assert mass(batch).tolist() == pytest.approx([weights.sum(), (weights[batch.known.numpy()] * reliability).sum(), 0.0])


def test_one_batch_can_be_learnt_by_heart():
    """Targets, rows and gradients belong together: the loss goes to what the targets leave."""
    batch = batch_of([0, 2])
    model = table().requires_grad_()
    optimizer = torch.optim.Adam([model], lr=0.3)
    losses = []
    for _ in range(60):
        loss, _ = loss_of(parts([("forward_kl", 1.0, {}, "rest")]), batch, model[batch.ids.flatten()[batch.rows]], mass(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
