"""Intervals: against a plain reference, against what is true, and paired against unpaired."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.benchmarks import _bootstrap
from pipeline.benchmarks._bootstrap import interval, over_seeds, resampled


def plain(over: list[float], under: list[float], resamples: int) -> list[float]:
    """The bootstrap as a textbook has it."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(resamples):
        drawn = generator.integers(0, len(over), len(over)).tolist()
        found.append(sum(over[i] for i in drawn) / sum(under[i] for i in drawn))
    return found


parts = st.lists(st.tuples(st.floats(-10, 10), st.integers(1, 50)), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(parts)
def test_it_is_the_plain_bootstrap_of_a_ratio(of: list[tuple[float, int]]):
    over, under = ([float(part[i]) for part in of] for i in (0, 1))
    found = resampled(np.array(over)[:, None], np.array(under)[:, None], 50)[:, 0]
    assert found == pytest.approx(plain(over, under, 50), abs=1e-9)
    low, high = interval(found) or (0, 0)
    ratios = [above / below for above, below in zip(over, under, strict=True)]
    assert min(ratios) - 1e-9 <= low <= high <= max(ratios) + 1e-9


@pytest.mark.parametrize("at_once", [1, 100, 1 << 22])
def test_how_much_is_drawn_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch, at_once: int):
    over, under = np.random.default_rng(1).gamma(2, 1, (2, 30, 3))
    whole = resampled(over, under, 70)
    monkeypatch.setattr(_bootstrap, "AT_ONCE", at_once)
    np.testing.assert_allclose(resampled(over, under, 70), whole, rtol=1e-12)


def test_figures_that_are_given_together_meet_the_same_draws_and_other_streams_others():
    over = np.random.default_rng(2).normal(size=(50, 1))
    ones = np.ones((50, 2))
    together = resampled(np.hstack([over, over + 1]), ones, 200)
    np.testing.assert_allclose(together[:, 1] - together[:, 0], 1)
    assert np.array_equal(together[:, :1], resampled(over, ones[:, :1], 200))
    assert np.std(resampled(over, ones[:, :1], 200, stream=1)[:, 0] - together[:, 0]) > 0.1


def covers(found: tuple[float, float] | None, truth: float) -> bool:
    return found is not None and found[0] <= truth <= found[1]


def test_19_of_20_intervals_hold_what_is_true():
    generator, held = np.random.default_rng(3), 0
    for _ in range(300):
        under = generator.integers(5, 15, 80)
        over = under * generator.gamma(2, 1.0, 80)  # skewed, as divergences are; 2 on the average
        held += covers(interval(resampled(over[:, None], under[:, None], 400)[:, 0]), 2.0)
    assert 0.91 <= held / 300 <= 0.98


def test_with_several_seeds_both_are_drawn_and_control_records_alone_are_too_sure():
    generator, both, alone = np.random.default_rng(4), 0, 0
    for _ in range(200):
        values = 2 + generator.normal(0, 0.5, (40, 1)) + generator.normal(0, 0.2, (1, 6)) + generator.normal(0, 0.3, (40, 6))
        ratios = resampled(values, np.ones((40, 6)), 400)
        both += covers(interval(over_seeds(ratios)), 2.0)
        alone += covers(interval(ratios.mean(1)), 2.0)
    assert 0.90 <= both / 200 <= 0.99
    assert alone / 200 < both / 200 - 0.05


def test_pairs_tell_what_control_unpaired_cannot():
    """Two models on the same records, of which some are hard for both, and one is a little better."""
    generator = np.random.default_rng(5)
    hard = generator.gamma(2, 1.0, 100)
    one, other = hard + generator.normal(0, 0.1, 100), hard + 0.1 + generator.normal(0, 0.1, 100)
    drawn = resampled(np.stack([one, other], 1), np.ones((100, 2)), 2000)
    apart = resampled(other[:, None], np.ones((100, 1)), 2000, stream=1)[:, 0]
    paired, unpaired = interval(drawn[:, 1] - drawn[:, 0]), interval(apart - drawn[:, 0])
    assert paired
    assert unpaired
    assert paired[0] > 0
    assert covers(unpaired, 0.0)
    assert paired[1] - paired[0] < (unpaired[1] - unpaired[0]) / 5


def test_the_same_seeds_stay_together_unless_they_are_others():
    ratios = np.tile(np.random.default_rng(6).normal(size=(1, 5)), (1000, 1))
    assert np.array_equal(over_seeds(ratios), over_seeds(ratios))
    assert np.std(over_seeds(ratios) - over_seeds(ratios, apart=True)) > 0.1
    assert np.array_equal(over_seeds(ratios[:, :1]), ratios[:, 0])


def test_where_nothing_is_below_the_line_there_is_no_interval():
    nothing = np.zeros((10, 1))
    assert interval(resampled(nothing, nothing, 50)[:, 0]) is None
    mostly = np.array([[0.0]] * 9 + [[1.0]])
    assert interval(resampled(mostly, mostly, 200)[:, 0]) is None  # in a third of the resamples there is nothing
    assert interval(resampled(mostly, np.ones((10, 1)), 200)[:, 0]) is not None
