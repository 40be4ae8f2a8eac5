"""A batch in parts of so many rows: together they are the batch, for every kind of loss."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.lookup import find
from pipeline.signals.chunks import Chunks, chunked
from pipeline.signals.counts import counted
from pipeline.signals.projection import SparseTarget, meet, projected
from pipeline.signals.targets import with_realised
from pipeline.signals.vocabulary import CLASSES, begins_anew
from pipeline.training.batches import Batch, make_batch
from pipeline.training.objective import loss_of, mass, parts
from tests.signals.dense import student, targets_of, teacher
from tests.training.test_batches import RECORDS, STORED

OBJECTIVE = [
    ("cross_entropy", 0.2, {}, "rest"),
    ("forward_kl", 0.5, {}, "rest"),
    ("reverse_kl", 0.3, {}, "hidden"),
    ("alm", 0.1, {}, "rest"),
    ("alm", 0.1, {"boundary": True}, "rest"),
]


@cache
def batch(rows_at_once: int, stretches: bool = True) -> Batch:
    """Of hidden states, stretches with their boundaries, and one record that the teacher says nothing of."""
    size = len(teacher().vocabulary)
    method = find("projections", "contextual")(teacher().vocabulary, student().vocabulary, student().encode, counted([], size))
    rendered, words, chunks = [], [], []
    for seed, record in enumerate(RECORDS):
        draw = np.random.default_rng(seed)
        a, b = teacher().render(record), student().render(record)
        targets = with_realised(targets_of(draw.normal(0, 2, (len(a) - 1, size)), a, np.arange(len(a) - 1, dtype=np.int32), 16, STORED), a.ids[1:], STORED)
        boundary = np.log(draw.dirichlet(np.ones(len(CLASSES)), len(a) - 1)).astype(np.float32)
        hidden = draw.integers(-127, 127, (len(a) - 1, 6)).astype(np.int8)
        targets = replace(targets, boundary=boundary, hidden=hidden, hidden_scale=np.ones(len(a) - 1, np.float32))
        rendered.append(b)
        words.append(None if seed == 1 else projected(targets, method.shares(meet(record.content, a, targets, b)), size))
        chunks.append(chunked(a, targets, b))
    begins = torch.from_numpy(begins_anew(student().vocabulary))
    made = make_batch(rendered, words, [1.0 + n for n in range(len(rendered))], STORED, 2.0, chunks if stretches else None, begins, rows_at_once=rows_at_once)
    return replace(made, weights=made.weights.double(), known_weights=made.known_weights.double(), teacher=in_float64(made.teacher), chunks=made.chunks and in_float64(made.chunks))


def in_float64(values: SparseTarget | Chunks) -> SparseTarget | Chunks:
    return replace(values, **{name: value.double() for name, value in vars(values).items() if isinstance(value, Tensor) and value.is_floating_point()})


def found(batch: Batch, objective: list, cut: bool) -> tuple[Tensor, Tensor, dict[str, float]]:
    size = len(student().vocabulary)
    logits = torch.randn(len(batch.rows), size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    head = torch.randn(6, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, shares = torch.zeros((), dtype=torch.float64), dict[str, float]()
    for part, rows in [(batch.part(cut), cut.rows) for cut in batch.cuts] if cut else [(batch, slice(None))]:
        tail = None
        if part.states is not None and part.teacher is not None:
            tail = (part.states.hidden.double() @ head).index_put((part.states.row, part.states.id % size), torch.tensor(-5.0, dtype=torch.float64))  # whatever the kept ones do to it
        loss, found = loss_of(parts(objective), part, logits[rows], mass(batch), log_tail=tail)
        whole = whole + loss
        for name, share in found.items():
            shares[name] = shares.get(name, 0.0) + float(share)
    whole.backward()
    return whole.detach(), logits.grad, shares


@pytest.mark.parametrize("rows_at_once", [1, 2, 7, 40, 10_000])
@pytest.mark.parametrize("stretches", [True, False])
def test_the_parts_losses_and_gradients_sum_to_the_batchs(rows_at_once: int, stretches: bool):
    objective = OBJECTIVE if stretches else OBJECTIVE[:3]
    loss, gradient, shares = found(batch(rows_at_once, stretches), objective, cut=False)
    of_parts, of_gradient, of_shares = found(batch(rows_at_once, stretches), objective, cut=True)
    torch.testing.assert_close(of_parts, loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(of_gradient, gradient, rtol=1e-10, atol=1e-10)
    assert of_shares == pytest.approx(shares, rel=1e-5)
    assert len(shares) == len(objective)


def test_parts_have_no_more_rows_than_asked_for_unless_a_record_must_be_whole():
    cuts = batch(7, stretches=False).cuts
    assert [cut.rows.stop - cut.rows.start for cut in cuts[:-1]] == [7] * (len(cuts) - 1)
    assert cuts[-1].rows.stop == len(batch(7, False).rows)
    whole = batch(7)
    for cut in whole.cuts:
        records = whole.record[cut.rows]
        assert cut.rows.start == 0 or whole.record[cut.rows.start - 1] != records[0]
        assert cut.rows.stop - cut.rows.start <= 7 or len(records.unique()) == 1
    assert len(whole.cuts) > 2


def test_control_a_cut_through_a_stretch_is_caught():
    given = batch(10_000)
    broken = replace(given, cuts=[*batch(3, stretches=False).cuts])
    broken = replace(broken, cuts=[replace(cut, chunk_rows=slice(0, 0), chunks=slice(0, 0)) for cut in broken.cuts])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found(broken, OBJECTIVE, cut=True)[0], found(given, OBJECTIVE, cut=False)[0], rtol=1e-6, atol=1e-6)
