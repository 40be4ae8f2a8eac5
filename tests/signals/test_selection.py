from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import NumericsError
from pipeline.signals import selection as module
from pipeline.signals.selection import Kept, class_masses, concatenated, drawn, strongest, tail_sums
from tests.signals.dense import log_softmax, log_sum, order

TEMPERATURES = [1.0, 2.0, 8.0]
LISTS = [[1.0], TEMPERATURES, [1.0, 1.5, 3.0]]
VOCABULARIES = [1, 2, 3, 64, 127, 128, 129, 1000]
REST_ERROR = 0.01
"""Nats."""
KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "usual": lambda rng, size: rng.normal(0, 3, size),
    "scale 30": lambda rng, size: rng.normal(0, 30, size),
    "nearly flat": lambda rng, size: rng.normal(0, 0.01, size),
    "all equal": lambda rng, size: np.full(size, rng.choice([-500.0, -1.0, 0.0, 3.0, 500.0])),
    "one hot": lambda rng, size: np.where(np.arange(size) == rng.integers(size), 60.0, 0.0),
    "ties": lambda rng, size: np.round(rng.normal(0, 4, size) * 2) / 2,
    "ties at the cut": lambda rng, size: rng.choice([2.0, 1.0], size, p=[0.02, 0.98]),
    "faint tail": lambda rng, size: np.where(np.arange(size) < 3, rng.normal(0, 2, size), -69.0),  # exp(-69) is 1e-30
    "fainter tail": lambda rng, size: np.where(rng.permutation(size) < 4, rng.normal(0, 1, size), rng.normal(-200, 20, size)),
    "holes": lambda rng, size: np.where((rng.random(size) < 0.7) & (np.arange(size) != size // 2), -np.inf, rng.normal(0, 3, size)),
    "far from 0": lambda rng, size: rng.normal(0, 3, size) + rng.choice([-500.0, 500.0]),
}


@st.composite
def nasty_logits(draw: st.DrawFn) -> torch.Tensor:
    """Rows of several kinds; the reference sees the same rounded values."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    size = draw(st.sampled_from(VOCABULARIES))
    rows = [KINDS[kind](rng, size) for kind in draw(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=6))]
    return torch.tensor(np.stack(rows)).to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


def check(logits: torch.Tensor, threshold: float, least: int, most: int, temperatures: list[float], give: Callable[..., Kept] = strongest) -> None:
    """Ids exactly, rests to REST_ERROR, all other numbers to float32's precision."""
    rows = logits.double().numpy()
    realised = torch.arange(len(rows)) * 7 % rows.shape[1]
    kept = give(logits, realised, threshold, least, most, temperatures)
    assert kept.counts is None
    logprobs = log_softmax(rows)
    ids, flat = [], np.split(kept.ids.numpy(), np.cumsum(kept.kept.numpy())[:-1])
    for row, logprob, found in zip(rows, logprobs, flat, strict=True):
        # whether exactly `threshold` is reached is a matter of float32
        fewest, highest = (int((np.exp(logprob) >= threshold * factor).sum()) if threshold > 0 else most for factor in (1 + 2e-4, 1 - 2e-4))
        count = min(max(len(found), min(max(fewest, least), most, len(row))), min(max(highest, least), most))
        ids.append(sorted(order(row)[:count]))
        assert found.tolist() == ids[-1]
    near(kept.logprobs, np.concatenate([logprob[id] for logprob, id in zip(logprobs, ids, strict=True)]))
    near(kept.realised_logprob, logprobs[np.arange(len(rows)), realised])
    size = float(np.abs(rows[np.isfinite(rows)]).max())
    near(kept.entropy, [-(np.exp(row) * row).sum() for row in (row[np.isfinite(row)] for row in logprobs)], 5e-5 + 5e-7 * size)
    near(kept.logsumexp, [log_sum(row) for row in rows])
    assert kept.rests.shape == kept.lognorms.shape == (len(temperatures), len(rows))
    for rest, lognorm, temperature in zip(kept.rests, kept.lognorms, temperatures, strict=True):
        near(rest, [log_sum(np.delete(row, id) / temperature) for row, id in zip(logprobs, ids, strict=True)], REST_ERROR)
        near(lognorm, [log_sum(row / temperature) for row in logprobs])


def rows_at_once(rows: int, vocabulary: int):
    return mock.patch.dict(module.WORKING_BYTES, {"cpu": 4 * vocabulary * rows})


def near(found: torch.Tensor, wanted, error: float = 5e-5) -> None:
    wanted = np.maximum(np.asarray(wanted, np.float64), -1e29)
    np.testing.assert_allclose(np.maximum(found.double().numpy(), -1e29), wanted, rtol=5e-6, atol=error)


def with_ties(rows: int, vocabulary: int, seed: int, spread: float = 4.0) -> torch.Tensor:
    values = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    return (values * 2).round().div(2).bfloat16()


@settings(deadline=None, max_examples=200)
@given(
    logits=nasty_logits(),
    threshold=st.sampled_from([0.0, 1e-6, 0.0005, 0.002, 0.005, 0.02, 0.3, 0.999]),
    least=st.sampled_from([1, 2, 4, 90]),
    more=st.sampled_from([0, 1, 12, 60, 2000]),
    temperatures=st.sampled_from(LISTS),
    rows=st.sampled_from([1, 2, 100]),
)
def test_what_is_kept_is_what_a_dense_float64_reference_keeps(logits, threshold, least, more, temperatures, rows):
    with rows_at_once(rows, logits.shape[1]):
        check(logits, threshold, least, least + more, temperatures)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_every_kind_of_row_in_every_vocabulary_gives_the_reference_with_the_default_settings(kind: str, vocabulary: int):
    rng = np.random.default_rng(vocabulary)
    logits = torch.tensor(np.stack([KINDS[kind](rng, vocabulary) for _ in range(3)]), dtype=torch.float32)
    check(logits, 0.002, 4, 128, TEMPERATURES)
    check(logits, 0.0, 1, 16, [1.0, 1.5, 3.0])


def test_the_last_rows_are_kept_when_their_number_is_no_multiple_of_those_worked_on_at_once():
    for rows in range(1, 9):
        with rows_at_once(3, 100):
            check(with_ties(rows, 100, rows), 0.01, 2, 8, TEMPERATURES)


def test_the_number_kept_follows_the_threshold_within_least_and_most():
    logits = torch.log(torch.tensor([[0.9, 0.04, 0.03, 0.02, 0.01], [0.2, 0.2, 0.2, 0.2, 0.2], [1.0, 0.0, 0.0, 0.0, 0.0]]))
    kept = strongest(logits, torch.zeros(3, dtype=torch.int64), 0.025, 2, 4, [1.0])
    assert kept.kept.tolist() == [3, 4, 2]
    assert kept.ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]


def test_a_tie_at_the_cut_goes_to_the_lower_id_and_ids_ascend():
    logits = torch.zeros(1, 1000)
    logits[0, 700] = 1
    kept = strongest(logits, torch.tensor([0]), 0.0, 5, 5, [1.0])
    assert kept.ids.tolist() == [0, 1, 2, 3, 700]


def test_control_another_order_of_ties_a_token_too_few_and_a_power_of_the_leftover_are_caught():
    logits = with_ties(4, 300, 1, spread=1.0)
    settings = [(0.002, 2, 16, TEMPERATURES), (0.02, 2, 16, TEMPERATURES)]  # at `most` there are ties; with the other, fewer are kept
    for setting in settings:
        check(logits, *setting)

    def ties_to_the_higher_id(logits, realised, *more):
        kept = strongest(logits.flip(-1), logits.shape[-1] - 1 - realised, *more)
        turned = [logits.shape[-1] - 1 - ids.flip(0) for ids in kept.ids.split(kept.kept.tolist())]
        return replace(kept, ids=torch.cat(turned), logprobs=torch.cat([values.flip(0) for values in kept.logprobs.split(kept.kept.tolist())]))

    def one_block_left_out(logits, realised, *more):
        return strongest(torch.where(torch.arange(300) >= 256, -60.0, logits), realised, *more)

    def least_and_most_only(logits, realised, threshold, *more):
        return strongest(logits, realised, 0.0, *more)

    def power_of_the_leftover(logits, realised, *more):
        """(1 - sum of kept)^(1/T), as DistillKit had it, is no sum over the others."""
        kept = strongest(logits, realised, *more)
        return replace(kept, rests=torch.stack([kept.rests[0] / t for t in more[-1]]))

    for broken in (ties_to_the_higher_id, one_block_left_out, least_and_most_only, power_of_the_leftover):
        with pytest.raises(AssertionError):
            for setting in settings:
                check(logits, *setting, give=broken)
            pytest.fail(broken.__name__)


def test_a_vocabulary_of_three_and_keeping_more_than_there_is_leave_no_rest():
    logits = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    for least, most in ((3, 3), (64, 64), (500, 500), (1, 64)):
        kept = strongest(logits, torch.tensor([2, 1]), 0.0, least, most, TEMPERATURES)
        assert kept.ids.tolist() == [0, 1, 2] * 2
        assert (kept.rests == -torch.inf).all()
        assert torch.allclose(kept.logprobs.exp().view(2, 3).sum(-1), torch.ones(2))


def test_a_token_with_a_logit_of_minus_infinity_has_no_mass_anywhere():
    logits = with_ties(3, 100, 3).float()
    logits[:, 40:] = -torch.inf
    kept = strongest(logits, torch.tensor([99, 0, 1]), 0.0, 50, 50, TEMPERATURES)
    assert kept.logprobs[kept.ids >= 40].exp().sum() == 0
    assert (kept.rests == -torch.inf).all()
    assert kept.realised_logprob[0].exp() == 0
    assert kept.entropy.isfinite().all()
    into = torch.zeros(3, 100)
    tail_sums(logits, strongest(logits, torch.zeros(3, dtype=torch.int64), 0.0, 4, 4, TEMPERATURES), TEMPERATURES, into)
    assert into.isfinite().all()
    assert (into[:, 40:] == 0).all()


def test_chunks_together_are_the_same_as_all_at_once():
    logits, realised = with_ties(7, 200, 5), torch.arange(7)
    whole = strongest(logits, realised, 0.01, 2, 16, TEMPERATURES)
    parts = concatenated([strongest(logits[a:b], realised[a:b], 0.01, 2, 16, TEMPERATURES) for a, b in ((0, 3), (3, 4), (4, 7))])
    for name, value in vars(whole).items():
        assert value is getattr(parts, name) is None or torch.equal(value, getattr(parts, name)), name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, "all -inf"])
@pytest.mark.parametrize("row", [0, 3, 4])
@pytest.mark.parametrize("vocabulary", [3, 64, 70])
@pytest.mark.parametrize("method", ["strongest", "drawn"])
def test_a_logit_that_is_not_finite_is_an_error_that_names_its_row(bad, row, vocabulary, method):
    logits = torch.zeros(5, vocabulary)
    if bad == "all -inf":
        logits[row] = -torch.inf
    else:
        logits[row, vocabulary - 1] = bad
    with rows_at_once(2, vocabulary), pytest.raises(NumericsError) as error:
        if method == "strongest":
            strongest(logits, torch.zeros(5, dtype=torch.int64), 0.002, 4, 8, TEMPERATURES)
        else:
            drawn(logits, torch.zeros(5, dtype=torch.int64), torch.zeros((5, 2), dtype=torch.float64), TEMPERATURES)
    assert error.value.args[1] == row


# --- drawn ---


def uniform(rows: int, draws: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((rows, draws)))


@settings(deadline=None, max_examples=60)
@given(logits=nasty_logits(), draws=st.sampled_from([1, 5, 50, 255]), temperatures=st.sampled_from(LISTS), seed=st.integers(0, 99))
def test_what_is_drawn_is_where_the_numbers_fall_in_the_cumulated_probabilities(logits, draws, temperatures, seed):
    rows, numbers = logits.double().numpy(), uniform(len(logits), draws, seed)
    realised = torch.zeros(len(rows), dtype=torch.int64)
    kept = drawn(logits, realised, numbers, temperatures)
    logprobs, owner = log_softmax(rows), np.repeat(np.arange(len(rows)), kept.kept)
    again = drawn(logits, realised, numbers, temperatures)
    assert torch.equal(kept.ids, again.ids)
    assert torch.equal(kept.counts, again.counts)
    for i, row in enumerate(logprobs):
        cumulated = np.cumsum(np.exp(row))
        ids, counts = np.unique(np.searchsorted(cumulated / cumulated[-1], numbers[i], side="right"), return_counts=True)
        assert kept.ids[owner == i].tolist() == ids.tolist()
        assert kept.counts[owner == i].tolist() == counts.tolist()
    assert np.bincount(owner, kept.counts).tolist() == [draws] * len(rows)
    assert (kept.rests == -torch.inf).all()
    assert kept.rests.shape == (len(temperatures), len(rows))
    near(kept.logprobs, logprobs[owner, kept.ids])
    near(kept.realised_logprob, logprobs[:, 0])


def test_what_is_drawn_is_right_on_the_average():
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 2
    draws, times = 50, 400
    kept = drawn(logits.expand(times, -1), torch.zeros(times, dtype=torch.int64), uniform(times, draws), [1.0])
    mean = np.bincount(kept.ids, kept.counts, 40) / (draws * times)
    p = np.exp(log_softmax(logits[0].numpy()))
    deviation = np.sqrt(p * (1 - p) / (draws * times))
    assert (np.abs(mean - p) < 4 * deviation).all()
    assert (np.abs(mean - p.mean()) > 4 * deviation).any()  # control: the bound tells this from a flat distribution


def test_the_lowest_and_the_highest_number_draw_tokens_that_have_mass():
    logits = torch.tensor([[-torch.inf, -80.0, 0.0, 1.0, -torch.inf], [1.0, 0.0, 1.0, 0.0, -90.0]])
    ends = torch.tensor([[0.0, np.nextafter(1.0, 0.0)]] * 2, dtype=torch.float64)
    kept = drawn(logits, torch.zeros(2, dtype=torch.int64), ends, [1.0])
    assert kept.ids.tolist() == [1, 3, 0, 3]


# --- tail sums and class masses ---


@settings(deadline=None, max_examples=60)
@given(
    logits=nasty_logits(),
    threshold=st.sampled_from([0.0, 0.002, 0.1]),
    most=st.sampled_from([1, 4, 70]),
    temperatures=st.sampled_from(LISTS),
    at_once=st.sampled_from([1, 2, 100]),
    every=st.sampled_from([1, 2, 4]),
)
def test_tail_sums_are_the_dense_sums_over_the_positions_that_do_not_keep_a_token(logits, threshold, most, temperatures, at_once, every):
    rows = logits.double().numpy()
    kept = strongest(logits, torch.zeros(len(rows), dtype=torch.int64), threshold, 1, most, temperatures)
    into = torch.full((len(temperatures), rows.shape[1]), 0.5)
    with rows_at_once(at_once, rows.shape[1]):
        tail_sums(logits, kept, temperatures, into, torch.arange(len(logits))[::every] if every > 1 else None)
    for i, temperature in enumerate(temperatures):
        p = np.exp(log_softmax(rows, temperature))
        p[np.repeat(np.arange(len(rows)), kept.kept), kept.ids] = 0
        np.testing.assert_allclose(into[i].double().numpy() - 0.5, p[::every].sum(0), rtol=3e-4, atol=1e-6)


def test_control_a_tail_sum_over_all_tokens_is_caught():
    logits = with_ties(5, 100, 0)
    kept = strongest(logits, torch.zeros(5, dtype=torch.int64), 0.01, 1, 20, [1.0])
    into = torch.zeros(1, 100)
    tail_sums(logits, kept, [1.0], into)
    everything = np.exp(log_softmax(logits.double().numpy())).sum(0)
    assert into.sum().item() == pytest.approx(float(kept.rests.exp().sum()), rel=1e-4)
    assert np.abs(into[0].numpy() - everything).max() > 0.01


@settings(deadline=None, max_examples=60)
@given(logits=nasty_logits(), classes=st.integers(1, 16), seed=st.integers(0, 99), at_once=st.sampled_from([1, 2, 100]))
def test_class_masses_are_the_dense_sums_and_make_one(logits, classes, seed, at_once):
    rows = logits.double().numpy()
    class_of = torch.from_numpy(np.random.default_rng(seed).integers(0, classes, rows.shape[1]))
    kept = strongest(logits, torch.zeros(len(rows), dtype=torch.int64), 0.002, 1, 8, [1.0])
    with rows_at_once(at_once, rows.shape[1]):
        found = class_masses(logits, kept.logsumexp, class_of, classes).double().exp().numpy()
    p = np.exp(log_softmax(rows))
    wanted = np.stack([p[:, class_of.numpy() == i].sum(-1) for i in range(classes)], -1)
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-9)
    np.testing.assert_allclose(found.sum(-1), 1, atol=2e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@settings(deadline=None, max_examples=60)
@given(logits=nasty_logits(), threshold=st.sampled_from([0.0, 0.002, 0.02]), most=st.sampled_from([4, 64]), temperatures=st.sampled_from(LISTS))
def test_a_gpu_keeps_the_same(logits, threshold, most, temperatures):
    def on_gpu(logits, realised, *more):
        kept = strongest(logits.cuda(), realised.cuda(), *more)
        return Kept(*(None if value is None else value.cpu() for value in vars(kept).values()))

    check(logits, threshold, 2, most, temperatures, give=on_gpu)


def test_a_block_is_smaller_than_the_vocabularies_tested_here():
    assert min(VOCABULARIES) < module.BLOCK < max(VOCABULARIES)
    assert {module.BLOCK - 1, module.BLOCK, module.BLOCK + 1} <= set(VOCABULARIES)
