import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.signals.projection import REST, SparseTarget
from pipeline.signals.selection import strongest, tail_sums
from pipeline.signals.tail import FARTHEST, log_ratio, means_at, placed_logits, placed_means, student_sums

STORED = [1.0, 2.0, 8.0]


def target_of(p: torch.Tensor, keep: int, temperature: float = 1.0) -> SparseTarget:
    """The strongest tokens of distributions [N, V], and the mass of the others."""
    values, ids = p.topk(keep)
    return SparseTarget(ids, values.float(), (1 - values.double().sum(-1)).float(), temperature)


def tails(logits: np.ndarray, ids: np.ndarray, temperature: float) -> np.ndarray:
    p = np.exp(logits / temperature - np.logaddexp.reduce(logits / temperature, axis=-1, keepdims=True))
    np.put_along_axis(p, ids, 0.0, -1)
    return p


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), vocabulary=st.integers(5, 200), temperature=st.sampled_from([1.0, 3.0, 8.0]))
def test_what_the_student_gives_to_the_rest_is_the_dense_sum(seed, vocabulary, temperature):
    generator = torch.Generator().manual_seed(seed)
    target = target_of((torch.randn(7, vocabulary, generator=generator)).softmax(-1), 4, temperature)
    student = torch.randn(7, vocabulary, generator=generator) * 3
    share = tails(student.double().numpy(), target.ids.numpy(), temperature)
    share /= share.sum(-1, keepdims=True)
    wanted = (target.rest.double().numpy()[:, None] * share).sum(0)
    np.testing.assert_allclose(student_sums(student, target).numpy(), wanted, rtol=1e-4, atol=1e-7)


def test_with_the_ratio_the_student_s_average_tail_becomes_the_teacher_s():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4000, 50, generator=generator) + torch.linspace(-3, 3, 50)
    student = teacher + 0.3 * torch.randn(4000, 50, generator=generator) + 1.5 * torch.randn(50, generator=generator)
    kept = strongest(teacher, torch.zeros(4000, dtype=torch.int64), 0.0, 1, 5, [1.0])
    sums = torch.zeros(1, 50)
    tail_sums(teacher, kept, [1.0], sums)
    target = SparseTarget(kept.ids.view(4000, 5), kept.logprobs.view(4000, 5).exp(), kept.rests[0].exp(), 1.0)
    before = student_sums(student, target)
    ratio = log_ratio(sums[0], before)
    after = target.rest @ (student.scatter(-1, target.ids, -1e9).log_softmax(-1) + ratio).softmax(-1)
    assert float((after - sums[0]).norm()) < 0.15 * float((before - sums[0]).norm())


def test_means_at_stored_temperatures_are_those_and_in_between_close_to_the_truth():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (400, 300)) + rng.normal(0, 1, 300)
    ids = np.argsort(-logits, axis=-1)[:, :10]
    log_means = np.stack([np.log(tails(logits, ids, t).mean(0)) for t in STORED])
    for temperature in STORED:
        assert np.array_equal(means_at(log_means, STORED, temperature), log_means[STORED.index(temperature)])
    for temperature in (1.4, 4.0, 5.5, 20.0):
        truth = np.log(tails(logits, ids, temperature).mean(0))
        assert np.abs(means_at(log_means, STORED, temperature) - truth).mean() < 0.15


def test_a_teacher_s_averages_go_where_its_tokens_go():
    log_means = np.log(np.array([[0.1, 0.2, 0.3, 0.4]]))
    placed = placed_means(log_means, np.array([2, 2, REST, 0], np.int32), 4)
    assert np.exp(placed[0, [2, 0]]) == pytest.approx([0.3, 0.4])
    assert np.isnan(placed[0, [1, 3]]).all()
    assert log_ratio(torch.from_numpy(np.exp(placed[0])), torch.full((4,), 0.1))[[1, 3]].tolist() == [0.0, 0.0]


def test_ratios_stay_finite_and_bounded():
    teacher = torch.tensor([0.0, 1.0, float("nan"), 1e-20, 0.5])
    student = torch.tensor([1.0, 0.0, 1.0, 1e-20, 0.5])
    assert log_ratio(teacher, student).tolist() == pytest.approx([-FARTHEST, FARTHEST, 0.0, 0.0, 0.0])


def test_kept_states_logits_placed_are_the_teacher_s_probabilities_by_the_map():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    student_id = torch.tensor([0, 0, 3, REST, 4, 1])
    p = (logits / 2).softmax(-1)
    none = torch.zeros(0, dtype=torch.int64)
    found = placed_logits(logits, (none, none), 2.0, student_id, 5).exp()
    torch.testing.assert_close(found[:, 0], p[:, 0] + p[:, 1])
    torch.testing.assert_close(found[:, 3], p[:, 2])
    assert float(found[:, 2].max()) < 1e-30


def test_what_is_kept_has_no_part_in_how_the_rest_is_shared_out():
    """Its mass may have gone elsewhere than the map says: to what the student reads in this text."""
    logits = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    student_id = torch.tensor([0, 0, 3, REST, 4, 1])
    kept = (torch.tensor([0, 0, 1, 1, 1, 1, 1, 1]), torch.tensor([1, 2, *range(6)]))
    p = (logits / 2).softmax(-1)
    found = placed_logits(logits, kept, 2.0, student_id, 5)
    left = 1 - p[0, 1] - p[0, 2]
    torch.testing.assert_close(found[0].exp(), torch.stack([p[0, 0], p[0, 5], torch.tensor(0.0), torch.tensor(0.0), p[0, 4]]) / left)
    assert found[1].isfinite().all()  # nothing is left of the second row
